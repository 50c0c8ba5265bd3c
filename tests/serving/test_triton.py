"""A model of Triton's Python backend: what it is asked for and answers, through the interface that is documented."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from foresight.engines.arrays import Array
from foresight.engines.backend import SharedBackends, create_backend
from foresight.engines.errors import IntegrityError, InvalidRequest
from foresight.runtime import device
from foresight.runtime.pipeline import load
from foresight.runtime.policies.notation import policy_from_text
from foresight.serving.settings import WorkerSettings
from foresight.serving.spec import Spec
from foresight.serving.triton import BASE64, INPUTS, ModelSettings
from foresight.serving.triton_repository import Triton, write_repository
from tests.serving import triton_python_backend_utils as stand_in
from tests.serving.conftest import settings_of, wait_for
from tests.serving.triton_python_backend_utils import ANSWERED_S, Host, InferenceResponse, Sender, TritonError, answers
from tests.support import WatchedBackend, fail_at, is_block
from tests.test_packaging import ROOT

Before: TypeAlias = Callable[[str, Mapping[str, Array]], object]
ASKED = {"prompt": "a dog", "steps": 6, "seed": 3}
FLAGS = re.DOTALL | re.MULTILINE


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model `tiny`, before which one request may wait."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(folder, Triton(settings_of(bundle, folder).worker, waiting=1))
    return folder


@pytest.fixture(scope="module")
def expected(bundle: Path) -> bytes:
    """The mp4 that `ASKED` makes."""
    with load(bundle, threads=1) as pipeline:
        return pipeline("a dog", steps=6, seed=3).to_bytes("mp4")


class Watched:
    """A host of `tiny`, whose engines do `before` they run what a test says."""

    def __init__(self, model: Path) -> None:
        backends: list[WatchedBackend] = []

        def create(*options: Any) -> WatchedBackend:
            backends.append(WatchedBackend(create_backend(*options)))
            return backends[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "SharedBackends", partial(SharedBackends, create=create))
            self.host = Host(model)
        (self.backend,) = backends

    def do(self, before: Before) -> None:
        self.backend.before = before


@pytest.fixture
def watched(repository: Path) -> Iterator[Watched]:
    found = Watched(repository / "tiny")
    yield found
    found.do(lambda part, tensors: None)
    found.host.model.finalize()


def error_of(responses: list[InferenceResponse]) -> TritonError:
    """Of a request that has failed: the last response, and the only one without outputs."""
    *others, last = responses
    assert last.error is not None and not any(response.error for response in others)
    assert "\n" not in last.error.message and "/" not in last.error.message
    return last.error


def video_of(sender: Sender) -> bytes:
    last = answers(sender)[-1]
    assert last.error is None, last.error and last.error.message
    return bytes(last.tensors["video"][0])


def test_progress_comes_first_and_the_video_last(watched: Watched, expected: bytes) -> None:
    (sender,) = watched.host.ask(ASKED)
    *others, last = answers(sender)
    assert others and all(set(response.tensors) == {"progress", "phase"} for response in others)
    shares = [float(response.tensors["progress"][0]) for response in (*others, last)]
    assert shares == sorted(shares) and shares[-1] == 1
    assert last.tensors["phase"][0] == "completed"
    assert last.tensors["video"][0] == expected
    trace = json.loads(last.tensors["trace"][0])
    assert (trace["seeds"], trace["steps_requested"], trace["steps"]) == ([3], 6, [])
    assert sum(trace["summary"].values()) == trace["blocks_possible"]


def test_the_video_is_a_text_for_those_who_need_one(watched: Watched, expected: bytes) -> None:
    last = watched.host.answer(**ASKED, base64=True)[-1]
    assert base64.b64decode(last.tensors["video"][0]) == expected


def test_every_setting_of_a_request_is_an_input(watched: Watched, bundle: Path) -> None:
    assert INPUTS.keys() - {BASE64} == set(Spec.__struct_fields__) - {"model"}
    told = {"negative_prompt": "a cat", "guidance": 2.3, "policy": "static:interval=2"}
    (sender,) = watched.host.ask(ASKED | told)
    with load(bundle, threads=1) as pipeline:
        policy = policy_from_text("static:interval=2")
        video = pipeline("a dog", negative_prompt="a cat", steps=6, guidance=2.3, seed=3, policy=policy)
    assert video_of(sender) == video.to_bytes("mp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 101}, "steps: got 101, expected at most 100"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": b"\xff"}, "prompt: got bytes that are no UTF-8"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"policy": "nothing:like=it"}, "policy"),
        ({"profile": "none"}, "profile"),
        ({"policy": "none", "profile": "none"}, "profile: got a profile and a policy"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(watched: Watched, changes: dict[str, Any], message: str) -> None:
    responses = watched.host.answer(**(ASKED | changes))
    error = error_of(responses)
    assert (error.code, len(responses)) == (TritonError.INVALID_ARG, 1)
    assert error.message.startswith(message)


def test_requests_are_accepted_while_one_runs_and_more_than_may_wait_are_sent_away(
    watched: Watched, expected: bytes
) -> None:
    free, runs = threading.Event(), threading.Event()

    def hold(part: str, tensors: Mapping[str, Array]) -> None:
        runs.set()
        assert free.wait(ANSWERED_S)

    watched.do(hold)
    (first,) = watched.host.ask(ASKED)
    assert runs.wait(ANSWERED_S)
    second, third = watched.host.ask(ASKED | {"seed": 4}, ASKED)
    error = error_of(answers(third))
    assert error.code == TritonError.UNAVAILABLE and error.message.startswith("queue: got a request while 1 wait")
    wait_for(lambda: second.sent)
    assert second.sent[0].tensors["phase"][0] == "queued"
    assert not first.ended.is_set() and not second.ended.is_set()
    free.set()
    assert video_of(first) == expected
    assert video_of(second) != expected


def test_a_client_that_cancels_ends_the_work_within_one_block(watched: Watched, expected: bytes) -> None:
    begun: list[str] = []
    senders: list[Sender] = []

    def cancel(part: str, tensors: Mapping[str, Array]) -> None:
        if is_block(part):
            wait_for(lambda: senders)
            begun.append(part)
            senders[0].cancelled = True
            wait_for(lambda: senders[0].looks > 1)  # between two of them the request is told

    watched.do(cancel)
    senders += watched.host.ask(ASKED)
    assert error_of(answers(senders[0])).code == TritonError.CANCELLED
    assert len(begun) == 1
    watched.do(lambda part, tensors: None)
    assert video_of(*watched.host.ask(ASKED)) == expected


def test_a_client_that_cancels_while_it_waits_is_gone_from_the_queue(watched: Watched, expected: bytes) -> None:
    free = threading.Event()
    watched.do(lambda part, tensors: free.wait(ANSWERED_S))
    (first,) = watched.host.ask(ASKED)
    wait_for(lambda: watched.host.model._runtime.running)
    (second,) = watched.host.ask(ASKED)
    second.cancelled = True
    error = error_of(answers(second))
    assert error.code == TritonError.CANCELLED and "while it waited" in error.message
    free.set()
    assert video_of(first) == expected


def test_an_engine_that_fails_costs_its_request_alone(watched: Watched, expected: bytes) -> None:
    watched.do(fail_at(3, is_block))
    error = error_of(watched.host.answer(**ASKED))
    assert error.code == TritonError.INTERNAL and "injected fault" in error.message
    assert video_of(*watched.host.ask(ASKED)) == expected


def test_a_request_whose_answers_go_nowhere_is_ended(
    watched: Watched, expected: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = threading.Event()
    watched.do(lambda part, tensors: free.wait(ANSWERED_S))
    (sender,) = watched.host.ask(ASKED)
    wait_for(lambda: sender.sent)

    def broken(response: InferenceResponse, flags: int) -> None:
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(sender, "send", broken)
    free.set()
    wait_for(lambda: "nobody could be told" in caplog.text)
    assert video_of(*watched.host.ask(ASKED)) == expected


def test_no_memory_is_a_reason_to_come_back(watched: Watched) -> None:
    def before(part: str, tensors: Mapping[str, Array]) -> None:
        raise MemoryError("injected")

    watched.do(before)
    assert error_of(watched.host.answer(**ASKED)).code == TritonError.UNAVAILABLE


def test_the_end_waits_for_those_in_flight(repository: Path, expected: bytes) -> None:
    host = Host(repository / "tiny")
    assert host.model.is_ready() is True
    first, second = host.ask(ASKED, ASKED)
    host.model.finalize()
    assert first.ended.is_set() and second.ended.is_set()
    assert {video_of(first), video_of(second)} == {expected}
    assert host.model.is_ready() is False


def test_a_bundle_that_was_altered_is_not_loaded(bundle: Path, tmp_path: Path) -> None:
    write_repository(tmp_path / "repository", Triton(settings_of(bundle, tmp_path).worker))
    data = tmp_path / "repository" / "tiny" / "1" / "bundle" / "epilogue.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="epilogue.data"):
        Host(tmp_path / "repository" / "tiny")


def args(kind: str, **parameters: str) -> dict[str, str]:
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    return {"model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": "1"}


def test_a_host_can_be_told_all_that_a_worker_can() -> None:
    of_worker = {field.name for field in fields(WorkerSettings)} - {"bundles", "shared_weights"}
    assert of_worker <= set(ModelSettings.__struct_fields__)


def test_parameters_are_read_from_the_configuration() -> None:
    found = ModelSettings.of(args("GPU", threads="3", low_memory="true", EXECUTION_ENV_PATH="elsewhere"))
    assert found == ModelSettings(device="cuda:1", threads=3, low_memory=True)
    assert ModelSettings.of(args("CPU", device="cpu")).device == "cpu"
    for wrong in ({"thread": "3"}, {"threads": "three"}):
        with pytest.raises(InvalidRequest, match=r"^parameters: .*; correct them in config.pbtxt$"):
            ModelSettings.of(args("CPU", **wrong))


def test_keys_are_listed_as_paths_are(bundle: Path, tmp_path: Path) -> None:
    worker = settings_of(bundle, tmp_path).worker
    write_repository(tmp_path / "repository", Triton(worker, signed_by=(tmp_path / "a.pem", tmp_path / "b.pem")))
    text = (tmp_path / "repository" / "tiny" / "config.pbtxt").read_text()
    assert f'key: "signed_by" value {{ string_value: "{tmp_path}/a.pem{os.pathsep}{tmp_path}/b.pem" }}' in text
    with pytest.raises(InvalidRequest, match="^key: .* cannot be read"):
        Host(tmp_path / "repository" / "tiny")


def test_the_example_of_the_page_answers(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8").partition("## In other hosts")[2]
    source = next(block for block in re.findall(r"^```python\n(.*?)^```", page, FLAGS) if "triton" in block)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "latte-demo").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    names: dict[str, Any] = {}
    exec(source, names)
    model = names["TritonPythonModel"]()
    model.initialize({})
    prompt = stand_in.Tensor("prompt", np.array([b"a dog"], np.object_))
    sender = Sender({"video": np.object_})
    model.execute([stand_in.InferenceRequest({"prompt": prompt}, sender)])
    with load(bundle, threads=1) as pipeline:
        assert video_of(sender) == pipeline("a dog", steps=20).to_bytes("mp4")
    model.runtime.close()
