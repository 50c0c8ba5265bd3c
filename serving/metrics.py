"""Prometheus metrics, with names like vLLM-Omni's; no label has a prompt, a key or an id."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .pool import VideoJob
from .service import VideoService
from .store import Record

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
SHARES = tuple(tenth / 10 for tenth in range(1, 11))
STAGES = {"text": "diffusion_preprocess", "denoising": "diffusion_exec", "decoding": "diffusion_postprocess"}


class Metrics:
    """Of one service, which it observes."""

    def __init__(self, service: VideoService) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(service))
        self._ended = self._counter("requests", "Requests that ended", "model", "finished_reason")
        self._blocks = self._counter("blocks", "Block calls, by what became of them", "model", "decision")
        self._steps = self._counter("steps", "Denoising steps, by what ran in them", "model", "kind")
        self._latency = self._seconds("e2e_request_latency", "From creation to the end")
        self._queue = self._seconds("request_queue_time", "From creation to the start")
        self._stages = {stage: self._seconds(name, f"Of the phase {stage}") for stage, name in STAGES.items()}
        self._stages["encoding"] = self._seconds("video_encoding", "Of writing the file")
        self._skipped = Histogram(
            "foresight:share_skipped",
            "Share of block calls that did not run",
            ["model"],
            buckets=SHARES,
            registry=self.registry,
        )
        self._cache = Histogram(
            "foresight:cache_bytes",
            "Of the stream and the cached outputs of a request",
            ["model"],
            buckets=[4.0**power for power in range(8, 19)],
            registry=self.registry,
        )
        service.observers.append(self.observe)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def observe(self, record: Record, job: VideoJob) -> None:
        """A job's status has changed."""
        if not job.done:
            return
        model, result = record.spec.model, record.result
        reason = "completed" if result is not None else record.failure.code if record.failure else "failed"
        self._ended.labels(model, reason).inc()
        ended = job.created if job.ended is None else job.ended
        self._latency.labels(model).observe(ended - job.created)
        if job.started is not None:
            self._queue.labels(model).observe(job.started - job.created)
        if result is None:
            return
        for stage, seconds in result.stages.items():
            self._stages[stage].labels(model).observe(seconds)
        for decision, count in result.counts.items():
            self._blocks.labels(model, decision).inc(count)
        for step in result.steps:
            kind = "forecast" if set(step) == {"F"} else "computed" if set(step) == {"C"} else "reused"
            self._steps.labels(model, kind).inc()
        self._skipped.labels(model).observe(result.share_skipped)
        self._cache.labels(model).observe(result.cache_bytes)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"foresight:{name}", words, labels, registry=self.registry)

    def _seconds(self, name: str, words: str) -> Histogram:
        return Histogram(f"foresight:{name}_s", f"{words}, seconds", ["model"], buckets=SECONDS, registry=self.registry)


class _Now(Collector):
    """What is so when it is asked for."""

    def __init__(self, service: VideoService) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges."""
        running, waiting = self._service.counts
        gauges = {
            "num_requests_running": ("Requests that run", running),
            "num_requests_waiting": ("Requests that wait", waiting),
            "ready": ("Whether requests are accepted and made", self._service.ready),
            "worker_starts": ("How often workers were started", self._service.pool.starts),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"foresight:{name}", words, value=float(value))
