"""Engines of real size from NVIDIA's own compiler, without a GPU: time, plan, scratch memory, and is attention fused?

One block of each kind of Latte-1 (512 x 512 x 16) and of CogVideoX-2b (480 x 720 x 49; the block alone, as diffusers
has it), weights random, one guided prompt: two rows. TensorRT-RTX builds each in a process of its own from opset 20,
where attention is MatMul, Softmax, MatMul, and from opset 23, where it is one Attention. Scores are what attention
takes when it is not fused; a plan whose scratch is far below that does not have them.

    python -m benchmarks.engine_build --save
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from benchmarks.checkpoints import random_latte
from benchmarks.common import finish, table
from foresight.engines.build import build_apart
from foresight.engines.bundle import open_bundle
from foresight.engines.tensorrt import BuildSettings, Profile, profile_of
from foresight.exporter.export import Export
from foresight.exporter.graph import graph_from_module, write_graph
from foresight.exporter.models.base import TORCH_DTYPES, Request

RTX = "tensorrt-rtx"
ROWS = 2
# Latte-1's transformer, but two pairs of its 28: all blocks of a kind are alike. The other parts are small.
LATTE_1: dict[str, Any] = {"heads": 16, "head_dim": 72, "pairs": 2, "frames": 16, "sample_size": 64}
COG_HEADS, COG_HEAD_DIM, COG_TIME, COG_TEXT = 30, 64, 512, 226
COG_TOKENS = 13 * 30 * 45
MIB = 2**20


@dataclass(frozen=True)
class Block:
    """A graph to build, and the bytes that the scores of its largest attention would take."""

    model: str
    kind: str
    graph: Path
    profile: Profile
    score_bytes: int


def latte_blocks(work: Path, dtype: Any, opset: int, sample_size: int = LATTE_1["sample_size"]) -> Iterator[Block]:
    """Latte-1's three kinds of block; `sample_size` is the side of the latents."""
    checkpoint, bundle = work / f"latte-{sample_size}", work / f"latte-{sample_size}-{dtype}-{opset}"
    if not checkpoint.exists():
        random_latte(checkpoint, **(LATTE_1 | {"sample_size": sample_size}), vae_channels=(8, 8, 8, 8))
    opened = Export("latte", Request(dtype=dtype, max_batch=1), str(checkpoint), bundle, opset).run()
    manifest = open_bundle(opened.path).manifest
    frames, tokens = manifest.shape.frames, manifest.ranges["tokens"][1]
    seen = set()
    for part in manifest.blocks:
        if part.kind not in seen:
            seen.add(part.kind)
            batch, length = (frames, tokens) if part.kind == "spatial" else (tokens, frames)
            scores = 2 * ROWS * batch * LATTE_1["heads"] * length**2
            yield Block("Latte-1", part.kind, opened.file(part.graph), profile_of(part, manifest.ranges), scores)


def cogvideox_blocks(work: Path, dtype: str, opset: int, count: int = 1) -> Iterator[Block]:
    """Blocks of CogVideoX-2b, all of one kind, each with its own random weights; the last graph lies there."""
    folder = work / f"cogvideox-{dtype}-{opset}"
    folder.mkdir(parents=True)
    dim = COG_HEADS * COG_HEAD_DIM
    module = CogVideoXBlock(dim, COG_HEADS, COG_HEAD_DIM, COG_TIME, attention_bias=True).to(TORCH_DTYPES[dtype]).eval()
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("batch", "tokens", dim),
        "encoder_hidden_states": ("batch", COG_TEXT, dim),
        "temb": ("batch", COG_TIME),
    }
    small, real = {"batch": ROWS, "tokens": 60}, {"batch": ROWS, "tokens": COG_TOKENS}

    def resolve(shape: tuple[int | str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)

    graph = graph_from_module(
        module,
        {name: torch.randn(resolve(shape, small), dtype=TORCH_DTYPES[dtype]) for name, shape in shapes.items()},
        ["new_hidden", "new_text"],
        {name: {i: d for i, d in enumerate(shape) if isinstance(d, str)} for name, shape in shapes.items()},
        opset,
    )
    profile = {name: (resolve(shape, real),) * 3 for name, shape in shapes.items()}
    for seed in range(count):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        path = folder / "block.onnx"
        write_graph(graph, module.get_parameter, path)
        yield Block("CogVideoX-2b", "block", path, profile, 2 * ROWS * COG_HEADS * (COG_TOKENS + COG_TEXT) ** 2)


def measure(work: Path, dtype: str, opset: int) -> list[dict[str, Any]]:
    """Export and build all blocks of one dtype and opset."""
    rows = []
    for block in (*latte_blocks(work, dtype, opset), *cogvideox_blocks(work, dtype, opset)):
        built = build_apart(RTX, block.graph, block.profile, BuildSettings())
        rows.append(
            {
                "model": block.model,
                "kind": block.kind,
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
            row for opset in options.opsets for dtype in options.dtypes for row in measure(Path(folder), dtype, opset)
        ]
    print(table([list(row.values()) for row in rows], list(rows[0])))
    finish("engine_build", {"rows_of_a_request": ROWS, "blocks": rows}, options.save)


if __name__ == "__main__":
    main()
