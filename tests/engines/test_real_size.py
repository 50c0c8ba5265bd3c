"""Blocks of real size, built by NVIDIA's own compiler without a GPU: is attention fused, and what do they need?

Not fused, attention's scores take rows x heads x length² values of scratch memory. `make test-rtx` runs these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_build import BUILT, CASES, RTX, Block, Case, real_blocks
from foresight.engines.build import build_apart
from foresight.engines.compiled import INDEX_SCHEMA, Compiled, CompiledPart, Index
from foresight.engines.manifest import FileRecord
from foresight.engines.tensorrt.compiler import BuildSettings, Plan

pytestmark = pytest.mark.rtx
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux x86-64 only")

COGVIDEOX_2B = next(case for case in CASES if case.model == "cogvideox-2b")
COG_BLOCKS = 30


def build(block: Block) -> Plan:
    return build_apart(RTX, block.graph, block.shapes, BuildSettings())


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", BUILT, ids=lambda case: case.title)
def test_attention_is_fused(tmp_path: Path, case: Case, dtype: str, opset: int) -> None:
    """Where scores would be the largest tensors by far, the scratch shows it: there is no room for them.

    From opset 23 on attention is one operator, and the library says whether it has a kernel for it.
    """
    for block in real_blocks(case, tmp_path, dtype, opset):
        plan = build(block)
        assert plan.fused_attention is (True if opset >= 23 else None), block.kind
        if block.score_bytes > 2**33:
            assert plan.scratch_bytes < block.score_bytes / 4, block.kind


# Two sizes of a model, between which scores grow several times as much as all other tensors.
GROWING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Latte-1": ({"height": 512, "width": 512}, {"height": 1024, "width": 1024}),
    "Open-Sora": ({"resolution": "480p", "duration": "2s"}, {"resolution": "720p", "duration": "2s"}),
}


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("model", GROWING)
def test_scratch_grows_with_the_tokens_and_not_with_the_scores(
    tmp_path: Path, model: str, dtype: str, opset: int
) -> None:
    """At the smaller size the scores could hide among the other tensors; at the larger one they could not."""
    built: dict[str, list[tuple[Block, Plan]]] = {}
    for index, size in enumerate(GROWING[model]):
        case = Case(f"{model} {index}", model.lower().removesuffix("-1"), size)
        for block in real_blocks(case, tmp_path, dtype, opset):
            built.setdefault(block.kind, []).append((block, build(block)))
    for kind, ((small, plan), (large, larger)) in built.items():
        tokens = math.prod(large.shapes["hidden"][2]) / math.prod(small.shapes["hidden"][2])
        assert tokens > 2
        assert larger.scratch_bytes < 1.1 * tokens * plan.scratch_bytes, f"{kind}: grows faster than the stream"
        if kind == "spatial":
            assert large.score_bytes / small.score_bytes > 0.9 * tokens**2


def test_thirty_blocks_need_the_scratch_of_one(tmp_path: Path) -> None:
    """All blocks of CogVideoX-2b, each with its own weights: by their own numbers, one buffer serves them all."""

    def parts() -> Iterator[tuple[str, CompiledPart]]:
        for index, block in enumerate(real_blocks(COGVIDEOX_2B, tmp_path, "fp16", 23, COG_BLOCKS)):
            plan = build(block)
            record = FileRecord(bytes=len(plan.data), sha256="")
            yield (
                f"block.{index:03d}",
                CompiledPart(
                    file=f"block.{index:03d}.plan",
                    record=record,
                    scratch_bytes=plan.scratch_bytes,
                    fused_attention=plan.fused_attention,
                    build_seconds=plan.seconds,
                ),
            )

    index = Index(schema=INDEX_SCHEMA, bundle="", backend=RTX, target={}, settings={}, parts=dict(parts()))
    compiled = Compiled(tmp_path, index)
    assert len(index.parts) == COG_BLOCKS
    assert compiled.scratch_bytes == index.parts["block.000"].scratch_bytes > 0
    assert {part.scratch_bytes for part in index.parts.values()} == {compiled.scratch_bytes}
