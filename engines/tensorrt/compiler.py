"""From an ONNX graph to a plan, in this process; engines/build.py gives every plan a process of its own.

Not with polygraphy's loaders: those print what the parser complains about and raise without it, and choose between the
libraries once, when polygraphy is imported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..arrays import select_device
from ..errors import EngineError, InvalidRequest, one_line
from ..files import write_atomically
from ..manifest import Manifest, Part, largest_sizes
from .library import EDITIONS, Library, strongly_typed, use

if TYPE_CHECKING:
    import tensorrt as trt
else:
    from .library import trt

Shape = tuple[int, ...]
# Input name -> its smallest, usual and largest shape: what the library calls an optimisation profile.
ShapeRanges = Mapping[str, tuple[Shape, Shape, Shape]]

NO_FUSED_KERNEL = "not supported by a dedicated kernel"


@dataclass(frozen=True)
class BuildSettings:
    """How plans are built. `level` is the library's optimisation level, 0 to 5.

    `workspace_bytes` is the most scratch that a plan may need (None: all that the device has). With `split_guidance`
    the transformer takes the rows of one half of a guided batch, and needs half the scratch.
    """

    level: int = 3
    workspace_bytes: int | None = None
    split_guidance: bool = False

    def describe(self) -> dict[str, str]:
        """As an index keeps it: plans built with other settings are other plans."""
        told = {name: str(value) for name, value in asdict(self).items()}
        if not self.split_guidance:  # which older indices do not mention
            del told["split_guidance"]
        return told

    def ranges(self, manifest: Manifest, part: Part) -> dict[str, tuple[int, int]]:
        """The sizes of every named dimension that a part is built for."""
        in_steps = any(part in expert.transformer for expert in manifest.experts)
        if not (self.split_guidance and in_steps):
            return manifest.ranges
        return manifest.ranges | {"batch": (1, manifest.shape.max_batch)}

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


def shape_ranges(part: Part, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The shapes a part is built for. The usual batch is one guided prompt, which has two rows."""
    low = {name: smallest for name, (smallest, _) in ranges.items()}
    high = largest_sizes(ranges)
    usual = high | {"batch": min(2, high["batch"])}
    return {spec.name: (spec.resolve(low), spec.resolve(usual), spec.resolve(high)) for spec in part.inputs}


def build_plan(
    backend: str,
    graph: Path,
    shapes: ShapeRanges,
    settings: BuildSettings,
    timing_cache: Path | None = None,
    device: str = "cuda",
) -> Plan:
    """Compile an ONNX graph, its weights beside it, for this machine, and where that matters for this of its GPUs.

    Attention is one fused kernel where the library has one for its type and shape. Where it has none (fp32 never
    has), attention is taken apart and its scores take memory, which `Plan.fused_attention` says. `timing_cache` is
    read and written where given: equal layers are then tuned once. Raises EngineError with the library's reason.
    """
    library = use(backend)
    messages = library.messages
    started = time.perf_counter()
    if EDITIONS[backend].needs_gpu:  # it compiles for the one that this thread works with
        select_device(device)
    data, attentions = None, 0
    for decompose in (False, True):
        messages.rows.clear()
        data, attentions = _build(library, graph, shapes, settings, timing_cache, decompose)
        if data is not None or NO_FUSED_KERNEL not in messages.errors():
            break
    if data is None:
        raise EngineError(f"{graph.stem}: {backend} cannot build {graph.name}: {messages.errors()}")
    scratch = messages.scratch_bytes()
    if scratch is None:
        raise EngineError(f"{graph.stem}: {backend} built {graph.name} without saying how much memory it needs")
    fused = not decompose if attentions else None
    return Plan(data, scratch, fused, round(time.perf_counter() - started, 2))


def _build(
    library: Library,
    graph: Path,
    shapes: ShapeRanges,
    settings: BuildSettings,
    timing_cache: Path | None,
    decompose: bool,
) -> tuple[bytes | None, int]:
    """The plan, unless the library fails, and how many attentions the graph has as one operator."""
    # Builder, network and parser stay referenced until the end: the library crashes on a collected one.
    builder = trt.Builder(library.logger)
    network = builder.create_network(strongly_typed())
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(f"{graph.stem}: {library.backend} cannot read {graph.name}: {_reasons(parser)}")
    config = _configure(builder, settings, timing_cache)
    if config.add_optimization_profile(_set_shapes(builder, network, shapes, graph)) < 0:
        raise EngineError(f"{graph.stem}: {library.messages.errors()} (shapes {dict(shapes)})")
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


def _reasons(parser: trt.OnnxParser) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return one_line(
        "; ".join(f"{error.desc()} (node {error.node_name()!r}, a {error.node_operator()})" for error in errors)
    )


def _configure(builder: trt.Builder, settings: BuildSettings, timing_cache: Path | None) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.level
    config.max_aux_streams = 0
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    return config


def _set_shapes(
    builder: trt.Builder, network: trt.INetworkDefinition, shapes: ShapeRanges, graph: Path
) -> trt.IOptimizationProfile:
    """Fix every dimension that has one size only; returns the ranges of the others."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name not in shapes:
            raise EngineError(f"{graph.stem}: {graph.name} has an input {tensor.name} that the manifest does not name")
        low, usual, high = shapes[tensor.name]
        tensor.shape = trt.Dims([a if a == b else -1 for a, b in zip(low, high, strict=True)])
        if low != high:
            profile.set_shape(tensor.name, trt.Dims(low), trt.Dims(usual), trt.Dims(high))
    return profile


def _attentions(network: trt.INetworkDefinition) -> list[trt.IAttention]:
    """Every attention that is one operator. The bindings hand out layers by their base class, to be changed."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            found.append(cast("trt.IAttentionInputLayer", layer).attention)
    return found
