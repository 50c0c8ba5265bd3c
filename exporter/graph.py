"""A torch module becomes an ONNX graph, without its weights; weights are bound to the graph by name.

torch.onnx folds weights into whatever its optimiser likes: transposed, renamed, merged. Binding another block's
weights to such a graph by name silently computes something else. So while the optimiser works, every parameter is a
graph *input*, which nothing can fold; afterwards the inputs become initializers again, still under the parameter's
own name. The one rewrite wanted on weights, storing a matrix transposed where the graph transposes it, is done here
and recorded. No weight has to be in memory for any of this, however large the module is.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn

from ..engines.errors import ExportError

ALIGNMENT = 4096  # of weights in the data file, so that they can be mapped
INLINE_BYTES = 1024  # constants up to here stay in the graph


@dataclass(frozen=True)
class Weight:
    """An initializer of a graph: the parameter it holds, and whether it is stored transposed."""

    parameter: str
    transposed: bool


@dataclass(frozen=True)
class Graph:
    """An optimised ONNX graph whose initializers `weights` still have to be given their values."""

    model: ir.Model
    weights: Mapping[str, Weight]


def graph_from_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int,
) -> Graph:
    """Trace `module.forward(**inputs)` into a graph.

    `inputs` are examples, no two of them the same object; `outputs` names the results in order; `dynamic` gives the
    named dimensions per input. The values of the parameters are never read. Raises ExportError.
    """
    assert len({id(tensor) for tensor in inputs.values()}) == len(inputs), "one object as two inputs mixes them up"
    names = {dim for dims in dynamic.values() for dim in dims.values()}
    symbols = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in sorted(names)}
    shapes = {name: {axis: symbols[dim] for axis, dim in dynamic.get(name, {}).items()} for name in inputs}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                kwargs=dict(inputs),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise ExportError(f"{type(module).__name__}: torch.onnx cannot export it: {reason}") from error
    assert program is not None
    _merge_tied(program.model, module)
    weights = _optimise(program.model, {name for name, _ in module.named_parameters()})
    return Graph(program.model, weights)


def write_graph(graph: Graph, parameters: Callable[[str], Tensor], path: Path) -> list[Path]:
    """Write `graph` to `path` with the weights that `parameters` returns by name, in a `.data` file beside it.

    One weight at a time is in memory. Returns the files written. The graph can be written again with other weights.
    """
    data = path.with_suffix(".data")
    initializers = graph.model.graph.initializers
    kept = {name: value.const_value for name, value in initializers.items()}
    try:
        with data.open("wb") as file:
            for name, value in initializers.items():
                tensor = _stored(graph, name, kept[name], parameters)
                if tensor is not None:
                    value.const_value = _append(file, tensor, data.name, value)
        ir.save(graph.model, path)
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name}: the graph is not valid ONNX: {error}") from error
    finally:
        for name, value in initializers.items():
            value.const_value = kept[name]
    return [path, data]


def widen(path: Path, target: Path) -> None:
    """Write the graph at `path` with fp32 wherever it has bf16: the same graph for a runtime that has no bf16.

    It shows that a graph computes what it should, but for the rounding of what lies between its operators. `target` is
    in the same folder: weights stay in the file they are in, and become fp32 one by one, each where it is used.
    """
    assert target.parent == path.parent, "the graph's weights are found beside it"
    model = ir.load(path)
    _cast_weights(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *_results(model)):
        if isinstance(value.const_value, ir.ExternalTensor):
            continue
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value = _widened(value.const_value)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.INT and _names_bf16(node, attribute):
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _widened(attribute.value))
    ir.save(model, target)


def _cast_weights(model: ir.Model) -> None:
    """Let whatever reads a bf16 weight of the data file read it as fp32."""
    for weight in model.graph.initializers.values():
        if weight.dtype == ir.DataType.BFLOAT16 and isinstance(weight.const_value, ir.ExternalTensor):
            cast = ir.node("Cast", [weight], {"to": int(ir.DataType.FLOAT)})
            cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, weight.shape
            ir.convenience.replace_all_uses_with(weight, cast.outputs[0])
            cast.replace_input_with(0, weight)
            model.graph.insert_before(model.graph[0], cast)


def _results(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph.all_nodes():
        yield from node.outputs


def _names_bf16(node: ir.Node, attribute: ir.Attr) -> bool:
    names = {"Cast": "to", "Attention": "softmax_precision", "EyeLike": "dtype"}
    return names.get(node.op_type) == attribute.name and attribute.value == int(ir.DataType.BFLOAT16)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _stored(
    graph: Graph, name: str, constant: ir.TensorProtocol | None, parameters: Callable[[str], Tensor]
) -> Tensor | None:
    """What the data file holds for an initializer: a weight or a large constant; None for what stays in the graph."""
    weight = graph.weights.get(name)
    if weight is not None:
        tensor = parameters(weight.parameter).detach()
        return tensor.t() if weight.transposed else tensor
    assert constant is not None, f"{name} has no value"
    if constant.nbytes <= INLINE_BYTES:
        return None
    if constant.dtype == ir.DataType.BFLOAT16:  # torch takes no bf16 from numpy
        return torch.from_numpy(constant.numpy().view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(constant.numpy())


def _append(file: BinaryIO, tensor: Tensor, location: str, value: ir.Value) -> ir.ExternalTensor:
    tensor = tensor.contiguous()
    dtype = tensor_adapters.from_torch_dtype(tensor.dtype)
    assert value.shape is not None and tuple(tensor.shape) == tuple(value.shape.numpy()), value.name
    assert value.dtype == dtype, f"{value.name}: {tensor.dtype} for {value.dtype}"
    raw = tensor.reshape(-1).view(torch.uint8)
    offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(offset)
    file.write(raw.numpy().data)
    shape = ir.Shape(tensor.shape)
    return ir.ExternalTensor(location, offset, raw.numel(), dtype, shape=shape, name=value.name or "", base_dir=".")


def _merge_tied(model: ir.Model, module: nn.Module) -> None:
    """One initializer per parameter, under its first name, whichever of its names the exporter took."""
    initializers = model.graph.initializers
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        wanted = first[id(parameter)]
        if name == wanted or name not in initializers:
            continue
        value = initializers.pop(name)
        if wanted in initializers:
            ir.convenience.replace_all_uses_with(value, initializers[wanted])
        else:
            value.name = wanted
            initializers[wanted] = value


def _optimise(model: ir.Model, parameters: set[str]) -> dict[str, Weight]:
    constants = model.graph.initializers
    demoted = [value for name, value in constants.items() if name in parameters]
    for value in demoted:
        assert value.name is not None
        constants.pop(value.name)
        value.const_value = None
        model.graph.inputs.append(value)
    with _quiet():
        onnxscript.optimizer.optimize(model)
    weights = {}
    for value in demoted:
        assert value.name is not None
        model.graph.inputs.remove(value)
        if not value.uses():
            continue
        transposed = _absorb_transposes(value)
        constants[value.name] = value
        weights[value.name] = Weight(value.name, transposed)
    _strip_notes(model)
    return weights


def _strip_notes(model: ir.Model) -> None:
    """Drop what the exporter notes for its own debugging: stack traces with the paths of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _absorb_transposes(value: ir.Value) -> bool:
    """Where every use of a matrix is its transpose, let the initializer be that transpose."""
    nodes = [node for node, _ in value.uses()]
    if value.shape is None or len(value.shape) != 2 or not all(_is_plain_transpose(node) for node in nodes):
        return False
    for node in nodes:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    value.shape = ir.Shape(list(reversed(value.shape.dims)))
    return True


def _is_plain_transpose(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and list(perm.as_ints()) == [1, 0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's advice to its own developers away from our users; failures still raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
