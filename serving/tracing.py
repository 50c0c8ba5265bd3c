"""OpenTelemetry: a trace a job, made when it has ended, under the span of the client that asked for it.

Names are those of the conventions for generative models where these have one. No attribute has a prompt, a key or a
path.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from .pool import VideoJob
from .service import VideoService
from .store import Record

SHUTDOWN_SECONDS = 3.0  # for what was not sent yet, where nobody may be listening
PARENT = "traceparent"


def provider_from_environment() -> TracerProvider:
    """One that sends to where the standard variables, OTEL_EXPORTER_OTLP_ENDPOINT above all, say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=_named(Resource.create({"service.version": __version__})))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _named(resource: Resource) -> Resource:
    """Without the library's own word for a service that nobody named."""
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: "foresight"}))
    return resource


class Tracing:
    """Traces of one service's jobs, which it observes."""

    def __init__(self, service: VideoService, provider: TracerProvider) -> None:
        self._service = service
        self._provider = provider
        self._tracer = provider.get_tracer("foresight", __version__)
        service.observers.append(self.observe)

    def observe(self, record: Record, job: VideoJob) -> None:
        """A job's status has changed."""
        if not job.done or record.completed_at is None:
            return
        parent = {} if record.traceparent is None else {PARENT: record.traceparent}
        span = self._tracer.start_span(
            f"generate_video {record.spec.model}",
            context=TraceContextTextMapPropagator().extract(parent),
            kind=SpanKind.SERVER,
            start_time=_ns(record.created_at),
            attributes=self._attributes(record),
        )
        if record.failure is not None:
            span.set_attribute("error.type", record.failure.code)
            span.set_status(Status(StatusCode.ERROR, record.failure.code))
        context = set_span_in_context(span)
        for name, begins, ends in _phases(record, record.completed_at):
            self._tracer.start_span(name, context=context, start_time=_ns(begins)).end(_ns(ends))
        span.end(_ns(record.completed_at))

    def close(self) -> None:
        """Send what was not sent yet, for a few seconds at most."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(SHUTDOWN_SECONDS)

    def _attributes(self, record: Record) -> dict[str, Any]:
        spec, result = record.spec, record.result
        model = self._service.model(record)
        told: dict[str, Any] = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.output.type": "video",
            "gen_ai.provider.name": "foresight",
            "gen_ai.request.model": spec.model,
            "foresight.bundle": model.bundle.id,
            "foresight.job": record.id,
            "foresight.steps": model.bundle.manifest.defaults.steps if spec.steps is None else spec.steps,
        }
        if result is not None:
            told |= {
                "foresight.policy": str(result.policy["name"]),
                "foresight.share_skipped": result.share_skipped,
                "foresight.cache_bytes": result.cache_bytes,
                "foresight.peak_bytes": result.peak_bytes,
                "foresight.frames": result.frames,
                **{f"foresight.blocks.{decision}": count for decision, count in result.counts.items()},
            }
        return told


def _phases(record: Record, ended: float) -> Iterator[tuple[str, float, float]]:
    """What a job did after what: names, and when each began and ended, in Unix seconds."""
    begins = ended if record.started_at is None else record.started_at
    yield "queued", record.created_at, begins
    for stage, seconds in ({} if record.result is None else record.result.stages).items():
        yield stage, begins, begins + seconds
        begins += seconds


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
