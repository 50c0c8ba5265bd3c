"""Traces: one a job, under the client's span, with what was done and no word of what was asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from foresight.serving.service import VideoService
from foresight.serving.tracing import Tracing, provider_from_environment
from tests.serving import slow
from tests.serving.conftest import create, ended, served, settings_of, wait_for

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT = "a very secret dog"


@pytest.fixture(scope="module")
def traced(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TestClient, VideoService, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with served(settings_of(bundle, tmp_path_factory.mktemp("traced")), main=slow.main) as (client, service):
        Tracing(service, provider)
        yield client, service, exporter


def spans_of(exporter: InMemorySpanExporter, job: str) -> dict[str, ReadableSpan]:
    """A job's spans by name, the whole job's as `job`."""

    def found() -> dict[str, ReadableSpan]:
        spans = exporter.get_finished_spans()
        whole = [span for span in spans if (span.attributes or {}).get("foresight.job") == job]
        if not whole:
            return {}
        own = whole[0].context
        parts = [span for span in spans if span.parent is not None and span.parent.span_id == own.span_id]
        return {"job": whole[0], **{span.name: span for span in parts}}

    spans: dict[str, ReadableSpan] = wait_for(found)
    return spans


def test_a_job_is_a_trace_under_the_span_of_its_client(
    traced: tuple[TestClient, VideoService, InMemorySpanExporter],
) -> None:
    client, _, exporter = traced
    before = time.time_ns()
    body = {"prompt": PROMPT, "num_inference_steps": 6, "seed": 1, "policy": "static:warmup=2"}
    answer = client.post("/v1/videos", json=body, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    job = answer.json()["id"]
    assert ended(client, job)["status"] == "completed"
    spans = spans_of(exporter, job)
    whole = spans.pop("job")
    assert whole.parent is not None and whole.context is not None
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, SPAN)
    assert list(spans) == ["queued", "text", "denoising", "decoding", "encoding"]
    times = [(span.start_time or 0, span.end_time or 0) for span in spans.values()]
    assert before <= times[0][0] and all(a <= b for a, b in times)
    assert all(first[1] == then[0] for first, then in pairwise(times))
    assert times[-1][1] <= (whole.end_time or 0) + 50_000_000
    told = dict(whole.attributes or {})
    assert told["gen_ai.request.model"] == "tiny" and told["foresight.policy"] == "static"
    assert told["foresight.steps"] == 6
    assert isinstance(told["foresight.blocks.computed"], int) and told["foresight.blocks.reused"]
    assert whole.status.status_code is StatusCode.UNSET


def test_a_job_that_was_cancelled_is_an_error(traced: tuple[TestClient, VideoService, InMemorySpanExporter]) -> None:
    client, service, exporter = traced
    job = create(client, num_inference_steps=100)["id"]
    record = service.store.get(job)
    assert record is not None
    service.delete(record)
    whole = spans_of(exporter, job)["job"]
    assert whole.status.status_code is StatusCode.ERROR
    assert dict(whole.attributes or {})["error.type"] == whole.status.description == "cancelled_caller"


@pytest.mark.parametrize("sent", ["", "nonsense", f"00-{TRACE}-{SPAN}", f"00-{'0' * 32}-{SPAN}-01"])
def test_a_parent_that_is_none_is_ignored(
    traced: tuple[TestClient, VideoService, InMemorySpanExporter], sent: str
) -> None:
    client, _, exporter = traced
    answer = client.post(
        "/v1/videos", json={"prompt": "a dog", "num_inference_steps": 1}, headers={"traceparent": sent}
    )
    assert answer.status_code == 200
    assert spans_of(exporter, answer.json()["id"])["job"].parent is None


def test_no_span_has_a_prompt(traced: tuple[TestClient, VideoService, InMemorySpanExporter]) -> None:
    client, _, exporter = traced
    spans_of(exporter, ended(client, create(client, prompt=PROMPT)["id"])["id"])
    assert not any("secret" in span.to_json() for span in exporter.get_finished_spans())


class _Collector(BaseHTTPRequestHandler):
    got: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        type(self).got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_spans_are_sent_to_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    _Collector.got = []
    with HTTPServer(("127.0.0.1", 0), _Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        provider = provider_from_environment()
        provider.get_tracer("test").start_span("one").end()
        provider.shutdown()
        collector.shutdown()
    ((path, content),) = _Collector.got
    assert path == "/v1/traces" and b"one" in content and b"foresight" in content


def test_where_nobody_listens_the_end_does_not_wait_for_long(
    traced: tuple[TestClient, VideoService, InMemorySpanExporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, service, _ = traced
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    provider = provider_from_environment()
    tracing = Tracing(service, provider)
    service.observers.remove(tracing.observe)
    provider.get_tracer("test").start_span("one").end()
    started = time.monotonic()
    tracing.close()
    assert time.monotonic() - started < 6
