"""TensorRT 10.16 and 11, and TensorRT-RTX: which of them this process works with, and what it does here.

The three have one Python API under two module names, so the same code serves them; `use` chooses. Until then, and in
processes that never do, none of them is imported.
"""

from __future__ import annotations

import platform
import re
import threading
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..arrays import gpu_facts, parse_device
from ..errors import EngineError, InvalidRequest, one_line

_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


@dataclass(frozen=True)
class Edition:
    """One of the two products: the names of its module, its oldest version, how to install it.

    TensorRT compiles for the GPU at hand. TensorRT-RTX compiles for every GPU that it knows, and needs none for it.
    """

    modules: tuple[str, ...]
    oldest: tuple[int, int]
    install: str
    needs_gpu: bool


EDITIONS = {
    "tensorrt": Edition(
        modules=("tensorrt",),
        oldest=(10, 16),
        install='pip install "foresight-engines[tensorrt]" --extra-index-url https://pypi.nvidia.com',
        needs_gpu=True,
    ),
    "tensorrt-rtx": Edition(
        modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        oldest=(1, 7),
        install='pip install "foresight-engines[tensorrt-rtx]"',
        needs_gpu=False,
    ),
}


class _Process:
    """What this process works with."""

    lock = threading.Lock()
    module: ModuleType | None = None
    library: Library | None = None


class _Chosen:
    """The module that `use` imported, under a name that can be imported before."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_Process.module, name)


if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = _Chosen()


@dataclass(frozen=True)
class Library:
    """A backend's library in use. A process has one logger: the libraries ignore all later ones."""

    backend: str
    messages: Messages
    logger: trt.ILogger


class Messages:
    """The last messages that the library logged, and how to read from them why it failed."""

    def __init__(self) -> None:
        self.rows: deque[tuple[str, str]] = deque(maxlen=1000)

    def errors(self) -> str:
        """All errors in one line; warnings where there are none."""
        for wanted in (("INTERNAL_ERROR", "ERROR"), ("WARNING",)):
            found = [one_line(text) for severity, text in self.rows if severity in wanted]
            if found:
                return "; ".join(dict.fromkeys(found))
        return "the library gave no reason"

    def scratch_bytes(self) -> int | None:
        """Activation memory of the plan built last."""
        found = [match for _, text in self.rows if (match := _ACTIVATIONS.search(text))]
        return int(found[-1][1]) if found else None


def use(backend: str) -> Library:
    """Import a backend's library, `trt` from then on; a process works with one of them.

    Raises EngineError where it is not installed, too old, or another one is in use.
    """
    with _Process.lock:
        if _Process.library is None:
            _Process.module = _import(backend)
            messages = Messages()
            _Process.library = Library(backend, messages, _logger(messages))
        library = _Process.library
        if library.backend != backend:
            raise EngineError(f"{backend}: this process already uses {library.backend}, expected one of the two only")
        return library


def find_target(backend: str, device: str = "cuda") -> dict[str, str]:
    """What a plan built here runs on. Raises EngineError where the backend or the GPU it needs is missing."""
    use(backend)
    if parse_device(device)[0] != "cuda":
        raise InvalidRequest(f"device: got {device}, expected cuda or cuda:N, which {backend} builds for")
    target = {"library": f"{backend} {trt.__version__}", "system": f"{platform.system()} {platform.machine()}"}
    return target | gpu_facts(device) if EDITIONS[backend].needs_gpu else target


def probe(backend: str) -> dict[str, str]:
    """Build the smallest of plans, and load it as far as can be without running it.

    Returns the library's version, and "yes" or the reason why not for building and for running.
    Call it in a process of its own: with a broken driver some versions crash instead of failing.
    """
    library = use(backend)
    found = {"version": str(trt.__version__), "builds engines": "yes", "runs engines": "yes"}
    builder = trt.Builder(library.logger)
    network = builder.create_network(strongly_typed())
    layer = network.add_activation(network.add_input("x", trt.float32, trt.Dims([8])), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        return found | {"builds engines": f"no, {library.messages.errors()}", "runs engines": "no"}
    library.messages.rows.clear()
    engine = trt.Runtime(library.logger).deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:  # TensorRT-RTX compiles its kernels only then
        found["runs engines"] = f"no, {library.messages.errors().partition('; ')[0]}"
    return found


def strongly_typed() -> int:
    """The flags of a network that keeps the types of its graph.

    TensorRT 10 infers types freely unless it is told to; later ones always keep them.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _import(backend: str) -> ModuleType:
    edition, reason = EDITIONS[backend], ""
    for name in edition.modules:
        try:
            module = import_module(name)
        except (ImportError, OSError) as error:  # OSError: the library is there, one it needs is not
            reason = reason or one_line(error)
            continue
        version = tuple(int(number) for number in module.__version__.split(".")[:2])
        if version < edition.oldest:
            oldest = ".".join(map(str, edition.oldest))
            raise EngineError(f"{backend}: got version {module.__version__}, expected {oldest} or newer; upgrade it")
        return module
    raise EngineError(f"{backend}: not installed ({reason}); {edition.install}")


def _logger(messages: Messages) -> trt.ILogger:
    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:
                messages.rows.append((severity.name, msg))

    return Logger()
