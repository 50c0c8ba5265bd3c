"""Plans, run: all of them on one CUDA stream with one scratch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from ..arrays import Array, GpuArrays, create_arrays, gpu_facts, numpy_dtype
from ..bundle import Bundle
from ..compiled import Compiled, find_compiled
from ..errors import BundleError, EngineError, InvalidRequest
from ..manifest import Part, TensorSpec
from .library import find_target, use

if TYPE_CHECKING:
    import tensorrt as trt
else:
    from .library import trt

# A cache with fixed slots gives a block four sets of addresses, see runtime/caches; two requests at a time fit.
GRAPHS_PER_ENGINE = 8
ALIGNMENT = 256  # of every address that a plan is given, see IExecutionContext::setTensorAddress


class TensorRTBackend:
    """Runs the plans of a bundle that were built for this GPU and this TensorRT.

    All engines share one stream, that of `arrays`, and one scratch buffer, as large as the largest needs: on one
    stream no two of them are at work at a time. `cuda_graphs` records an engine's kernels when it is run a second
    time with the same addresses, and replays them from then on; see GRAPHS_PER_ENGINE.
    """

    name: ClassVar[str] = "tensorrt"

    def __init__(self, device: str = "cuda", cuda_graphs: bool = False) -> None:
        arrays = create_arrays(device)
        if not isinstance(arrays, GpuArrays):
            raise InvalidRequest(
                f"device: got {device}, expected cuda or cuda:N, where {self.name} runs; or use backend onnxruntime"
            )
        self.arrays = arrays
        self.cuda_graphs = cuda_graphs
        self.lock = threading.Lock()
        library = use(self.name)
        self.messages = library.messages
        self._gpu = gpu_facts(arrays.device)
        self._target = find_target(self.name, device)
        self._compiled: dict[str, Compiled] = {}  # by their bundles' ids
        self._engines: WeakSet[TensorRTEngine] = WeakSet()
        with arrays.active():
            self._runtime = trt.Runtime(library.logger)
            self.scratch: Array = arrays.empty((0,), "uint8")
            # Graphs are recorded on a stream of their own: on the other one, other threads may be at work.
            self.recorder = arrays.xp.cuda.Stream(non_blocking=True)

    def load(self, bundle: Bundle, part: Part) -> TensorRTEngine:
        """See Backend.load."""
        return self.load_plan(self.compiled(bundle).read_plan(part.name), part)

    def compiled(self, bundle: Bundle) -> Compiled:
        """See Backend.compiled."""
        if bundle.id not in self._compiled:
            self._compiled[bundle.id] = find_compiled(bundle, self.name, self._target)
        return self._compiled[bundle.id]

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
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


class TensorRTRTXBackend(TensorRTBackend):
    """The same for TensorRT-RTX.

    It compiles kernels when a context is made: blocks of one kind share what was compiled.
    """

    name: ClassVar[str] = "tensorrt-rtx"

    def __init__(self, device: str = "cuda", cuda_graphs: bool = False) -> None:
        self._kernels: trt.IRuntimeCache | None = None  # goes before the runtime
        super().__init__(device, cuda_graphs)

    def _context(self, engine: trt.ICudaEngine) -> trt.IExecutionContext:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Kernels that replaced others in the background would change results between two equal requests.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
        config.set_runtime_cache(self._kernels)
        return engine.create_execution_context(config)


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
        self._shapes: tuple[tuple[int, ...], ...] | None = None
        self._outputs: dict[str, tuple[int, ...]] = {}

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


def _shape(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(int(dims[index]) for index in range(len(dims)))
