"""What skipping costs: the time saved against the block calls saved, the loop's own share of a step, and memory.

    efficiency = (time without reuse / time with) / (block calls without / block calls with)

1 means that a skipped block is free. Weights are random, so policies are static: what is skipped is known and the same
in every round; the forecast ones skip steps whole, and cache no block. Requests with and without reuse take turns in
one process, and a request's time is the sum over its steps of each step's median over the rounds, so that a disturbance
of one step stays out of it. Memory is what a request takes beside what is loaded: planned, and measured, the peak of a
fresh process's resident memory over what it was before its second request.

    python -m benchmarks.skipping --save
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import finish, median, table
from benchmarks.step_time import SIZE
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import FixedSchedule, NoReuse, Policy, Static
from foresight.runtime.trace import Trace

PROMPT = "a red circle moving right"
STEPS = 12
SCHEDULES = {"N1R2, forecast": FixedSchedule("1-3 5 7 9 11-12"), "N2R3, forecast": FixedSchedule("1-3 6 9 12")}
HEADER = ("policy", "blocks run", "of", "ms", "speed-up", "efficiency", "loop's own share, %", "planned", "measured")


def policies_of(*caches: str) -> dict[str, Policy]:
    """No reuse, which all others are compared with, and two static policies for every way of caching."""
    policies: dict[str, Policy] = {"none": NoReuse()}
    for cache in caches:
        policies[f"N1R2, {cache}"] = Static(1, 2, warmup=2, cache=cache)
        policies[f"N2R3, {cache}"] = Static(2, 3, warmup=2, cache=cache)
    return policies


def take_turns(
    pipeline: VideoPipeline, policies: Mapping[str, Policy], rounds: int, steps: int
) -> dict[str, list[Trace]]:
    """The traces of guided requests whose policies take turns; a round before the first one warms up."""
    traces: dict[str, list[Trace]] = {name: [] for name in policies}
    for turn in range(rounds + 1):
        for name, policy in policies.items():
            trace = pipeline(PROMPT, steps=steps, guidance=4.0, policy=policy).trace
            if turn:
                traces[name].append(trace)
    return traces


def compare(traces: Mapping[str, Sequence[Trace]]) -> dict[str, dict[str, Any]]:
    """Per policy the block calls, the time, and what skipping saved against the policy "none"."""
    rows = {}
    without = denoise_ms(traces["none"])
    for name, own in traces.items():
        speedup = without / denoise_ms(own)
        fewer = own[0].blocks_possible / own[0].blocks_computed
        rows[name] = {
            "blocks_computed": own[0].blocks_computed,
            "blocks_possible": own[0].blocks_possible,
            "denoise_ms": median([denoise_ms(own)]),
            "speedup": median([speedup]),
            "efficiency": median([speedup / fewer]),
            "loop_share_percent": median(100 * (1 - trace.engine_ms / trace.denoise_ms) for trace in own),
        }
    return rows


def measure_memory(bundle: Path, policies: Mapping[str, Policy]) -> dict[str, dict[str, int]]:
    """Bytes per policy, planned and measured, each in a process of its own."""
    measured = {}
    for name, policy in policies.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured[name] = pool.apply(memory_of, (bundle, policy))
    return measured


def memory_of(bundle: Path, policy: Policy) -> dict[str, int]:
    """What a request takes in this process, which has done nothing else yet."""
    with load(bundle) as pipeline:
        pipeline(PROMPT, steps=STEPS, guidance=4.0, policy=policy)  # whose scratch ONNX Runtime keeps
        pipeline.backend.trim()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # begin to look for the peak anew
        before = _status("VmRSS")
        pipeline(PROMPT, steps=STEPS, guidance=4.0, policy=policy)
        planned = pipeline.memory(guided=True, policy=policy).per_request
        return {"planned_bytes": planned, "measured_bytes": _status("VmHWM") - before}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def denoise_ms(traces: Sequence[Trace]) -> float:
    """Sum over the steps of each step's median over the rounds."""
    return sum(median(step) for step in zip(*([s.milliseconds for s in t.steps] for t in traces), strict=True))


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "foresight-step-time")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/skipping.json")
    options = parser.parse_args()
    checkpoint, bundle = options.work / "checkpoint", options.work / "opset-23"
    if not bundle.exists():
        from foresight.exporter.export import Export
        from zoo import latte

        if not checkpoint.exists():
            latte.write_random(checkpoint, **SIZE)  # type: ignore[arg-type]
        Export("latte-demo", checkpoint=str(checkpoint), output=bundle).run()
    policies = policies_of("output", "residual") | SCHEDULES
    memory = measure_memory(bundle, policies)
    rows = compare(take_turns(load(bundle), policies, options.rounds, STEPS))
    rows = {name: row | memory[name] for name, row in rows.items()}
    cells = [(name, *row.values()) for name, row in rows.items()]
    print(table(cells, HEADER))
    finish("skipping", {"size": SIZE, "steps": STEPS, "policies": rows}, options.save)


if __name__ == "__main__":
    main()
