"""Whole requests, with and without reuse: what skipping saves, the host's own time, and memory against plan."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common import median
from benchmarks.gpu.preparation import Unavailable, apart, mib, say
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Candidate
from benchmarks.skipping import compare, policies_of, take_turns
from foresight.engines.arrays import Arrays, create_arrays
from foresight.runtime.pipeline import load
from foresight.runtime.trace import Trace


def requests(setup: Setup, backend: str, cuda_graphs: bool, rounds: int, steps: int) -> dict[str, Any]:
    """Efficiency, the host's time, and memory. To be run alone on the device, or nearly."""
    arrays = create_arrays(setup.device)
    before = _used_bytes(arrays)
    pipeline = load(setup.bundle, backend=backend, device=setup.device, threads=setup.threads, cuda_graphs=cuda_graphs)
    loaded = _used_bytes(arrays)
    traces = take_turns(pipeline, policies_of("output"), rounds, steps)
    taken, trace = _used_bytes(arrays) - before, traces["none"][-1]
    kept = ("blocks_computed", "blocks_possible", "denoise_ms", "speedup", "efficiency")
    return {
        "skipping": {policy: {name: row[name] for name in kept} for policy, row in compare(traces).items()},
        "host": {policy: host_time(own) for policy, own in traces.items()},
        "memory": {
            "planned_mib": mib(trace.planned_bytes),
            "arrays_mib": None if trace.device_bytes is None else mib(trace.device_bytes),
            "loaded_mib": mib(loaded - before),
            "taken_mib": mib(taken),
            "taken_of_planned": round(taken / trace.planned_bytes, 3),
        },
    }


def host_time(traces: Sequence[Trace]) -> dict[str, float]:
    """Medians: a step's wall time, the host's own of it, and of that what was spent outside engines."""

    def middle(value: Callable[[Trace], float]) -> float:
        return median(value(trace) for trace in traces)

    return {
        "step_ms": middle(lambda trace: trace.denoise_ms / len(trace.steps)),
        "host_ms": middle(lambda trace: (trace.denoise_ms - trace.wait_ms) / len(trace.steps)),
        "host_share_percent": middle(lambda trace: 100 * (1 - trace.wait_ms / trace.denoise_ms)),
        "loop_ms": middle(lambda trace: (trace.denoise_ms - trace.wait_ms - trace.engine_ms) / len(trace.steps)),
    }


def _used_bytes(arrays: Arrays) -> int:
    """What is taken of the device's memory, by whomever; on a CPU, the most that this process has had."""
    if arrays.kind == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with arrays.active():
        free, total = arrays.xp.cuda.runtime.memGetInfo()
    return int(total - free)


def measure_requests(
    setup: Setup, candidates: Sequence[Candidate], rounds: int, steps: int, left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Skipping, host time and memory of every candidate that runs bundles."""
    results = {}
    for candidate in candidates:
        if candidate.form == "per block":
            started = time.perf_counter()
            try:
                results[candidate.name] = apart(
                    requests, setup, candidate.backend, candidate.cuda_graphs, rounds, steps
                )
            except Unavailable as error:
                left_out[f"requests, {candidate.name}"] = str(error)
            say(f"requests, {candidate.name}: {time.perf_counter() - started:.0f} s")
    return results
