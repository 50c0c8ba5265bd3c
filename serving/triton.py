"""A model of Triton's Python backend: requests in, how far they are, and in the end the video.

Only Triton's process has `triton_python_backend_utils`, so that it is imported when a model is loaded. `execute` hands
requests to a Runtime's queue and returns: others are accepted meanwhile, and each is answered by a thread of its own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from base64 import b64encode
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..engines.errors import Cancelled, ForesightError, InvalidRequest, OutOfMemory, QueueFull, one_line
from ..engines.progress import Progress
from ..runtime.device import Runtime
from ..runtime.jobs import Job
from ..runtime.limits import RequestLimits
from ..runtime.stream import Event
from ..runtime.video import Video, check_output
from .spec import Spec, request_of
from .worker import Failure, share_done

BUNDLE = "bundle"  # beside model.py
BASE64 = "base64"
# What a request may have: the fields of Spec, and whether the video is to be a text, as JSON needs it.
INPUTS = {
    "prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "steps": "TYPE_INT32",
    "guidance": "TYPE_FP64",
    "guidance_2": "TYPE_FP64",
    "seed": "TYPE_INT64",
    "policy": "TYPE_STRING",
    "profile": "TYPE_STRING",
    BASE64: "TYPE_BOOL",
}
OUTPUTS = {"progress": "TYPE_FP32", "phase": "TYPE_STRING", "video": "TYPE_STRING", "trace": "TYPE_STRING"}
CODES: dict[type[ForesightError], str] = {
    InvalidRequest: "INVALID_ARG",
    QueueFull: "UNAVAILABLE",
    OutOfMemory: "UNAVAILABLE",
    Cancelled: "CANCELLED",
}
POLL_SECONDS = 0.05  # between two looks at whether a client has gone, and how far its request is

log = logging.getLogger("foresight.serving")


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The `parameters` of a config.pbtxt. `cache_memory` is in bytes; `signed_by` lists files as PATH does."""

    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    low_memory: bool = False
    cache_memory: int | None = None
    cuda_graphs: bool = False
    split_guidance: bool = False
    signed_by: str | None = None
    waiting: int = 16
    max_steps: int = 100

    @classmethod
    def of(cls, args: Mapping[str, str]) -> ModelSettings:
        """Those of what `initialize` is given; Triton's own are in capitals. Raises InvalidRequest."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        texts = {name: value["string_value"] for name, value in parameters.items() if not name.isupper()}
        try:
            found = msgspec.convert(texts, cls, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"parameters: {one_line(error)}; correct them in config.pbtxt") from error
        on_gpu = args["model_instance_kind"] == "GPU"
        return msgspec.structs.replace(found, device=f"cuda:{args['model_instance_device_id']}") if on_gpu else found


class TritonPythonModel:
    """What Triton's Python backend asks of a model; an instance has a pipeline of its own."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Verify the bundle beside model.py, load it and warm it up. Raises ForesightError, and is then not ready."""
        self._triton = import_module("triton_python_backend_utils")
        self._name = args["model_name"]
        settings = ModelSettings.of(args)
        check_output(Path("video.mp4"))
        self._runtime = Runtime(
            settings.device,
            backend=settings.backend,
            threads=settings.threads,
            cuda_graphs=settings.cuda_graphs,
            keys=None if settings.signed_by is None else settings.signed_by.split(os.pathsep),
            waiting=settings.waiting,
            limits=RequestLimits(steps=settings.max_steps),
        )
        try:
            self._manifest = self._runtime.load(
                Path(args["model_repository"]) / args["model_version"] / BUNDLE,
                self._name,
                low_memory=settings.low_memory,
                cache_memory=settings.cache_memory,
                split_guidance=settings.split_guidance,
            ).manifest
        except BaseException:
            self._runtime.close()
            raise
        self._threads = ThreadPoolExecutor(settings.waiting + 1, thread_name_prefix="foresight-triton")

    def execute(self, requests: Iterable[Any]) -> None:
        """Let all of them wait for their turn; they are answered by and by."""
        for request in requests:
            answer = _Answer(self._triton, request.get_response_sender())
            try:
                spec, as_text = self._asked(request)
                wanted = replace(request_of(spec, self._manifest), trace="summary")
                job = self._runtime.submit(self._name, wanted, on_event=answer.hear)
            except Exception as error:  # noqa: BLE001 - it is told to who asked
                answer.fail(error)
            else:
                self._threads.submit(answer.give, job, as_text)

    def is_ready(self) -> bool:
        """Whether requests are served."""
        return self._runtime.alive

    def finalize(self) -> None:
        """Wait for the requests that there are, then free everything."""
        self._threads.shutdown()
        self._runtime.close()

    def _asked(self, request: Any) -> tuple[Spec, bool]:
        """What a request asks for, and whether the video is to be base64. Raises InvalidRequest."""
        found = {name: self._triton.get_input_tensor_by_name(request, name) for name in INPUTS}
        values = {name: _value(name, tensor.as_numpy()) for name, tensor in found.items() if tensor is not None}
        as_text = values.pop(BASE64, False)
        if "prompt" not in values:
            raise InvalidRequest("prompt: got none, expected a text")
        return Spec(model=self._name, **values), as_text


class _Answer:
    """The responses to one request; all but a refusal are sent by one thread."""

    def __init__(self, triton: Any, sender: Any) -> None:
        self._triton = triton
        self._sender = sender
        self._latest: tuple[float, str] = (0.0, "queued")
        self._told: tuple[float, str] | None = None

    def hear(self, event: Event) -> None:
        """The request has come further."""
        if isinstance(event, Progress):
            self._latest = share_done(event), event.phase

    def give(self, job: Job[list[Video]], as_text: bool) -> None:
        """Tell how far it is until it has ended, then what came of it; end it where its client has gone."""
        ended = threading.Event()
        job.add_done_callback(lambda _: ended.set())
        try:
            self._tell()
            while not ended.wait(POLL_SECONDS):
                if self._sender.is_cancelled():
                    job.cancel()
                self._tell()
            (video,) = job.result()
            data = video.to_bytes("mp4")
            trace = json.dumps(video.trace.to_dict())
            self._send(True, progress=1.0, phase="completed", video=b64encode(data) if as_text else data, trace=trace)
        except Exception as error:  # noqa: BLE001 - it is told to who asked
            job.cancel()  # where it was the sender that failed
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Tell why nothing was made."""
        if not isinstance(error, ForesightError):
            log.error("a request failed in a way that is none of ours", exc_info=error)
        code = next((code for kind, code in CODES.items() if isinstance(error, kind)), "INTERNAL")
        kinds = self._triton.TritonError
        told = kinds(Failure.of(error).message, getattr(kinds, code))
        final = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            self._sender.send(self._triton.InferenceResponse(error=told), flags=final)
        except Exception:
            log.exception("nobody could be told that a request has failed")

    def _tell(self) -> None:
        latest = self._latest
        if latest != self._told:
            self._told = latest
            self._send(False, progress=latest[0], phase=latest[1])

    def _send(self, last: bool, **outputs: Any) -> None:
        tensors = [
            self._triton.Tensor(name, np.array([value], np.float32 if isinstance(value, float) else np.object_))
            for name, value in outputs.items()
        ]
        flags = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        self._sender.send(self._triton.InferenceResponse(output_tensors=tensors), flags=flags)


def _value(name: str, array: Any) -> Any:
    """The one value of an input, as Python has it. Raises InvalidRequest."""
    if array.shape != (1,):
        raise InvalidRequest(f"{name}: got the shape {array.shape}, expected (1,)")
    value = array[0]
    if not isinstance(value, bytes):
        return value.item() if isinstance(value, np.generic) else value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: got bytes that are no UTF-8, expected a text") from error
