"""What a backend must do, and which there are.

A backend turns one graph of a bundle into an engine; an engine runs it on arrays that the caller owns. Engines hold
weights and scratch, never anything of a request, so one engine serves any number of requests, also at the same time.
On a GPU all engines of a backend share the stream of its arrays: to run one is to put it in line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Protocol, cast

from .arrays import Array, Arrays
from .bundle import Bundle
from .compiled import Compiled
from .errors import InvalidRequest
from .manifest import Part


class Engine(Protocol):
    """One compiled graph."""

    def run(self, tensors: Mapping[str, Array]) -> None:
        """Run the graph once.

        `tensors` holds every input and every output of the graph by name, as C-contiguous arrays of the backend's
        device in the dtype and shape the manifest states; further names are ignored. Inputs are read, outputs are
        written in place; nothing is kept. An output may not share memory with an input. Safe from several threads.
        On a GPU this only enqueues the work, inside `arrays.active()`; arrays at multiples of 256 bytes, as they are
        allocated, spare plans a copy. Raises EngineError.
        """


class Backend(Protocol):
    """A way to run graphs: a library on a device."""

    name: str
    arrays: Arrays

    def load(self, bundle: Bundle, part: Part) -> Engine:
        """The engine of a part of a bundle whose files have been verified.

        Raises EngineError; BundleError or IntegrityError where what was compiled for this backend is missing, was
        made for another machine, or altered.
        """

    def compiled(self, bundle: Bundle) -> Compiled | None:
        """The plans that this backend runs the bundle with; None where it runs the graphs themselves."""

    def trim(self) -> None:
        """Give memory back that only engines which are gone needed, or arrays that are."""

    def describe(self) -> dict[str, str]:
        """Library, version and device, for traces and reports."""


# name -> (module, factory, default device); the factory takes (device, threads, cuda_graphs).
REGISTRY: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("onnxruntime", "OnnxRuntimeBackend", "cpu"),
    "tensorrt": ("tensorrt", "TensorRTBackend", "cuda"),
    "tensorrt-rtx": ("tensorrt", "TensorRTRTXBackend", "cuda"),
    "reference": ("reference", "ReferenceBackend", "cpu"),
}


def create_backend(
    name: str = "onnxruntime", device: str | None = None, threads: int | None = None, cuda_graphs: bool = False
) -> Backend:
    """A backend by its registered name; its library is imported only now.

    `device` None is the backend's own default. `threads` is for CPU backends; None means the number of cores this
    process may use. `cuda_graphs` records every engine once per set of addresses and replays that; TensorRT only.
    """
    if name not in REGISTRY:
        raise InvalidRequest(f"backend: got {name!r}, expected one of {', '.join(REGISTRY)}")
    module, factory, default = REGISTRY[name]
    create = cast(Callable[..., Backend], getattr(import_module(f".{module}", __package__), factory))
    return create(device=default if device is None else device, threads=threads, cuda_graphs=cuda_graphs)
