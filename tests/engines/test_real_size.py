"""Blocks of real size, built by NVIDIA's own compiler without a GPU: is attention fused, and what do they need?

Not fused, attention's scores take rows x heads x length² values of scratch memory. `make test-rtx` runs these.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.engine_build import CASES, RTX, Block, Case, real_blocks
from foresight.engines.build import build_apart
from foresight.engines.compiled import INDEX_SCHEMA, Compiled, CompiledPart, Index
from foresight.engines.manifest import FileRecord
from foresight.engines.tensorrt import BuildSettings, Plan

pytestmark = pytest.mark.rtx
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux x86-64 only")

COGVIDEOX_2B = next(case for case in CASES if case.model == "cogvideox-2b")
COG_BLOCKS = 30


def build(block: Block) -> Plan:
    return build_apart(RTX, block.graph, block.profile, BuildSettings())


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_attention_is_fused(tmp_path: Path, case: Case, dtype: str, opset: int) -> None:
    """Where scores would be the largest tensors by far, the scratch shows it as well: there is no room for them."""
    for block in real_blocks(case, tmp_path, dtype, opset):
        plan = build(block)
        assert plan.fused_attention, block.kind
        if block.score_bytes > 2**33:
            assert plan.scratch_bytes < block.score_bytes / 4, block.kind


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_latte_attention_is_fused_at_twice_the_side(tmp_path: Path, dtype: str) -> None:
    """At 512 x 512 the scores would hide among the other tensors; at 1024 x 1024 they would be 16 times as large."""
    plans: dict[str, list[tuple[Block, Plan]]] = {}
    for side in (512, 1024):
        case = Case(f"Latte-1 {side}", "latte", {"height": side, "width": side})
        for block in real_blocks(case, tmp_path, dtype, 23):
            plans.setdefault(block.kind, []).append((block, build(block)))
    assert len(plans) == 3
    for kind, ((small, plan), (large, larger)) in plans.items():
        assert plan.fused_attention and larger.fused_attention, kind
        assert larger.scratch_bytes < 4.1 * plan.scratch_bytes, f"{kind}: grows faster than the stream"
        if kind == "spatial":
            assert large.score_bytes == 16 * small.score_bytes
            assert larger.scratch_bytes < large.score_bytes / 4


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
