"""TensorRT 10.16 and 11, and TensorRT-RTX: one plan per part, all of them run on one CUDA stream.

The three have one Python API under two module names, so one file serves them; `use` says which of them this process
works with. Plans are built in processes of their own, see build.py. Not with polygraphy's loaders: those print what
the parser complains about and raise without it, and choose between the libraries once, when polygraphy is imported.
"""

from __future__ import annotations

import platform
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from .arrays import gpu_facts
from .errors import EngineError, InvalidRequest, one_line
from .manifest import Part

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = None  # set by `use`

Shape = tuple[int, ...]
# Input name -> its smallest, usual and largest shape.
Profile = Mapping[str, tuple[Shape, Shape, Shape]]

INSTALL = {
    "tensorrt": 'pip install "foresight-engines[tensorrt]" --extra-index-url https://pypi.nvidia.com',
    "tensorrt-rtx": 'pip install "foresight-engines[tensorrt-rtx]"',
}
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
OLDEST = {"tensorrt": (10, 16), "tensorrt-rtx": (1, 7)}
NO_FUSED_KERNEL = "not supported by a dedicated kernel"
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


class _Process:
    """What this process works with. A process has one logger: the libraries ignore all later ones."""

    lock = threading.Lock()
    backend: str | None = None
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


def use(backend: str) -> Messages:
    """Import a backend's library; a process works with one of them. Returns what it will log.

    Raises EngineError where it is not installed, too old, or another one is in use.
    """
    with _Process.lock:
        if _Process.backend is None:
            library = _import(backend)
            globals()["trt"] = library
            _Process.messages = Messages()
            _Process.logger = _logger(_Process.messages)
            _Process.backend = backend
        if _Process.backend != backend:
            raise EngineError(f"{backend}: this process already uses {_Process.backend}, expected one of the two only")
        return _Process.messages


@dataclass(frozen=True)
class BuildSettings:
    """How plans are built. `level` is the library's optimisation level, 0 to 5.

    `workspace_bytes` is the most scratch that a plan may need (None: all that the device has).
    """

    level: int = 3
    workspace_bytes: int | None = None

    def describe(self) -> dict[str, str]:
        """As an index keeps it: plans built with other settings are other plans."""
        return {name: str(value) for name, value in asdict(self).items()}

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise InvalidRequest(f"level: got {self.level}, expected 0 to 5")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise InvalidRequest(f"workspace: got {self.workspace_bytes} bytes, expected more than 0")


@dataclass(frozen=True)
class Plan:
    """A plan as it was built. `scratch_bytes` is the activation memory that the builder counted."""

    data: bytes
    scratch_bytes: int
    fused_attention: bool
    seconds: float


def find_target(backend: str, device: str = "cuda") -> dict[str, str]:
    """What a plan built here runs on. Raises EngineError where the backend or the GPU it needs is missing.

    TensorRT compiles for the GPU at hand. TensorRT-RTX compiles for every GPU that it knows, and needs none for it.
    """
    use(backend)
    target = {"library": f"{backend} {trt.__version__}", "system": f"{platform.system()} {platform.machine()}"}
    return target if backend == "tensorrt-rtx" else target | gpu_facts(device)


def probe(backend: str) -> dict[str, str]:
    """Build and load the smallest of plans: the library's version, and "yes" or the reason why not for either.

    Call it in a process of its own: with a broken driver some versions crash instead of failing.
    """
    messages = use(backend)
    found = {"version": str(trt.__version__), "builds engines": "yes", "runs engines": "yes"}
    builder = trt.Builder(_Process.logger)
    network = builder.create_network(_strongly_typed())
    layer = network.add_activation(network.add_input("x", trt.float32, trt.Dims([8])), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        return found | {"builds engines": f"no, {messages.errors()}", "runs engines": "no"}
    messages.rows.clear()
    if trt.Runtime(_Process.logger).deserialize_cuda_engine(plan) is None:
        found["runs engines"] = f"no, {messages.errors().partition('; ')[0]}"
    return found


def profile_of(part: Part, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The shapes a part is built for. The usual batch is one guided prompt, which has two rows."""
    low = {name: smallest for name, (smallest, _) in ranges.items()}
    high = {name: largest for name, (_, largest) in ranges.items()}
    usual = high | {"batch": min(2, high["batch"])}
    return {spec.name: (spec.resolve(low), spec.resolve(usual), spec.resolve(high)) for spec in part.inputs}


def build_plan(
    backend: str, graph: Path, profile: Profile, settings: BuildSettings, timing_cache: Path | None = None
) -> Plan:
    """Compile an ONNX graph, its weights beside it, for this machine.

    Attention is one fused kernel where the library has one for its type and shape. Where it has none (fp32 never
    has), attention is taken apart and its scores take memory, which `Plan.fused_attention` says. `timing_cache` is
    read and written where given: equal layers are then tuned once. Raises EngineError with the library's reason.
    """
    messages = use(backend)
    started = time.perf_counter()
    data = None
    for decompose in (False, True):
        messages.rows.clear()
        data = _build(backend, graph, profile, settings, timing_cache, decompose)
        if data is not None or NO_FUSED_KERNEL not in messages.errors():
            break
    if data is None:
        raise EngineError(f"{graph.stem}: {backend} cannot build {graph.name}: {messages.errors()}")
    scratch = messages.scratch_bytes()
    if scratch is None:
        raise EngineError(f"{graph.stem}: {backend} built {graph.name} without saying how much memory it needs")
    return Plan(data, scratch, not decompose, round(time.perf_counter() - started, 2))


def _build(
    backend: str,
    graph: Path,
    profile: Profile,
    settings: BuildSettings,
    timing_cache: Path | None,
    decompose: bool,
) -> bytes | None:
    # Builder, network and parser stay referenced until the end: the library crashes on a collected one.
    builder = trt.Builder(_Process.logger)
    network = builder.create_network(_strongly_typed())
    parser = trt.OnnxParser(network, _Process.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{error.desc()} (node {error.node_name()!r}, a {error.node_operator()})" for error in errors]
        raise EngineError(f"{graph.stem}: {backend} cannot read {graph.name}: {one_line('; '.join(reasons))}")
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.level
    config.max_aux_streams = 0
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    _set_shapes(builder, network, config, profile, graph)
    if decompose:
        _decompose_attention(network)
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        return None
    if timing_cache is not None:
        timing_cache.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(memory))


def _set_shapes(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    profile: Profile,
    graph: Path,
) -> None:
    """Fix every dimension that has one size only, and give the range of the others."""
    ranges = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name not in profile:
            raise EngineError(f"{graph.stem}: {graph.name} has an input {tensor.name} that the manifest does not name")
        low, usual, high = profile[tensor.name]
        tensor.shape = trt.Dims([a if a == b else -1 for a, b in zip(low, high, strict=True)])
        if low != high:
            ranges.set_shape(tensor.name, trt.Dims(low), trt.Dims(usual), trt.Dims(high))
    if config.add_optimization_profile(ranges) < 0:
        raise EngineError(f"{graph.stem}: {_Process.messages.errors()} (shapes {dict(profile)})")


def _decompose_attention(network: trt.INetworkDefinition) -> None:
    """Let every attention be taken apart. The bindings hand out layers by their base class, which has to be changed."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            cast("trt.IAttentionInputLayer", layer).attention.decomposable = True


def _strongly_typed() -> int:
    """TensorRT 10 infers types freely unless it is told to keep the graph's; later ones always keep them."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _import(backend: str) -> ModuleType:
    reason = ""
    for name in MODULES[backend]:
        try:
            library = import_module(name)
        except (ImportError, OSError) as error:  # OSError: the library is there, one it needs is not
            reason = reason or one_line(error)
            continue
        version = tuple(int(number) for number in library.__version__.split(".")[:2])
        if version < OLDEST[backend]:
            oldest = ".".join(map(str, OLDEST[backend]))
            raise EngineError(f"{backend}: got version {library.__version__}, expected {oldest} or newer; upgrade it")
        return library
    raise EngineError(f"{backend}: not installed ({reason}); {INSTALL[backend]}")


def _logger(messages: Messages) -> trt.ILogger:
    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:
                messages.rows.append((severity.name, msg))

    return Logger()
