"""The backends, one row each; read without numpy or any of their libraries, as a command line's completion wants."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidRequest


@dataclass(frozen=True)
class BackendRow:
    """A backend's module here, and its factory in it, which takes (device, threads, cuda_graphs, shared_weights).

    `device` is the one it runs on where none is asked for; `compiles` says that it runs plans built before, see
    build.py, instead of the graphs themselves.
    """

    module: str
    factory: str
    device: str
    compiles: bool = False


REGISTRY = {
    "onnxruntime": BackendRow("onnxruntime", "OnnxRuntimeBackend", "cpu"),
    "tensorrt": BackendRow("tensorrt.backend", "TensorRTBackend", "cuda", compiles=True),
    "tensorrt-rtx": BackendRow("tensorrt.backend", "TensorRTRTXBackend", "cuda", compiles=True),
    "reference": BackendRow("reference", "ReferenceBackend", "cpu"),
}
DEFAULT = "onnxruntime"
COMPILERS = tuple(name for name, row in REGISTRY.items() if row.compiles)


def check_compiler(backend: str) -> None:
    """Refuse a backend that compiles nothing. Raises InvalidRequest."""
    if backend not in COMPILERS:
        raise InvalidRequest(f"backend: got {backend!r}, expected one that compiles: {', '.join(COMPILERS)}")
