"""TensorRT 10.16 and 11, and TensorRT-RTX: one plan per part, all of them run on one CUDA stream with one scratch.

The three have one Python API under two module names, so one file serves them; `use` says which of them this process
works with. Plans are built in processes of their own, see build.py. Not with polygraphy's loaders: those print what
the parser complains about and raise without it, and choose between the libraries once, when polygraphy is imported.
"""

from __future__ import annotations

import platform
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakSet

from .arrays import Array, GpuArrays, create_arrays, gpu_facts, numpy_dtype, parse_device, select_device
from .bundle import Bundle
from .compiled import Compiled, find_compiled
from .errors import BundleError, EngineError, InvalidRequest, one_line
from .files import write_atomically
from .manifest import Part, TensorSpec

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
# A cache with fixed slots gives a block four sets of addresses, see runtime/cache.py; two requests at a time fit.
GRAPHS_PER_ENGINE = 8
ALIGNMENT = 256  # of every address that a plan is given, see IExecutionContext::setTensorAddress
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
    """A plan as it was built. `scratch_bytes` is the activation memory that the builder counted.

    `fused_attention` is None where the graph has no attention that is one operator, as it is from opset 23 on: what
    the library makes of MatMul, Softmax, MatMul it does not say.
    """

    data: bytes
    scratch_bytes: int
    fused_attention: bool | None
    seconds: float


def find_target(backend: str, device: str = "cuda") -> dict[str, str]:
    """What a plan built here runs on. Raises EngineError where the backend or the GPU it needs is missing.

    TensorRT compiles for the GPU at hand. TensorRT-RTX compiles for every GPU that it knows, and needs none for it.
    """
    use(backend)
    if parse_device(device)[0] != "cuda":
        raise InvalidRequest(f"device: got {device}, expected cuda or cuda:N, which {backend} builds for")
    target = {"library": f"{backend} {trt.__version__}", "system": f"{platform.system()} {platform.machine()}"}
    return target if backend == "tensorrt-rtx" else target | gpu_facts(device)


def probe(backend: str) -> dict[str, str]:
    """Build the smallest of plans, and load it as far as can be without running it.

    Returns the library's version, and "yes" or the reason why not for building and for running.
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
    engine = trt.Runtime(_Process.logger).deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:  # TensorRT-RTX compiles its kernels only then
        found["runs engines"] = f"no, {messages.errors().partition('; ')[0]}"
    return found


def profile_of(part: Part, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The shapes a part is built for. The usual batch is one guided prompt, which has two rows."""
    low = {name: smallest for name, (smallest, _) in ranges.items()}
    high = {name: largest for name, (_, largest) in ranges.items()}
    usual = high | {"batch": min(2, high["batch"])}
    return {spec.name: (spec.resolve(low), spec.resolve(usual), spec.resolve(high)) for spec in part.inputs}


def build_plan(
    backend: str,
    graph: Path,
    profile: Profile,
    settings: BuildSettings,
    timing_cache: Path | None = None,
    device: str = "cuda",
) -> Plan:
    """Compile an ONNX graph, its weights beside it, for this machine, and where that matters for this of its GPUs.

    Attention is one fused kernel where the library has one for its type and shape. Where it has none (fp32 never
    has), attention is taken apart and its scores take memory, which `Plan.fused_attention` says. `timing_cache` is
    read and written where given: equal layers are then tuned once. Raises EngineError with the library's reason.
    """
    messages = use(backend)
    started = time.perf_counter()
    if backend == "tensorrt":  # it compiles for the GPU that this thread works with
        select_device(device)
    data, attentions = None, 0
    for decompose in (False, True):
        messages.rows.clear()
        data, attentions = _build(backend, graph, profile, settings, timing_cache, decompose)
        if data is not None or NO_FUSED_KERNEL not in messages.errors():
            break
    if data is None:
        raise EngineError(f"{graph.stem}: {backend} cannot build {graph.name}: {messages.errors()}")
    scratch = messages.scratch_bytes()
    if scratch is None:
        raise EngineError(f"{graph.stem}: {backend} built {graph.name} without saying how much memory it needs")
    fused = not decompose if attentions else None
    return Plan(data, scratch, fused, round(time.perf_counter() - started, 2))


class TensorRTBackend:
    """Runs the plans of a bundle that were built for this GPU and this TensorRT.

    All engines share one stream, that of `arrays`, and one scratch buffer, as large as the largest needs: on one
    stream no two of them are at work at a time. `cuda_graphs` records an engine's kernels when it is run a second
    time with the same addresses, and replays them from then on; see GRAPHS_PER_ENGINE. `threads` is not used.
    """

    name: ClassVar[str] = "tensorrt"

    def __init__(
        self,
        device: str = "cuda",
        threads: int | None = None,
        cuda_graphs: bool = False,
        shared_weights: bool = False,
    ) -> None:
        if shared_weights:
            raise InvalidRequest(f"shared_weights: got {self.name}, expected onnxruntime, which can map them")
        arrays = create_arrays(device)
        if not isinstance(arrays, GpuArrays):
            raise InvalidRequest(
                f"device: got {device}, expected cuda or cuda:N, where {self.name} runs; or use --backend onnxruntime"
            )
        self.arrays = arrays
        self.cuda_graphs = cuda_graphs
        self.lock = threading.Lock()
        self.messages = use(self.name)
        self._gpu = gpu_facts(arrays.device)
        self._target = find_target(self.name, device)
        self._compiled: Compiled | None = None
        self._engines: WeakSet[TensorRTEngine] = WeakSet()
        self._runtime_cache: Any = None
        with arrays.active():
            self._runtime = trt.Runtime(_Process.logger)
            self.scratch: Array = arrays.empty((0,), "uint8")
            # Graphs are recorded on a stream of their own: on the other one, other threads may be at work.
            self.recorder = arrays.xp.cuda.Stream(non_blocking=True)

    def load(self, bundle: Bundle, part: Part) -> TensorRTEngine:
        """See Backend.load."""
        return self.load_plan(self.compiled(bundle).read_plan(part.name), part)

    def compiled(self, bundle: Bundle) -> Compiled:
        """See Backend.compiled."""
        if self._compiled is None or self._compiled.index.bundle != bundle.id:
            self._compiled = find_compiled(bundle, self.name, self._target)
        return self._compiled

    def load_plan(self, plan: bytes, part: Part) -> TensorRTEngine:
        """The engine of a plan that is known to be trustworthy: a plan is code. Raises EngineError, BundleError."""
        with self.arrays.active(), self.lock:
            self.messages.rows.clear()
            engine = self._runtime.deserialize_cuda_engine(plan)
            context = None if engine is None else self._context(engine)
            if context is None:
                raise EngineError(f"{part.name}: {self.name} cannot load its plan: {self.messages.errors()}")
            loaded = TensorRTEngine(self, engine, context, part)
            self._engines.add(loaded)
            self._fit_scratch()
            return loaded

    def trim(self) -> None:
        """See Backend.trim. The scratch goes with the engines that need it."""
        with self.lock:
            self._fit_scratch()
        self.arrays.trim()

    def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        return {
            "backend": self.name,
            "version": str(trt.__version__),
            "device": self.arrays.device,
            **self._gpu,
            "cuda_graphs": "yes" if self.cuda_graphs else "no",
        }

    def _fit_scratch(self) -> None:
        """Make the scratch as large as the largest engine that is there needs."""
        needed = max((engine.scratch_bytes for engine in self._engines), default=0)
        if needed != self.scratch.nbytes:
            self.scratch = self.arrays.empty((0,), "uint8")
            self.arrays.trim()  # give the old one back first, past the pool: plans take their memory from the device
            self.scratch = self.arrays.empty((needed,), "uint8")

    def _context(self, engine: trt.ICudaEngine) -> trt.IExecutionContext:
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.name == "tensorrt":
            return engine.create_execution_context(strategy)
        # TensorRT-RTX compiles kernels when a context is made: blocks of one kind share what was compiled. Kernels
        # that replaced others in the background would change results between two equal requests.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
        config.set_runtime_cache(self._runtime_cache)
        return engine.create_execution_context(config)


class TensorRTRTXBackend(TensorRTBackend):
    """The same for TensorRT-RTX."""

    name: ClassVar[str] = "tensorrt-rtx"


class TensorRTEngine:
    """One plan and its context. Inputs and outputs are bound by address; only what is not aligned is copied."""

    def __init__(
        self, backend: TensorRTBackend, engine: trt.ICudaEngine, context: trt.IExecutionContext, part: Part
    ) -> None:
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        expected = {spec.name for spec in (*part.inputs, *part.outputs)}
        if names != expected:
            raise BundleError(
                f"{part.name}: got a plan with tensors {', '.join(sorted(names))}, expected "
                f"{', '.join(sorted(expected))}; build it again"
            )
        self.scratch_bytes = int(engine.device_memory_size_v2)
        # They go in this order: recordings before their context, that before its engine, all before the backend.
        self._graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._context = context
        self._engine = engine
        self._backend = backend
        self._part = part
        self._shapes: tuple[Shape, ...] | None = None
        self._outputs: dict[str, Shape] = {}

    def run(self, tensors: Mapping[str, Array]) -> None:
        """See Engine.run."""
        with self._backend.lock:
            self._backend.messages.rows.clear()
            self._set_shapes(tensors)
            scratch = self._backend.scratch
            specs = (*self._part.inputs, *self._part.outputs)
            bound = {spec.name: self._aligned(tensors[spec.name], spec) for spec in specs}
            addresses = (scratch.data.ptr, *map(self._backend.arrays.address, bound.values()))
            if self._backend.cuda_graphs:
                self._replay(addresses, scratch)
            else:
                self._enqueue(addresses, scratch, self._backend.arrays.stream)
            for spec in self._part.outputs:
                if bound[spec.name] is not tensors[spec.name]:
                    tensors[spec.name][...] = bound[spec.name]

    def _aligned(self, array: Array, spec: TensorSpec) -> Array:
        """The array, or its copy: arrays are aligned where they are allocated, but a view may begin anywhere."""
        dtype = numpy_dtype(spec.dtype)
        assert array.dtype == dtype, f"{self._part.name}: {spec.name} is {array.dtype}, not {dtype}"
        return array.copy() if self._backend.arrays.address(array) % ALIGNMENT else array

    def _set_shapes(self, tensors: Mapping[str, Array]) -> None:
        """Tell the context about shapes that differ from those of the last run; check those of the outputs."""
        shapes = tuple(tensors[spec.name].shape for spec in self._part.inputs)
        if shapes != self._shapes:
            self._shapes = None
            self._graphs.clear()
            for spec, shape in zip(self._part.inputs, shapes, strict=True):
                if not self._context.set_input_shape(spec.name, trt.Dims(shape)):
                    raise EngineError(
                        f"{self._part.name}: {spec.name} is {shape}, for which its plan was not built: "
                        f"{self._backend.messages.errors()}"
                    )
            try:
                missing = self._context.infer_shapes()
            except RuntimeError as error:
                raise EngineError(
                    f"{self._part.name}: its plan cannot work with {shapes}: {self._backend.messages.errors()}"
                ) from error
            if missing:
                raise EngineError(f"{self._part.name}: the shapes of {', '.join(missing)} do not follow from {shapes}")
            self._outputs = {
                spec.name: _shape(self._context.get_tensor_shape(spec.name)) for spec in self._part.outputs
            }
            self._shapes = shapes
        for name, expected in self._outputs.items():
            if tensors[name].shape != expected:
                raise EngineError(f"{self._part.name}: {name} is {tensors[name].shape}, its plan writes {expected}")

    def _enqueue(self, addresses: Sequence[int], scratch: Array, stream: Any) -> None:
        self._context.set_device_memory(scratch.data.ptr, scratch.nbytes)
        specs = (*self._part.inputs, *self._part.outputs)
        for spec, address in zip(specs, addresses[1:], strict=True):
            if not self._context.set_tensor_address(spec.name, address):
                raise EngineError(f"{self._part.name}: {spec.name}: {self._backend.messages.errors()}")
        if not self._context.execute_async_v3(stream.ptr):
            raise EngineError(f"{self._part.name}: {self._backend.name} failed: {self._backend.messages.errors()}")

    def _replay(self, addresses: tuple[int, ...], scratch: Array) -> None:
        """Run by a graph that was recorded for these addresses; the first run with them is not recorded."""
        stream, recorder = self._backend.arrays.stream, self._backend.recorder
        graph = self._graphs.get(addresses)
        if graph is None and addresses in self._graphs:
            recorder.begin_capture()
            try:
                self._enqueue(addresses, scratch, recorder)
            except BaseException:
                with suppress(RuntimeError):  # that nothing was recorded; why, is on its way already
                    recorder.end_capture()
                raise
            graph = recorder.end_capture()
        if graph is None:
            self._enqueue(addresses, scratch, stream)
        else:
            graph.launch(stream)
        self._graphs[addresses] = graph
        self._graphs.move_to_end(addresses)
        if len(self._graphs) > GRAPHS_PER_ENGINE:
            self._graphs.popitem(last=False)


def _build(
    backend: str,
    graph: Path,
    profile: Profile,
    settings: BuildSettings,
    timing_cache: Path | None,
    decompose: bool,
) -> tuple[bytes | None, int]:
    """The plan, unless the library fails, and how many attentions the graph has as one operator."""
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
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    _set_shapes(builder, network, config, profile, graph)
    attentions = _attentions(network)
    if decompose:
        for attention in attentions:
            attention.decomposable = True
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        return None, len(attentions)
    if timing_cache is not None:
        write_atomically(timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(memory)), len(attentions)


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


def _shape(dims: trt.Dims) -> Shape:
    return tuple(int(dims[index]) for index in range(len(dims)))


def _attentions(network: trt.INetworkDefinition) -> list[trt.IAttention]:
    """Every attention that is one operator. The bindings hand out layers by their base class, to be changed."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            found.append(cast("trt.IAttentionInputLayer", layer).attention)
    return found


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
