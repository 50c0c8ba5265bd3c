"""What a backend must do, and which there are.

A backend turns one graph of a bundle into an engine; an engine runs it on arrays that the caller owns. Engines hold
weights and scratch, never anything of a request, so one engine serves any number of requests, also at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from .arrays import Array, Arrays
from .errors import InvalidRequest
from .manifest import Part


class Engine(Protocol):
    """One compiled graph."""

    def run(self, tensors: Mapping[str, Array]) -> None:
        """Run the graph once.

        `tensors` holds every input and every output of the graph by name, as C-contiguous arrays of the backend's
        device in the dtype and shape the manifest states; further names are ignored. Inputs are read, outputs are
        written in place; nothing is kept. An output may not share memory with an input. Safe from several threads.
        Raises EngineError.
        """


class Backend(Protocol):
    """A way to run graphs: a library on a device."""

    name: str
    arrays: Arrays

    def load(self, graph: Path, part: Part) -> Engine:
        """The engine of `part`, whose graph has been verified and lies at `graph`. Raises EngineError, BundleError."""

    def describe(self) -> dict[str, str]:
        """Library, version and device, for traces and reports."""


# name -> (module, factory); the factory takes (device, threads).
REGISTRY: dict[str, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime", "OnnxRuntimeBackend"),
}


def create_backend(name: str = "onnxruntime", device: str = "cpu", threads: int | None = None) -> Backend:
    """A backend by its registered name; its library is imported only now.

    `threads` is for CPU backends; None means the number of cores this process may use.
    """
    if name not in REGISTRY:
        raise InvalidRequest(f"backend: got {name!r}, expected one of {', '.join(REGISTRY)}")
    module, factory = REGISTRY[name]
    create = cast(Callable[..., Backend], getattr(import_module(f".{module}", __package__), factory))
    return create(device=device, threads=threads)
