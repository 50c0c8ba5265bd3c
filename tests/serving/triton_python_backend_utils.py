"""What Triton's Python backend puts before a model, as its README has it, and a host that loads one from a repository.

Strict where the README is: what it does not allow raises. Real requests and responses go between processes, so that
arrays are copied here.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
DTYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}
ANSWERED_S = 60


class TritonError:
    """Why a request has failed."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str) and code in range(8)
        self.message, self.code = message, code


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        assert isinstance(array, np.ndarray) and array.dtype in {np.dtype(kind) for kind in DTYPES.values()}
        assert array.dtype != np.object_ or {type(item) for item in array.flat} <= {str, bytes}
        self._name = name
        self._array: np.ndarray[Any, Any] = array.copy()

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        assert output_tensors or error
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or ()}
        self.error = error


class Sender:
    """Where responses to one request go; `cancelled` is what its client sets. `looks` counts those that found it so."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        self.cancelled = False
        self.looks = 0
        self.sent: list[InferenceResponse] = []
        self.ended = threading.Event()
        self._outputs = outputs

    def is_cancelled(self) -> bool:
        self.looks += self.cancelled
        return self.cancelled

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert flags in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        assert not self.ended.is_set(), "nothing may be sent after the final flag"
        assert response is not None or flags, "a response that is none has the final flag"
        if response is not None:
            for name, array in response.tensors.items():
                assert array.dtype == self._outputs[name] and array.shape == (1,), name
            self.sent.append(response)
        if flags:
            self.ended.set()


class InferenceRequest:
    """One client's request, already checked against the configuration."""

    def __init__(self, tensors: dict[str, Tensor], sender: Sender) -> None:
        self.tensors = tensors
        self._sender = sender

    def get_response_sender(self) -> Sender:
        return self._sender


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensors.get(name)


class Host:
    """Triton, with one model of a repository: `config.pbtxt` says what is let in, `1/model.py` answers."""

    def __init__(self, model: Path, kind: str = "CPU", device: str = "0") -> None:
        text = (model / "config.pbtxt").read_text(encoding="utf-8")
        assert 'backend: "python"' in text and "max_batch_size: 0" in text and "decoupled: true" in text
        self.inputs, self.outputs = ({name: DTYPES[kind] for name, kind in _tensors(text, end)} for end in ENDS)
        self.optional = set(re.findall(r'^input { name: "(\w+)".* optional: true', text, re.MULTILINE))
        parameters = re.findall(r'^parameters { key: "(\w+)" value { string_value: (".*") } }', text, re.MULTILINE)
        config = {"parameters": {key: {"string_value": json.loads(value)} for key, value in parameters}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "triton_python_backend_utils", sys.modules[__name__])
            spec = importlib.util.spec_from_file_location("model", model / "1" / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.model = module.TritonPythonModel()
            self.model.initialize(
                {
                    "model_config": json.dumps(config),
                    "model_instance_kind": kind,
                    "model_instance_device_id": device,
                    "model_repository": str(model),
                    "model_version": "1",
                    "model_name": model.name,
                }
            )

    def ask(self, *requests: dict[str, Any]) -> list[Sender]:
        """Hand on requests that a server would let in; where their answers come."""
        made = []
        for fields in requests:
            assert self.inputs.keys() - self.optional <= fields.keys() <= self.inputs.keys()
            values = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
            tensors = {name: Tensor(name, np.array([value], self.inputs[name])) for name, value in values.items()}
            made.append((InferenceRequest(tensors, sender := Sender(self.outputs)), sender))
        assert self.model.execute([request for request, _ in made]) is None
        return [sender for _, sender in made]

    def answer(self, **fields: Any) -> list[InferenceResponse]:
        """All that is answered to one request."""
        (sender,) = self.ask(fields)
        return answers(sender)


def answers(sender: Sender) -> list[InferenceResponse]:
    """All that was sent, when it has ended."""
    assert sender.ended.wait(ANSWERED_S), "it was not answered in time"
    return sender.sent


ENDS = ("input", "output")


def _tensors(text: str, end: str) -> list[tuple[str, str]]:
    return re.findall(rf'^{end} {{ name: "(\w+)" data_type: (\w+) dims: \[ 1 \]', text, re.MULTILINE)
