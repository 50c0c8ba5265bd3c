"""Engines of real size from NVIDIA's own compiler, without a GPU: time, plan, scratch memory, and is attention fused?

One block of each kind of every model, at its published width and at the sizes it was made for, weights random, one
guided prompt: two rows, or one at a time where guidance is split. TensorRT-RTX builds each in a process of its own from
opset 20, where attention is MatMul, Softmax, MatMul, and from opset 23, where it is one Attention. Scores are what
attention takes when it is not fused; a plan whose scratch is far below that does not have them.

    python -m benchmarks.engine_build --save
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import finish, table
from foresight.engines.build import build_apart
from foresight.engines.tensorrt.compiler import BuildSettings, ShapeRanges, shape_ranges
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.export import graph_from_plan
from foresight.exporter.graph import write_graph
from foresight.exporter.models import split_checkpoint
from foresight.exporter.models.base import ExportRequest, PartPlan, Split
from foresight.exporter.registry import find_model
from zoo import PUBLISHED, write_published
from zoo.base import Sizes

RTX = "tensorrt-rtx"
ROWS = 2
SPLIT_TITLES = ("Wan 2.1 14B, 720p",)
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model, by its name on the command line, and the sizes to build it for: those of the flags of `export`.

    `rows` of a guided prompt go through a block at once.
    """

    title: str
    model: str
    sizes: Sizes
    rows: int = ROWS


CASES = tuple(
    Case(title, model, sizes) for model, published in PUBLISHED.items() for title, sizes in published.sizes.items()
)


def distinct(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Those whose blocks no earlier one has: models may share the configuration of their transformers."""
    found: dict[str, Case] = {}
    for case in cases:
        config = PUBLISHED[case.model].files["transformer/config.json"]
        found.setdefault(json.dumps([config, dict(case.sizes)], sort_keys=True), case)
    return tuple(found.values())


# what a device has no room for with both rows at once
SPLIT = tuple(replace(case, title=f"{case.title}, one row", rows=1) for case in CASES if case.title in SPLIT_TITLES)
BUILT = (*distinct(CASES), *SPLIT)


@dataclass(frozen=True)
class Block:
    """A graph to build, and the bytes that the scores of its largest attention would take."""

    kind: str
    graph: Path
    shapes: ShapeRanges
    score_bytes: int


def real_split(model: str, work: Path, **request: Any) -> Split:
    """A real model taken apart by its published configuration alone."""
    checkpoint = Checkpoint(model, write_published(model, work / model))
    return split_checkpoint(find_model(model).family, checkpoint, ExportRequest(max_batch=ROWS // 2, **request))


def real_blocks(case: Case, work: Path, dtype: str, opset: int, count: int = 1) -> Iterator[Block]:
    """`count` blocks of each kind, with random weights each; the graphs lie below `work`, one folder a kind.

    A block's graph is overwritten by the next one of its kind.
    """
    split = real_split(case.model, work, dtype=dtype, **case.sizes)
    heads = next(v for k, v in PUBLISHED[case.model].files["transformer/config.json"].items() if k.endswith("_heads"))
    for kind, plan in {plan.kind: plan for plan in reversed(split.blocks)}.items():
        graph = graph_from_plan(plan, opset)
        folder = work / f"{case.title}-{dtype}-{opset}-{kind}".replace(" ", "-")
        folder.mkdir()
        for seed in range(count):
            write_graph(graph, _random(plan, seed), folder / "block.onnx")
            shapes = shape_ranges(plan.part, split.ranges | {"batch": (1, case.rows)})
            yield Block(kind, folder / "block.onnx", shapes, _score_bytes(kind, shapes, split.streams, heads))


def _random(plan: PartPlan, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str) -> Tensor:
        like = plan.module.get_parameter(name)
        return (0.02 * torch.randn(like.shape, generator=generator)).to(like.dtype)

    return weight


def _score_bytes(kind: str, shapes: ShapeRanges, streams: Sequence[str], heads: int) -> int:
    """Of 16-bit scores: within frames, across them, or over the tokens of all streams at once."""
    largest = [shapes[stream][2] for stream in streams]
    if len(largest[0]) == 3:
        rows, length = largest[0][0], sum(tokens for _, tokens, _ in largest)
    else:
        rows, frames, tokens, _ = largest[0]
        rows, length = (rows * frames, tokens) if kind == "spatial" else (rows * tokens, frames)
    return int(2 * rows * heads * length**2)


def measure(case: Case, work: Path, dtype: str, opset: int) -> list[dict[str, Any]]:
    """Export and build a model's blocks in one dtype and opset."""
    rows = []
    for block in real_blocks(case, work, dtype, opset):
        built = build_apart(RTX, block.graph, block.shapes, BuildSettings())
        rows.append(
            {
                "model": case.title,
                "kind": block.kind,
                "rows": case.rows,
                "dtype": dtype,
                "opset": opset,
                "seconds": built.seconds,
                "plan_mib": round(len(built.data) / MIB, 1),
                "scratch_mib": round(built.scratch_bytes / MIB, 1),
                "scores_mib": round(block.score_bytes / MIB, 1),
                "fused_attention": built.fused_attention,
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("fp16", "bf16"), default=["fp16", "bf16"])
    parser.add_argument("--opsets", nargs="+", type=int, default=[20, 23])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/engine_build.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for opset in options.opsets
            for dtype in options.dtypes
            for case in BUILT
            for row in measure(case, Path(folder), dtype, opset)
        ]
    print(table([list(row.values()) for row in rows], list(rows[0])))
    finish("engine_build", {"blocks": rows}, options.save)


if __name__ == "__main__":
    main()
