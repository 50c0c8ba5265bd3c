"""The backends, one row each; read without numpy or any of their libraries, as a command line's completion wants."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidRequest


@dataclass(frozen=True)
class BackendRow:
    """A backend's module here, and its factory in it, which takes `device` and the options named here.

    `device` is the one it runs on where none is asked for; `compiles` says that it runs plans built before, see
    build.py, instead of the graphs themselves.
    """

    module: str
    factory: str
    device: str
    options: tuple[str, ...] = ()
    compiles: bool = False


REGISTRY = {
    "onnxruntime": BackendRow("onnxruntime", "OnnxRuntimeBackend", "cpu", ("threads", "shared_weights")),
    "openvino": BackendRow("openvino", "OpenVinoBackend", "cpu", ("threads", "shared_weights")),
    "tensorrt": BackendRow("tensorrt.backend", "TensorRTBackend", "cuda", ("cuda_graphs",), compiles=True),
    "tensorrt-rtx": BackendRow("tensorrt.backend", "TensorRTRTXBackend", "cuda", ("cuda_graphs",), compiles=True),
    "reference": BackendRow("reference", "ReferenceBackend", "cpu"),
}
# What an option asks of a backend, in words; one that does not take it refuses it. `threads` each may ignore.
ABILITIES = {"cuda_graphs": "which can replay", "shared_weights": "which can map them"}
DEFAULT = "onnxruntime"
COMPILERS = tuple(name for name, row in REGISTRY.items() if row.compiles)


def check_compiler(backend: str) -> None:
    """Refuse a backend that compiles nothing. Raises InvalidRequest."""
    if backend not in COMPILERS:
        raise InvalidRequest(f"backend: got {backend!r}, expected one that compiles: {', '.join(COMPILERS)}")


def check_option(backend: str, option: str) -> None:
    """Refuse an option that a registered backend does not take. Raises InvalidRequest."""
    if option not in REGISTRY[backend].options:
        takers = " or ".join(name for name, row in REGISTRY.items() if option in row.options)
        raise InvalidRequest(f"{option}: got {backend}, expected {takers}, {ABILITIES[option]}")
