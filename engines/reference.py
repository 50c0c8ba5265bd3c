"""The ONNX standard's own definition of every operator, in numpy: a second opinion that no optimiser has touched.

Slow, on the CPU only, and part of the package onnx, which exports need anyway: meant for checking other backends.

A graph in 16 bits is computed in fp32, and only what it hands out is rounded: that tells how far a backend's rounding
takes it from the true values, where rounding in another order would only tell that the two differ. It is also
necessary: the evaluator normalises layers in the type of its input, although the standard says fp32, so large fp16
values become zeros; and numpy multiplies 16-bit matrices one number at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array, HostArray, create_arrays, numpy_dtype
from .bundle import Bundle
from .errors import EngineError, InvalidRequest, one_line
from .manifest import Part

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto
    from onnx.reference import ReferenceEvaluator

# What numpy and the operators raise on values or shapes they cannot take; they share no base class but Exception.
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
NARROW = ("fp16", "bf16")
NAMES_A_TYPE = {"Cast": "to", "Attention": "softmax_precision", "EyeLike": "dtype"}  # operator -> its attribute


class ReferenceBackend:
    """Runs a bundle's ONNX graphs with onnx.reference, in as many threads as numpy's own libraries decide."""

    name = "reference"

    def __init__(self, device: str = "cpu") -> None:
        if device != "cpu":
            raise InvalidRequest(
                f"device: got {device}, expected cpu, where {self.name} runs; use device cpu, or another backend"
            )
        try:
            import onnx.reference
        except ImportError as error:
            raise EngineError(
                f'{self.name}: onnx is not installed ({one_line(error)}); pip install "foresight-engines[export]"'
            ) from error
        self.arrays = create_arrays(device)
        self._version: str = onnx.__version__

    def load(self, bundle: Bundle, part: Part) -> ReferenceEngine:
        """See Backend.load."""
        return self.load_graph(bundle.file(part.graph), part)

    def load_graph(self, graph: Path, part: Part) -> ReferenceEngine:
        """The engine of a graph that lies in no bundle, or not yet. Raises EngineError."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        invalid: tuple[type[Exception], ...] = (
            onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError,
            *FAILURES,
        )
        try:
            onnx.checker.check_model(str(graph), full_check=True)
            model = onnx.load(graph, load_external_data=False)
            weights = _take_weights(model, graph.parent)
            _widen(model)
            return ReferenceEngine(ReferenceEvaluator(model), weights, part)
        except invalid as error:
            raise EngineError(f"{part.name}: {self.name} cannot load {graph.name}: {one_line(error)}") from error

    def compiled(self, bundle: Bundle) -> None:
        """See Backend.compiled."""

    def trim(self) -> None:
        """See Backend.trim. Nothing is kept."""

    def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        return {"backend": self.name, "version": self._version, "device": self.arrays.device}


class ReferenceEngine:
    """One graph and its weights, which are given to it like inputs."""

    def __init__(self, evaluator: ReferenceEvaluator, weights: Mapping[str, HostArray], part: Part) -> None:
        self._evaluator = evaluator
        self._weights = weights
        self._part = part

    def run(self, tensors: Mapping[str, Array]) -> None:
        """See Engine.run."""
        name, specs = self._part.name, self._part.outputs
        for spec in (*self._part.inputs, *specs):
            got, dtype = tensors[spec.name].dtype, numpy_dtype(spec.dtype)
            assert got == dtype, f"{name}: {spec.name} is {got}, not {dtype}"
        feed = {spec.name: _input(tensors[spec.name], spec.dtype) for spec in self._part.inputs}
        try:
            with np.errstate(all="ignore"):  # infinities may be meant; they are for the caller to judge
                results = self._evaluator.run([spec.name for spec in specs], {**self._weights, **feed})
                for spec, result in zip(specs, results, strict=True):
                    if result.shape != tensors[spec.name].shape:
                        raise EngineError(
                            f"{name}: got an array {tensors[spec.name].shape} for {spec.name}, expected {result.shape}"
                        )
                    np.copyto(tensors[spec.name], result, casting="same_kind")
        except FAILURES as error:
            raise EngineError(f"{name}: the reference failed: {one_line(error)}") from error


def _input(array: HostArray, dtype: str) -> HostArray:
    """What the graph computes with; not the caller's to write to."""
    values = array.astype(np.float32) if dtype in NARROW else array.view()
    values.flags.writeable = False
    return values


def _take_weights(model: ModelProto, folder: Path) -> dict[str, HostArray]:
    """Read the initializers and take them out of the graph, so that one copy of each is in memory."""
    from onnx import numpy_helper

    weights = {}
    for tensor in model.graph.initializer:
        name, narrow = tensor.name, _is_narrow(tensor.data_type)
        values = numpy_helper.to_array(tensor, str(folder))
        tensor.Clear()
        weights[name] = values.astype(np.float32) if narrow else values
    del model.graph.initializer[:]
    return weights


def _widen(model: ModelProto) -> None:
    """Let the graph name fp32 wherever it names a type of 16 bits."""
    from onnx import AttributeProto, TensorProto

    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if _is_narrow(value.type.tensor_type.elem_type):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.name == NAMES_A_TYPE.get(node.op_type) and _is_narrow(attribute.i):
                attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: TensorProto) -> None:
    from onnx import numpy_helper

    if _is_narrow(tensor.data_type):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _is_narrow(data_type: int) -> bool:
    from onnx import TensorProto

    return data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
