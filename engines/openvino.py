"""OpenVINO: the CPU, where it also runs bundles in bf16, and Intel GPUs.

On a CPU it computes as the graph says: bf16 where that has bf16, which processors with such instructions multiply about
twice as fast, and fp32 where that has fp32. Left to itself it would compute all of it in bf16 on these processors, a
bundle in fp32 too, and timesteps, of which bf16 cannot tell 977 from 976; so it is told never to go below a graph's own
types. On processors without such instructions it computes bf16 in fp32. fp16 it computes in fp32 nearly everywhere.

Every run has a request of its own, which takes microseconds to make and knows nothing of earlier ones; those of one
engine run one after the other, in the scratch of that engine. It is given back when the last is done: a bundle has
dozens of engines, of which one is at work. A short run takes place in the caller's thread. One that takes long takes
place in its engine's, where it can be ended; the C library would keep much of what was freed there for that thread
alone, but not what is large. Others that help are of one pool of the process; they sleep while there is nothing to do,
and the system places them: other processes need the cores too.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Array, Arrays, create_arrays, numpy_dtype
from .backend import check_ends
from .bundle import Bundle
from .cores import engine_threads
from .errors import Cancelled, EngineError, InvalidRequest, OutOfMemory, one_line
from .interrupt import stoppable
from .manifest import Part, TensorSpec

TELEMETRY = "openvino_telemetry"
LONG_SECONDS = 0.25
DEVICE = re.compile(r"cpu|gpu(:\d+)?")
TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int64": "i64", "uint8": "u8", "bool": "boolean"}
# It raises little else; LookupError where a tensor is not there, ValueError for texts in a graph that are no Unicode.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, LookupError)
SOURCE = re.compile(r"Exception from \S+:\d+:|Check '[^']*' failed at \S+:\d+:")  # of its own, in its messages


class OpenVinoBackend:
    """Runs a bundle's ONNX graphs as they are; arrays are the host's in any case.

    `threads` is the number of threads a block may use on the CPU (default: the cores this process may use, up to 16).
    What it multiplies with it repacks, so that weights are there twice; with `shared_weights` the first of the two are
    mapped from the bundle, and processes which serve the same one share them.
    """

    name = "openvino"

    def __init__(self, device: str = "cpu", threads: int | None = None, shared_weights: bool = False) -> None:
        if not DEVICE.fullmatch(device):
            raise InvalidRequest(
                f"device: got {device!r}, expected cpu, gpu or gpu:N, where {self.name} runs; use device cpu, or "
                "another backend"
            )
        self.threads = engine_threads(threads)
        self.arrays = create_arrays("cpu")
        self.device = device
        self._library = _openvino()
        self._core = self._library.Core()
        self._target = device.upper().replace(":", ".")
        try:
            able = self._core.get_property(self._target, "OPTIMIZATION_CAPABILITIES")
        except FAILURES as error:
            raise EngineError(
                f"device {device}: OpenVINO has no such device here, {_reason(error)}; use device cpu, "
                "or check the driver"
            ) from error
        self._bf16 = "bf16" if "BF16" in able else "fp32"
        # Only where asked for: what is mapped ends the process when somebody truncates the file.
        self._core.set_property({"ENABLE_MMAP": shared_weights})

    def load(self, bundle: Bundle, part: Part) -> OpenVinoEngine:
        """See Backend.load."""
        return self.load_graph(bundle.file(part.graph), part)

    def load_graph(self, graph: Path, part: Part) -> OpenVinoEngine:
        """The engine of a graph that lies in no bundle, or not yet. Raises EngineError."""
        try:
            model = self._core.read_model(str(graph))
            inputs, outputs = (
                [name for end in ends for name in end.get_names()] for ends in (model.inputs, model.outputs)
            )
            check_ends(part, inputs, outputs)
            compiled = self._core.compile_model(model, self._target, self._properties())
        except MemoryError as error:
            raise OutOfMemory(f"{part.name}: no memory is left to load {part.graph}; close others first") from error
        except FAILURES as error:
            raise EngineError(f"{part.name}: OpenVINO cannot load {graph.name}: {_reason(error)}") from error
        return OpenVinoEngine(self._library, compiled, part, self.arrays)

    def _properties(self) -> dict[str, Any]:
        common = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
        if self.device != "cpu":
            return {**common, "INFERENCE_PRECISION_HINT": "dynamic"}  # each type as it is in the graph
        return {
            **common,
            "INFERENCE_PRECISION_HINT": "f32",  # what is fp32 stays it; bf16 stays bf16
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }

    def compiled(self, bundle: Bundle) -> None:
        """See Backend.compiled."""

    def trim(self) -> None:
        """See Backend.trim. Scratch goes with its engine."""
        self.arrays.trim()

    def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        described = {
            "backend": self.name,
            "version": str(self._library.__version__).partition("-")[0],
            "device": self.device,
            "bf16": f"computed in {self._bf16}",
        }
        return described | ({"threads": str(self.threads)} if self.device == "cpu" else {})


class OpenVinoEngine:
    """One compiled graph; inputs and outputs are bound by address, so nothing is copied on the CPU."""

    def __init__(self, library: Any, compiled: Any, part: Part, arrays: Arrays) -> None:
        self._library = library
        self._compiled = compiled
        self._part = part
        self._arrays = arrays
        self._lock = threading.Lock()
        self._running = 0
        self._last_seconds = 0.0  # of its last run, by which the next one goes

    def run(self, tensors: Mapping[str, Array]) -> None:
        """See Engine.run."""
        name = self._part.name
        try:
            with self._scratch():
                shapes = self._infer(tensors)
        except MemoryError as error:
            raise OutOfMemory(f"{name}: no memory is left to run it; send fewer requests") from error
        except FAILURES as error:
            raise EngineError(f"{name}: OpenVINO failed: {_reason(error)}") from error
        for output, shape in shapes.items():
            if tensors[output].shape != shape:
                raise EngineError(f"{name}: got an array {tensors[output].shape} for {output}, expected {shape}")

    def _infer(self, tensors: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        """Run it; returns the shapes of what it made. Raises Cancelled, FAILURES, MemoryError."""
        request = self._compiled.create_infer_request()
        for spec in (*self._part.inputs, *self._part.outputs):
            request.set_tensor(spec.name, self._bound(tensors[spec.name], spec))
        with stoppable(request.cancel) as run:
            started = time.monotonic()
            try:
                if self._last_seconds > LONG_SECONDS:
                    request.start_async()
                    request.wait()
                else:
                    request.infer(share_outputs=True)
                self._last_seconds = time.monotonic() - started
            except FAILURES as error:
                if run.stopped:
                    raise Cancelled(f"request: cancelled while {self._part.name} ran") from error
                raise
        return {spec.name: tuple(request.get_tensor(spec.name).shape) for spec in self._part.outputs}

    @contextmanager
    def _scratch(self) -> Iterator[None]:
        """Scratch for what runs inside, which is given back when no other thread is inside."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._compiled.release_memory()

    def _bound(self, array: Array, spec: TensorSpec) -> Any:
        """The array's own memory as a tensor, which outlives no run."""
        dtype = numpy_dtype(spec.dtype)
        assert array.dtype == dtype, f"{self._part.name}: {spec.name} is {array.dtype}, not {dtype}"
        # By address: bindings know no bf16, and refuse what may not be written to, inputs too.
        memory = (ctypes.c_ubyte * array.nbytes).from_address(self._arrays.address(array))
        library = self._library
        shape = library.Shape(list(array.shape))
        return library.Tensor(np.frombuffer(memory, np.uint8), shape, getattr(library.Type, TYPES[spec.dtype]))


def _openvino() -> Any:
    """The library. Raises EngineError where it is not installed."""
    try:
        with _unobserved():
            import openvino
    except ImportError as error:
        raise EngineError(
            f'openvino: OpenVINO is not installed ({one_line(error)}); pip install "foresight-engines[openvino]"'
        ) from error
    return openvino


@contextmanager
def _unobserved() -> Iterator[None]:
    """While it is imported, OpenVINO tells its makers so, unless the package that does it is missing."""
    if TELEMETRY in sys.modules:  # whoever imported it before us wants it
        yield
        return
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]


def _reason(error: Exception) -> str:
    """What OpenVINO says, without where in its sources."""
    return one_line(SOURCE.sub("", str(error)))
