"""What a backend must do, and which there are.

A backend turns one graph of a bundle into an engine; an engine runs it on arrays that the caller owns. Engines hold
weights and scratch, never anything of a request, so one engine serves any number of requests, also at the same time.
On a GPU all engines of a backend share the stream of its arrays: to run one is to put it in line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol, cast

from .arrays import Array, Arrays, create_arrays, parse_device
from .bundle import COMPILED, Bundle, check_compiled_folder
from .compiled import Compiled, find_compiled
from .errors import BundleError, EngineError, InvalidRequest
from .files import PARTIAL
from .manifest import Part
from .registry import ABILITIES, DEFAULT, REGISTRY, check_option


class Engine(Protocol):
    """One compiled graph."""

    def run(self, tensors: Mapping[str, Array]) -> None:
        """Run the graph once.

        `tensors` holds every input and every output of the graph by name, as C-contiguous arrays of the backend's
        device in the dtype and shape the manifest states; further names are ignored. Inputs are read, outputs are
        written in place; nothing is kept. An output may not share memory with an input. Safe from several threads.
        On a GPU this only enqueues the work, inside `arrays.active()`; arrays at multiples of 256 bytes, as they are
        allocated, spare plans a copy. An engine that can be stopped is so by the watch it runs in, see interrupt.py;
        what it has written by then means nothing. Raises EngineError, and Cancelled where it was stopped.
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


def check_ends(part: Part, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Whether a graph with inputs and outputs of these names takes and makes what its part does. Raises EngineError."""
    for what, found, specs in (("inputs", inputs, part.inputs), ("outputs", outputs, part.outputs)):
        names, expected = sorted(found), sorted(spec.name for spec in specs)
        if names != expected:
            raise EngineError(
                f"{part.name}: {part.graph} has {what} {', '.join(names)[:200]}, expected {', '.join(expected)[:200]}; "
                "export again"
            )


def choose_backend(bundle: Bundle, device: str | None = None) -> str:
    """The backend that a bundle has engines for, built for the GPU at hand; else ONNX Runtime, which needs none.

    Libraries are imported only where the bundle has engines. Raises InvalidRequest for what is no device, and
    IntegrityError where there are engines for this GPU that cannot be trusted.
    """
    device = "cuda" if device is None else device
    check_compiled_folder(bundle.path)
    folders = [folder.name for folder in (bundle.path / COMPILED).glob("*") if folder.suffix != PARTIAL]
    built = {name.rpartition("-")[0] for name in folders}
    candidates = [name for name in REGISTRY if name in built]
    if parse_device(device)[0] != "cuda" or not candidates:
        return DEFAULT
    from .tensorrt.library import find_target

    try:
        create_arrays(device)
    except EngineError:
        return DEFAULT
    for name in candidates:
        try:
            find_compiled(bundle, name, find_target(name, device))
        except (BundleError, EngineError):  # for another machine, or their library is not here
            continue
        return name
    return DEFAULT


def create_backend(
    name: str = DEFAULT,
    device: str | None = None,
    threads: int | None = None,
    cuda_graphs: bool = False,
    shared_weights: bool = False,
) -> Backend:
    """A backend by its registered name; its library is imported only now.

    `device` None is the backend's own default. `threads` is for CPU backends; None means the number of cores this
    process may use. `cuda_graphs` records every engine once per set of addresses and replays that; TensorRT only.
    `shared_weights` leaves weights mapped from the bundle, for several processes to share; on CPUs only.
    """
    if name not in REGISTRY:
        raise InvalidRequest(f"backend: got {name!r}, expected one of {', '.join(REGISTRY)}")
    row = REGISTRY[name]
    options = {"threads": threads, "cuda_graphs": cuda_graphs, "shared_weights": shared_weights}
    for option in ABILITIES:
        if options[option]:
            check_option(name, option)
    create = cast(Callable[..., Backend], getattr(import_module(f".{row.module}", __package__), row.factory))
    return create(row.device if device is None else device, **{option: options[option] for option in row.options})


@dataclass(frozen=True)
class SharedBackends:
    """One backend for all bundles that it runs, so that they share its stream and memory; see `create_backend`.

    `name` None is what each bundle has engines for. `create` makes them.
    """

    name: str | None
    device: str | None
    threads: int | None
    cuda_graphs: bool
    shared_weights: bool
    create: Callable[..., Backend] = create_backend
    made: dict[str, Backend] = field(default_factory=dict)

    def of(self, bundle: Bundle) -> Backend:
        """The one that was asked for, or that the bundle has engines for. Raises EngineError, InvalidRequest."""
        name = self.name or choose_backend(bundle, self.device)
        if name not in self.made:
            self.made[name] = self.create(name, self.device, self.threads, self.cuda_graphs, self.shared_weights)
        return self.made[name]
