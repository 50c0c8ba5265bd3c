"""A TensorRT that is none: what this project uses of its interface, computed by ONNX Runtime on the simulated GPU.

A plan is the ONNX graph. What a context is told is checked as the library would, and more strictly: every address
has to lie in memory that is still there, outputs may not overlap inputs, and the scratch is full of garbage after each
run. Not simulated: kernels, their precision and speed, what the builder refuses.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from tests.simulation.gpu import GARBAGE, Stream, use_memory

MAGIC = b"simulated plan\n"
ALIGNMENT = 256  # as IExecutionContext::setTensorAddress asks for


class ILogger:
    """Told what goes wrong."""

    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


class Dims(tuple[int, ...]):
    """A shape."""

    __slots__ = ()


float32 = onnx.TensorProto.FLOAT


class ActivationType(IntEnum):
    RELU = 0


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    TF32 = 0


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(IntEnum):
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    EAGER = 1


class _Tensor:
    def __init__(self, name: str) -> None:
        self.name = name
        self.shape: Dims = Dims()


class _Network:
    num_layers = 0

    def __init__(self) -> None:
        self.inputs: list[_Tensor] = []
        self.model: onnx.ModelProto
        self.types: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def add_input(self, name: str, dtype: int, shape: Dims) -> _Tensor:
        tensor = self._tensor(name, dtype, shape)
        self.inputs.append(tensor)
        return tensor

    def add_activation(self, tensor: _Tensor, kind: ActivationType) -> _Layer:
        output = self._tensor(f"{kind.name}_{tensor.name}", self.types[tensor.name], tensor.shape)
        self._nodes.append(helper.make_node(kind.name.capitalize(), [tensor.name], [output.name]))
        return _Layer(output)

    def mark_output(self, tensor: _Tensor) -> None:
        ends = [
            helper.make_tensor_value_info(end.name, self.types[end.name], end.shape) for end in (*self.inputs, tensor)
        ]
        graph = helper.make_graph(self._nodes, "layers", ends[:-1], ends[-1:])
        self.model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])

    def _tensor(self, name: str, dtype: int, shape: Dims) -> _Tensor:
        tensor = _Tensor(name)
        tensor.shape = shape
        self.types[name] = dtype
        return tensor


class _Layer:
    def __init__(self, output: _Tensor) -> None:
        self._output = output

    def get_output(self, index: int) -> _Tensor:
        assert index == 0
        return self._output


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Dims, Dims, Dims]] = {}

    def set_shape(self, name: str, low: Dims, usual: Dims, high: Dims) -> None:
        self.shapes[name] = (low, usual, high)


class _TimingCache:
    def __init__(self, known: bytes) -> None:
        self._known = known

    def serialize(self) -> bytes:
        return self._known or b"timings"


class _Config:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.max_aux_streams: int | None = None
        self.profile = _Profile()
        self._cache = _TimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        pass

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        pass

    def create_timing_cache(self, known: bytes) -> _TimingCache:
        return _TimingCache(known)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> None:
        self._cache = cache

    def get_timing_cache(self) -> _TimingCache:
        return self._cache

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profile = profile
        return 0


class Builder:
    """Makes plans."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> _Network:
        assert flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        graph = network.model.graph
        scratch = ALIGNMENT * (1 + len(graph.node))
        need = f"Total Activation Memory: {scratch} bytes"  # as the library says it
        self._logger.log(ILogger.Severity.INFO, need)
        fixed = {tensor.name: (tensor.shape,) * 3 for tensor in network.inputs if -1 not in tensor.shape}
        header = {
            "profile": fixed | config.profile.shapes,
            "types": network.types,
            "scratch": scratch,
            "level": config.builder_optimization_level,
        }
        model: bytes = network.model.SerializeToString(deterministic=True)
        return MAGIC + json.dumps(header).encode() + b"\n" + model


class _ParserError:
    def __init__(self, reason: str) -> None:
        self._reason = reason

    def desc(self) -> str:
        return self._reason

    def node_name(self) -> str:
        return ""

    def node_operator(self) -> str:
        return ""


class OnnxParser:
    """Reads a graph with its weights."""

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network = network
        self._errors: list[_ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _ParserError:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        try:
            self._read(Path(path))
        except Exception as error:  # noqa: BLE001 - of libraries that have many
            self._errors.append(_ParserError(str(error)))
        return not self._errors

    def _read(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self._network.types = {
            tensor.name: tensor.type.tensor_type.elem_type for tensor in (*graph.input, *graph.output)
        }
        self._network.inputs = [_Tensor(tensor.name) for tensor in graph.input]
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="wide-", suffix=".onnx") as wide:
            readable = path
            if _has_bf16(graph):  # ONNX Runtime has no kernels for it on a CPU
                from foresight.exporter.graph import widen  # imports torch

                readable = Path(wide.name)
                widen(path, readable)
            self._network.model = onnx.load(readable)
        _session(self._network.model.SerializeToString())  # what it refuses cannot be run


def _has_bf16(graph: onnx.GraphProto) -> bool:
    types = [tensor.data_type for tensor in graph.initializer]
    types += [tensor.type.tensor_type.elem_type for tensor in (*graph.input, *graph.output)]
    return onnx.TensorProto.BFLOAT16 in types


def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Runtime:
    """Reads plans."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if not plan.startswith(MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "the plan's magic number is wrong")
            return None
        header, _, model = plan.removeprefix(MAGIC).partition(b"\n")
        return _Engine(self._logger, json.loads(header), model)


class _RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> None:
        pass


class _Engine:
    def __init__(self, logger: ILogger, header: dict[str, Any], model: bytes) -> None:
        self.logger = logger
        self.session = _session(model)
        self.profile = {name: [tuple(shape) for shape in shapes] for name, shapes in header["profile"].items()}
        self.types = {name: np.dtype(helper.tensor_dtype_to_np_dtype(kind)) for name, kind in header["types"].items()}
        self.device_memory_size_v2 = int(header["scratch"])
        self.inputs = {tensor.name: tuple(tensor.shape) for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tuple(tensor.shape) for tensor in self.session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return str([*self.inputs, *self.outputs][index])

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | _RuntimeConfig | None = None
    ) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def _refuse(self, reason: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, reason)
        return False

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        low, _, high = self._engine.profile[name]
        fits = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if not fits:
            return self._refuse(f"{name}: {tuple(shape)} is not within {low} and {high}")
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        sizes: dict[str, int] = {}
        for given, dims in self._engine.inputs.items():
            sizes |= {dim: n for dim, n in zip(dims, self._shapes[given], strict=True) if isinstance(dim, str)}
        # an output's dimension may be computed, as "2*height" is
        return Dims(dim if isinstance(dim, int) else eval(dim, {}, sizes) for dim in self._engine.outputs[name])

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % ALIGNMENT == 0 and size >= self._engine.device_memory_size_v2
        self._scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        time.sleep(0)  # others get their chance to interfere
        if address % ALIGNMENT:
            return self._refuse(f"{name}: the address {address} is not a multiple of {ALIGNMENT}")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shapes = self._shapes | {name: tuple(self.get_tensor_shape(name)) for name in self._engine.outputs}
        addresses, scratch = dict(self._addresses), self._scratch
        if addresses.keys() != shapes.keys():
            return self._refuse(f"no address for {', '.join(shapes.keys() - addresses.keys())}")
        Stream.by_number[stream].launch(lambda on: self._engine_run(on, shapes, addresses, scratch))
        return True

    def _engine_run(
        self,
        stream: Stream,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> None:
        engine = self._engine
        found = {
            name: use_memory(addresses[name], math.prod(shape) * engine.types[name].itemsize, stream)
            for name, shape in shapes.items()
        }
        for name in engine.outputs:
            others = [array for other, array in found.items() if other != name]
            assert not any(np.shares_memory(found[name], other) for other in others), f"{name} overlaps another tensor"
        tensors = {name: array.view(engine.types[name]).reshape(shapes[name]) for name, array in found.items()}
        results = engine.session.run(
            list(engine.outputs), {name: _wide(tensors[name]).copy() for name in engine.inputs}
        )
        use_memory(*scratch, stream)[...] = GARBAGE
        for name, result in zip(engine.outputs, results, strict=True):
            assert result.shape == shapes[name], f"{name} is {result.shape}, not {shapes[name]}"
            tensors[name][...] = result.astype(engine.types[name])


def _wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array
