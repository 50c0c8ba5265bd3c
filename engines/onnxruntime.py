"""ONNX Runtime: the CPU, which is the embedded default, and NVIDIA GPUs through its CUDA provider.

All sessions of a process share one arena of memory: a bundle has dozens of them, and an arena for each would keep
dozens of times the scratch that one block needs. Each has threads of its own, which sleep while it does not run. One
pool for all would be fewer threads, but a process that has such a pool refuses every session that does not ask for it,
and those of other libraries do not. Where another library has made such a pool, sessions run in that: there is no other
way. On a GPU the sessions share its stream as well.

A session that reads weights by itself maps them, and keeps mapped what it does not repack: whoever truncates the file
then ends the process, and whoever writes to it changes results. So it is given the bytes that were verified, unless
processes are to share them.
"""

from __future__ import annotations

import ctypes
import io
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from .arrays import Array, Arrays, GpuArrays, create_arrays, numpy_dtype
from .backend import check_ends
from .bundle import Bundle
from .cores import engine_threads
from .errors import Cancelled, EngineError, InvalidRequest, OutOfMemory, one_line
from .interrupt import is_watched, stoppable
from .manifest import Part, part_files

ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16, for which numpy has no type that bindings know

# Since 1.24. Before, what is not repacked stays mapped.
TAKES_WEIGHTS = hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory")

HAS_GLOBAL_POOL = "use_per_session_threads must be false"

# These share no base class but Exception. ValueError: texts in a graph that are no Unicode.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(
        error
        for error in vars(native).values()
        if isinstance(error, type) and issubclass(error, Exception) and error.__module__ == native.__name__
    ),
    RuntimeError,
    ValueError,
)


class OnnxRuntimeBackend:
    """Runs a bundle's ONNX graphs as they are.

    `threads` is the number of threads a block may use (default: the cores this process may use, up to 16); each engine
    has as many, the caller's own among them. `optimize=False` runs graphs without ONNX Runtime's own rewriting and
    repacking of weights, which starts faster and needs less memory: meant for checking an export. `shared_weights`
    leaves weights as they are, mapped from the bundle, so that processes which serve the same one share them.
    """

    name = "onnxruntime"

    def __init__(
        self,
        device: str = "cpu",
        threads: int | None = None,
        shared_weights: bool = False,
        optimize: bool = True,
    ) -> None:
        self.threads = engine_threads(threads)
        self.arrays = create_arrays(device)
        if shared_weights and self.arrays.kind != "cpu":
            raise InvalidRequest(f"shared_weights: got {device}, expected cpu: a GPU has weights of its own")
        self.shared_weights = shared_weights
        self._optimize = optimize
        self._own_threads = True
        self._provider: Any = "CPUExecutionProvider"
        _share_arena()
        if isinstance(self.arrays, GpuArrays):
            self.threads = 1  # the device computes
            self.arrays = _share_gpu(self.arrays)
            self._provider = ("CUDAExecutionProvider", _cuda_options(self.arrays))

    def load(self, bundle: Bundle, part: Part) -> OnnxRuntimeEngine:
        """See Backend.load."""
        if self.shared_weights or not TAKES_WEIGHTS:
            return self.load_graph(bundle.file(part.graph), part)
        graph, weights = part_files(part)
        return self._load(bundle.read(graph), part, {weights: bundle.read(weights)})

    def load_graph(self, graph: Path, part: Part) -> OnnxRuntimeEngine:
        """The engine of a graph that lies in no bundle, or not yet. Raises EngineError."""
        return self._load(str(graph), part, {})

    def _load(self, graph: str | bytes, part: Part, weights: Mapping[str, bytes]) -> OnnxRuntimeEngine:
        if self.arrays.kind == "cpu" and any(spec.dtype == "bf16" for spec in (*part.inputs, *part.outputs)):
            raise EngineError(
                f"{part.name}: got bf16, which ONNX Runtime cannot run on a CPU, expected fp32 or fp16; use backend "
                "openvino or a GPU, or export again with such a dtype"
            )
        try:
            session = self._session(graph, weights)
            inputs, outputs = ([end.name for end in ends] for ends in (session.get_inputs(), session.get_outputs()))
        except MemoryError as error:
            raise OutOfMemory(f"{part.name}: no memory is left to load {part.graph}; close others first") from error
        except ORT_ERRORS as error:
            raise EngineError(f"{part.name}: ONNX Runtime cannot load {part.graph}: {one_line(error)}") from error
        check_ends(part, inputs, outputs)
        _Process.sessions.add(session)
        got = session.get_providers()[0]
        expected = self._provider if isinstance(self._provider, str) else self._provider[0]
        if got != expected:
            raise EngineError(
                f"{part.name}: got {got}, expected {expected}; install onnxruntime-gpu for this CUDA version, and "
                "without onnxruntime, which shares its folder; or use device cpu"
            )
        return OnnxRuntimeEngine(session, part, self.arrays)

    def _session(self, graph: str | bytes, weights: Mapping[str, bytes]) -> ort.InferenceSession:
        """Raises ORT_ERRORS."""
        # Without its own fallback, which prints and then loads for another device.
        try:
            return ort.InferenceSession(graph, self._options(weights), [self._provider], enable_fallback=0)
        except ORT_ERRORS as error:
            if HAS_GLOBAL_POOL not in str(error) or not self._own_threads:
                raise
        # The process got a pool for all sessions, from another library: with the arena gone, if it was there before.
        _share_arena(anew=True)
        self._own_threads = False
        return ort.InferenceSession(graph, self._options(weights), [self._provider], enable_fallback=0)

    def _options(self, weights: Mapping[str, bytes]) -> ort.SessionOptions:
        """For one session: it copies what it needs of `weights`, the content of the files that its graph names."""
        options = ort.SessionOptions()
        options.use_per_session_threads = self._own_threads
        options.intra_op_num_threads = self.threads if self._own_threads else 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others need the cores meanwhile
        if _Process.inherited:
            options.enable_cpu_mem_arena = False
        else:
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.log_severity_level = 3
        if not self._optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not self._optimize or self.shared_weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.arrays.kind == "cuda":  # past the arena, which would keep them when their engine goes
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if weights:
            options.add_external_initializers_from_files_in_memory(
                list(weights), list(weights.values()), [len(content) for content in weights.values()]
            )
        return options

    def compiled(self, bundle: Bundle) -> None:
        """See Backend.compiled."""

    def trim(self) -> None:
        """See Backend.trim. The arena keeps what it has, for the next engines."""
        self.arrays.trim()

    def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        return {
            "backend": self.name,
            "version": ort.__version__,
            "device": self.arrays.device,
            "threads": str(self.threads) if self._own_threads else "the process's pool",
        }


class OnnxRuntimeEngine:
    """One session; inputs and outputs are bound by address, so nothing is copied.

    Inside a watch a run has options of its own, by which the watch can end it and no other.

    On a GPU a run is enqueued on the stream of the arrays and not waited for. Runs of one session are enqueued one
    after the other, so that its scratch is used in the order of the stream.
    """

    def __init__(self, session: ort.InferenceSession, part: Part, arrays: Arrays) -> None:
        self._session = session
        self._part = part
        self._arrays = arrays
        self._run_options = _run_options(arrays)
        self._turn: AbstractContextManager[Any] = threading.Lock() if arrays.kind == "cuda" else nullcontext()

    def run(self, tensors: Mapping[str, Array]) -> None:
        """See Engine.run."""
        binding = self._session.io_binding()
        for bind, specs in ((binding.bind_input, self._part.inputs), (binding.bind_output, self._part.outputs)):
            for spec in specs:
                array = tensors[spec.name]
                dtype = numpy_dtype(spec.dtype)
                assert array.dtype == dtype, f"{self._part.name}: {spec.name} is {array.dtype}, not {dtype}"
                bind(  # cannot fail: names were compared when it was loaded
                    spec.name,
                    self._arrays.kind,
                    self._arrays.index,
                    ONNX_BFLOAT16 if spec.dtype == "bf16" else dtype.type,
                    array.shape,
                    self._arrays.address(array),
                )
        options = _run_options(self._arrays) if is_watched() else self._run_options
        run = None
        try:
            with self._turn, stoppable(lambda: setattr(options, "terminate", True)) as run:
                self._session.run_with_iobinding(binding, options)
        except MemoryError as error:
            raise OutOfMemory(f"{self._part.name}: no memory is left to run it; send fewer requests") from error
        except ORT_ERRORS as error:
            if run is not None and run.stopped:
                raise Cancelled(f"request: cancelled while {self._part.name} ran") from error
            raise EngineError(f"{self._part.name}: ONNX Runtime failed: {one_line(error)}") from error


def _run_options(arrays: Arrays) -> ort.RunOptions:
    options = ort.RunOptions()
    if arrays.kind == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _cuda_options(arrays: GpuArrays) -> dict[str, str]:
    return {
        "device_id": str(arrays.index),
        "user_compute_stream": str(arrays.stream.ptr),
        "use_tf32": "0",  # fp32 means fp32
    }


class _Process:
    """What all sessions of this process share."""

    lock = threading.Lock()
    has_arena = False
    inherited = False  # the arena, by a fork: whoever used it then may have locked it for ever
    sessions: ClassVar[WeakSet[ort.InferenceSession]] = WeakSet()
    gpus: ClassVar[dict[int, GpuArrays]] = {}


def _share_arena(anew: bool = False) -> None:
    """Make the process's one arena of host memory, if there is none yet."""
    with _Process.lock:
        if anew or not _Process.has_arena:
            memory = native.OrtMemoryInfo(
                "Cpu", native.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, native.OrtMemType.DEFAULT
            )
            with suppress(*ORT_ERRORS):  # another library has made one: that is shared then
                native.create_and_register_allocator(memory, None)
            _Process.has_arena = True


def _forked() -> None:
    """In a child: what it has inherited is never freed, as that is to wait for threads which are not there."""
    _Process.lock = threading.Lock()
    if not _Process.has_arena:
        return
    _Process.inherited = True
    for session in list(_Process.sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    # The library's own globals wait for threads as well, when the process ends. They went last anyway: leave them out.
    # Such functions run in turn, the newest first, and get the exit status.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit") and hasattr(libc, "fcloseall"):
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _share_gpu(arrays: GpuArrays) -> GpuArrays:
    """Make the process's one arena on a GPU; returns the arrays, and with them the stream, of all its sessions there.

    A run gives scratch back before the GPU is done with it. The next that takes it must be in line behind it.
    """
    index = arrays.index
    with _Process.lock:
        if index in _Process.gpus:
            return _Process.gpus[index]
        with redirect_stdout(io.StringIO()):  # it prints what it does not find; the provider then says so as well
            ort.preload_dlls()  # what pip installed of CUDA, where the provider does not look
        memory = native.OrtMemoryInfo(
            "Cuda", native.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, native.OrtMemType.DEFAULT
        )
        try:
            native.create_and_register_allocator_v2(
                "CUDAExecutionProvider",
                memory,
                {"device_id": str(index)},
                native.OrtArenaCfg({"arena_extend_strategy": 1}),  # by what is asked for, not by powers of two
            )
        except ORT_ERRORS as error:
            raise EngineError(
                f"device cuda:{index}: ONNX Runtime cannot use it: {one_line(error)}; install onnxruntime-gpu for this "
                "CUDA version, and without onnxruntime, which shares its folder; or use device cpu"
            ) from error
        _Process.gpus[index] = arrays
        return arrays
