"""A model of real size on an NVIDIA GPU: engines per block against one graph and torch, and what skipping saves.

Weights are random, the prompt is one guided one: a batch of two rows. Three questions, to every backend that runs
here; what does not run is left out, and the result says why. Where nothing runs, that is an error: nothing is saved.

- What does a step without reuse take? Torch compiled; the whole transformer as one graph, which is what cutting it
  into blocks is to be measured against; and one engine per block, as the runtime calls them, caches and distances
  included. Each takes turns with torch eager, in processes of their own, as in benchmarks/step_time.py; but one after
  the other, since a GPU holds two models of real size, not ten.
- What does a skipped block cost? As in benchmarks/skipping.py. And of a step, what is the host's own time? That is the
  time it did not wait for the device; once blocks are skipped, it is what is left.
- Is memory as planned? The plan counts weights, scratch and arrays; what the device had less of at the end also has
  the library's kernels and workspaces in it.

What is made on the way (checkpoint, bundle, engines) stays under --work for the next run. Without a GPU,
`--device cpu --small` shows that the script works, and nothing else.

    python -m benchmarks.gpu --model latte --save
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common import finish, table
from benchmarks.gpu.models import video_size
from benchmarks.gpu.preparation import Preparation, Unavailable, driver_facts, rules_of
from benchmarks.gpu.requests import measure_requests
from benchmarks.gpu.setup import COMPILING, Setup
from benchmarks.gpu.steps import CANDIDATES, Candidate, measure_steps
from foresight.engines.bundle import MANIFEST, open_bundle
from zoo import PUBLISHED

DTYPES = ("fp32", "fp16", "bf16")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--model", choices=PUBLISHED, default=next(iter(PUBLISHED)))
    parser.add_argument("--small", action="store_true", help="a tiny model of that kind, to try the script")
    parser.add_argument("--dtype", choices=DTYPES, help="[default: what the model is run in, on a CPU fp32]")
    parser.add_argument("--opset", type=int, default=23, help="from 23 on, attention is one operator")
    parser.add_argument("--rounds", type=int, default=9, help="steps of every candidate")
    parser.add_argument("--request-rounds", type=int, default=3, help="requests with every policy")
    parser.add_argument("--steps", type=int, default=8, help="of a request")
    parser.add_argument("--jobs", type=int, default=1, help="plans to build side by side")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", help=f"of {'; '.join(CANDIDATES)}")
    parser.add_argument("--bundle", type=Path, help="a bundle to measure instead of a random one")
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint it was made from, for torch and one graph")
    parser.add_argument("--work", type=Path, default=Path("out/benchmark-gpu"), help="20 GB a model of real size")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu_MODEL.json")
    return parser.parse_args()


def setup_of(options: argparse.Namespace) -> Setup:
    """Where things lie: a folder for each model, dtype and opset, or for a bundle that is given."""
    if options.bundle is None:
        model, opset, size = options.model, options.opset, video_size(options.model, options.small)
        dtype = options.dtype or ("fp32" if options.device == "cpu" else PUBLISHED[options.model].dtype)
        folder = options.work / (f"{model}-small" if options.small else model)
        made = folder / f"{dtype}-opset-{opset}"
        checkpoint, bundle = options.checkpoint or folder / "checkpoint", made / "bundle"
    else:
        opened = open_bundle(options.bundle)
        manifest = opened.manifest
        made = options.work / opened.id[:12]
        model, dtype, opset, shape = manifest.model, manifest.dtype, manifest.opset, manifest.shape
        size = {"height": shape.height, "width": shape.width, "frames": shape.frames}
        checkpoint, bundle = options.checkpoint or made / "checkpoint", opened.path
    made.mkdir(parents=True, exist_ok=True)
    graph = made / "one-graph" / "transformer.onnx"
    return Setup(model, options.device, dtype, opset, size, checkpoint, bundle, graph)


def impossible_of(options: argparse.Namespace) -> dict[str, str]:
    """What the options rule out, and why."""
    reasons = {}
    if options.bundle is not None and options.checkpoint is None:
        reasons["checkpoint"] = "needs the checkpoint that --bundle was made from; name it with --checkpoint"
    if options.device == "cpu":
        reasons |= dict.fromkeys(COMPILING, "runs on an NVIDIA GPU, not on a CPU")
    return reasons


def prepare(preparation: Preparation, candidates: list[Candidate], left_out: dict[str, str]) -> list[Candidate]:
    """Make what they need, and nothing that none of them needs; returns those that have it."""
    ready = []
    for candidate in candidates:
        try:
            for what in candidate.needs:
                preparation.obtain(what)
            ready.append(candidate)
        except Unavailable as error:
            left_out[candidate.name] = str(error)
    if ready:
        with suppress(Unavailable):
            preparation.obtain("flops")
    with suppress(Unavailable):
        preparation.obtain("device")
    return ready


def size_of(setup: Setup) -> dict[str, Any]:
    """Of the model and of the request; nothing where there is no bundle."""
    if not (setup.bundle / MANIFEST).exists():
        return {}
    manifest, sizes = setup.manifest, setup.sizes
    stream = manifest.streams[0]
    return {
        "blocks": len(manifest.blocks),
        "video": [manifest.shape.frames, manifest.shape.height, manifest.shape.width],
        "stream": list(manifest.blocks[0].output(f"new_{stream}").resolve(sizes)),
        "text": sizes["text"],
    }


def print_steps(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of step times."""
    cells = [
        (name, *(row.get(key, "") for key in ("step_ms", "ratio_to_eager", "tflops"))) for name, row in rows.items()
    ]
    print(table(cells, ("one step without reuse", "ms", "of eager", "TFLOP/s")), end="\n\n", flush=True)


def print_requests(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables of skipping, host time and memory."""
    for topic in ("skipping", "host", "memory"):
        found = {name: result[topic] for name, result in results.items() if topic in result}
        if topic == "memory":
            rows = [(name, *row.values()) for name, row in found.items()]
            header = ["memory", *next(iter(found.values()), {})]
        else:
            rows = [(name, policy, *row.values()) for name, own in found.items() for policy, row in own.items()]
            header = [topic, "policy", *next((row for own in found.values() for row in own.values()), {})]
        if rows:
            print(table(rows, header), end="\n\n", flush=True)


def main() -> None:
    """Measure, print tables as they are ready, and end in one JSON line."""
    options = parse()
    setup = setup_of(options)
    preparation = Preparation(rules_of(setup, options.small, options.jobs), impossible_of(options))
    left_out: dict[str, str] = {}
    ready = prepare(preparation, [CANDIDATES[name] for name in options.only or CANDIDATES], left_out)
    flops = preparation.facts.get("flops")
    steps = measure_steps(setup, ready, options.rounds, left_out, flops)
    if steps:
        print_steps(steps)
    results = measure_requests(setup, ready, options.request_rounds, options.steps, left_out)
    if options.device == "cpu":
        for result in results.values():
            del result["host"], result["memory"]
        left_out["host"] = "on a CPU engines run on the host itself, so all time is its own"
        left_out["memory"] = "on a CPU it is not told apart from the process's own"
    print_requests(results)
    print("\n".join(f"left out: {name}: {reason}" for name, reason in left_out.items()), flush=True)
    document = {
        "model": setup.model,
        "device": setup.device,
        "dtype": setup.dtype,
        "opset": setup.opset,
        "size": size_of(setup),
        "step_tflop": None if flops is None else float(f"{1e-12 * flops:.4g}"),
        "built": {what: found for what, found in preparation.facts.items() if what.startswith(COMPILING) and found},
        "rounds": options.rounds,
        "step": steps,
        "request": {"rounds": options.request_rounds, "steps": options.steps},
        "requests": results,
        "left_out": left_out,
    }
    name = f"gpu_{setup.model}".replace("-", "_")
    measured = bool(steps or results)
    finish(name, document, options.save and measured, preparation.facts.get("device") or driver_facts())
    if not measured:
        sys.exit(f"bench-gpu: nothing was measured on {setup.device}, for the reasons above")


if __name__ == "__main__":
    main()
