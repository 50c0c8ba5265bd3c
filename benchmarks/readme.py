"""Writes the tables of the pages from the recorded results, between `<!-- name -->` and `<!-- end -->` markers.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_verdict import bench_verdict
from benchmarks.common import table
from benchmarks.quality_tables import (
    DEMOS,
    TITLES,
    gains_at_quality,
    gains_at_share,
    gains_verdict,
    rules,
    rules_verdict,
    side_by_side,
    steadiness,
)

REPOSITORY = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30

Draw = Callable[..., str]


def render(page: str) -> str:
    """A page, by its path in the repository, with every marked section replaced by its table."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for name, (draw, files) in PAGES[page].items():
        results = [json.loads((REPOSITORY / file).read_text(encoding="utf-8")) for file in files]
        section = re.search(rf"<!-- {name} -->\n.*?<!-- end -->", text, re.DOTALL)
        assert section is not None, f"{page} has no section {name}"
        text = f"{text[: section.start()]}<!-- {name} -->\n{draw(*results)}\n<!-- end -->{text[section.end() :]}"
    return text


def models(result: dict[str, Any], real_size: dict[str, Any]) -> str:
    """A row a model: what it takes, and the time of a step where one was measured."""
    seconds = {row["model"]: row["step_ms"] / 1e3 for row in result["rows"] if "step_ms" in row}
    seconds["latte"] = real_size["cases"]["latte_1"]["run"]["step_seconds"]
    rows = [
        (
            f"`{row['model']}`",
            f"`{row['checkpoint']}`",
            _video(row),
            _count(row["parameters"]),
            *(_size(row[name]) for name in ("bundle_bytes", "memory_bytes", "forecast_bytes", "low_memory_bytes")),
            _time(seconds.get(row["model"])),
        )
        for row in result["rows"]
    ]
    memory = ("memory", "with `forecast`", "with `--low-memory`")
    header = ("`--model`", "checkpoint", "video", "parameters", "bundle", *memory, "step")
    return table(rows, header)


def _video(row: dict[str, Any]) -> str:
    name = f" ({row['sizes']['resolution']})" if "resolution" in row["sizes"] else ""
    return " x ".join(str(row[side]) for side in ("frames", "height", "width")) + name


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def demo_scores(*results: dict[str, Any]) -> str:
    """How often the demo models do what the prompt says, by the judge of demo/judge.py."""
    names = ("pairs", "colour", "shape", "direction", "intact")
    keys = (("trained", "totals_trained"), ("held out", "totals_held_out"))
    rows = [
        (title, kind, *(result[key][name] for name in names))
        for title, result in zip(DEMOS.values(), results, strict=True)
        for kind, key in keys
    ]
    return table(rows, ("demo model", "combinations", *names))


def step_time(result: dict[str, Any]) -> str:
    """Every candidate's time per step by number of threads, of the processor on one, and what its output is worth."""
    counts, rows = list(result["by_threads"]), []
    alone = result["by_threads"][counts[0]]
    for name, row in alone.items():
        cells = [result["by_threads"][count][name] for count in counts]
        times = (x for cell in cells for x in (f"{cell['step_ms']:.0f}", f"{cell['ratio_to_eager']:.2f}"))
        taken = row["processor_ms"]
        shares = (f"{taken / alone[other]['processor_ms']:.2f}" for other in ("torch eager", "torch eager, bf16"))
        quality = "—" if row["psnr_db"] is None else f"{row['psnr_db']:.0f}"
        rows.append((name, *times, f"{taken:.0f}", *shares, quality))
    threads = [f"{count} thread{'s' * (count != '1')}" for count in counts]
    header = [x for text in threads for x in (f"{text}, ms", "of eager")]
    header += [f"processor time, {threads[0]}, ms", "of eager's", "of eager's in bf16", "PSNR, dB"]
    return _machine(result, "torch", "onnxruntime", "openvino") + table(rows, ("one step without reuse", *header))


def real_size(result: dict[str, Any]) -> str:
    """Export at real size."""
    titles = {
        "latte_1": "Latte-1's configuration",
        "t5_1b": "a T5 encoder of 1 B parameters",
        "umt5_xxl": "Wan's UMT5-XXL, 5.7 B parameters, in bf16",
    }
    rows = []
    for case, row in result["cases"].items():
        export = row["export"]
        rows.append(
            (
                titles[case],
                f"{row['checkpoint_bytes'] / GIB:.2f} GiB",
                f"{export['seconds']:.0f} s",
                f"{export['peak_bytes'] / GIB:.2f} GiB",
                export["blocks"],
                f"{export['largest_difference']:.1g}",
            )
        )
    return table(rows, ("random weights", "checkpoint", "export", "peak memory", "blocks", "largest difference"))


def skipping(result: dict[str, Any]) -> str:
    """What a skipped block call saves."""
    rows = [
        (
            name,
            f"{row['blocks_computed']} of {row['blocks_possible']}",
            f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.2f}",
            f"{row['loop_share_percent']:.1f} %",
            f"{row['planned_bytes'] / MIB:.0f} MiB",
            f"{row['measured_bytes'] / MIB:.0f} MiB",
        )
        for name, row in result["policies"].items()
    ]
    header = ("static policy", "blocks run", "speed-up", "efficiency", "loop's own share", "memory planned", "measured")
    return table(rows, header)


def reuse_quality(result: dict[str, Any]) -> str:
    """Every setting on one demo model."""
    rows = [
        (row["cache"], row["cycle"], row["gamma"], *_reuse(row), _decibels(row["worst_psnr_db"]))
        for row in result["rows"]
    ]
    header = ("cache", "cycle", "gamma", "calls skipped", "PSNR, dB", "SSIM", "speed-up", "worst PSNR, dB")
    return f"{result['prompts']} prompts, {result['steps']} steps; {_machine(result)}{table(rows, header)}"


def reuse_summary(*results: dict[str, Any]) -> str:
    """The default gamma on all demo models."""
    rows = [
        (title, row["cache"], row["cycle"], *_reuse(row))
        for title, result in zip(TITLES.values(), results, strict=True)
        for row in result["rows"]
        if row["gamma"] == SUMMARY_GAMMA and row["cycle"] in SUMMARY_CYCLES
    ]
    return table(rows, ("demo model", "cache", "cycle", "calls skipped", "PSNR, dB", "SSIM", "speed-up"))


def tuned(*results: dict[str, Any]) -> str:
    """The profiles of the demo models, and the goals that were missed."""
    rows = [
        (title, tuning["steps"], *_tuned(goal))
        for title, result in zip(TITLES.values(), results, strict=True)
        for tuning in result["tunings"]
        for goal in tuning["goals"]
    ]
    header = ("demo model", "steps", "goal", "policy", "skipped, selection", "skipped", "foreseen", "worst PSNR, dB")
    counted = ", ".join(
        f"{count} {part.replace('_', ' ')}" for part, count in results[0]["pairs"].items() if count is not False
    )
    return f"Pairs: {counted}; {_machine(results[0])}" + table(rows, (*header, "mean", "pooled", "speed-up"))


def _tuned(goal: dict[str, Any]) -> tuple[str, ...]:
    """One goal, and what the candidates of all policies skip in selection."""
    chosen, held_out = goal["policy"] or {}, goal["held_out"] or dict.fromkeys(HELD_OUT)
    settings = ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)
    candidates = [
        f"{one['of']} " + ("—" if one["selection"] is None else _percent(one["selection"]["share_skipped"]))
        for one in goal["candidates"]
    ]
    return (
        f"`{goal['name']}`{'' if goal['written'] else ', not written'}",
        settings.removeprefix("name ") or "none found",
        ", ".join(candidates),
        _percent(held_out["share_skipped"]),
        "—" if goal["foreseen_worst_psnr_db"] is None else f"{goal['foreseen_worst_psnr_db']:.1f}",
        *("—" if goal["held_out"] is None else _decibels(held_out[name]) for name in HELD_OUT[:3]),
        "—" if held_out["speedup"] is None else f"{held_out['speedup']:.2f}x",
    )


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.1f} %"


def _reuse(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['skipped_percent']:.1f} %",
        _decibels(row["psnr_db"]),
        f"{row['ssim']:.4f}",
        f"{row['speedup']:.2f}x",
    )


def _decibels(psnr_db: float | None) -> str:
    return "identical" if psnr_db is None else f"{psnr_db:.1f}"


def bench(result: dict[str, Any]) -> str:
    """Peers and policies on one demo model."""
    rows = [
        (
            f"`{row['name']}`",
            row["kind"],
            *_held_against(row),
            _saved(row.get("block_work_saved")),
            f"{row['cpu_ms'] / 1e3:.2f} s",
            "{median:.2f}x ({low:.2f} to {high:.2f})".format(**row["cpu_speedup"]),
            f"{row['wall_speedup']['median']:.2f}x",
            _after_abort(row["after_abort"]),
        )
        for row in result["rows"]
    ]
    header = ("", "", "PSNR, dB", "mean", "worst", "work saved", "CPU", "speed-up, CPU", "wall", "after an abort")
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    asked = f"{len(result['pairs'])} pairs, {result['steps']} steps, guidance {result['guidance']:g}, {threads}; "
    return f"{asked}{_machine(result, 'torch', 'diffusers', 'cache-dit', 'onnxruntime')}{table(rows, header)}"


def bench_agreement(*results: dict[str, Any]) -> str:
    """Whether this package and diffusers make the same videos without a cache, in a sentence."""
    told = []
    for result in results:
        (found,) = result["agreements"]
        worst = "" if found["worst_psnr_db"] is None else f" (the worst of the others: {found['worst_psnr_db']:.1f} dB)"
        told.append(f"{found['identical']} of {len(result['pairs'])} videos of `{result['model']}`{worst}")
    return "Without a cache this package and diffusers make the same frames, byte by byte, in\n{}.".format(
        " and in\n".join(told)
    )


def _held_against(row: dict[str, Any]) -> tuple[str, ...]:
    if row["name"] == row["reference"]:
        return "reference", "", ""
    if row["psnr_db"] is None:
        return "identical", "", ""
    return tuple(f"{row[key]:.1f}" for key in ("psnr_db", "mean_psnr_db", "worst_psnr_db"))


def _saved(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _after_abort(found: dict[str, Any]) -> str:
    return "same bytes" if found["same"] else f"{found['psnr_db']:.1f} dB"


def startup(result: dict[str, Any]) -> str:
    """What embedding costs."""
    row = (f"{result['import_ms']:.0f} ms", f"{result['ready_ms'] / 1e3:.2f} s", f"{result['peak_mib']:.0f} MiB")
    return table([row], ("`import foresight`", "process start to ready for the first step", "peak memory of a run"))


def serving_load(result: dict[str, Any]) -> str:
    """What a server adds."""
    row = (
        f"{result['completed']} of {result['requests']}",
        f"{100 * result['overhead']:.1f} %",
        f"{100 * result['server_cpu_share']:.1f} %",
        *(f"{result[name]:.0f} ms" for name in ("p50_ms", "p95_ms", "p99_ms")),
    )
    limits = result["limits"]
    assert limits["in_order"] and limits["most_unfinished"] <= limits["allowed_unfinished"]
    few = (f"{limits['completed']} of {result['requests']}", str(limits["turned_away"]))
    header = ("videos", "HTTP and queue", "processor time of the server", "GET, median", "95 %", "99 %")
    own = table([(*row, *few)], (*header, "videos with few places", "answers 429"))
    return _machine(result, "onnxruntime") + own


def shared_weights(result: dict[str, Any]) -> str:
    """What two processes take, with weights of their own and with the same."""
    titles = {"own": "of its own", "shared": "shared"}
    rows = [
        (title, f"{result[key]['pss_mib']:.0f} MiB", f"{result[key]['request_ms']:.0f} ms")
        for key, title in titles.items()
    ]
    return table(rows, ("weights", "memory of each process", "a request"))


def engine_build(result: dict[str, Any]) -> str:
    """Blocks of real size, compiled without a GPU."""
    rows = [
        (
            f"{row['model']}, {row['kind']}",
            row["dtype"],
            f"{row['seconds']:.1f} s",
            f"{row['plan_mib']:.0f} MiB",
            f"{row['scratch_mib']:.0f} MiB",
            f"{row['scores_mib']:.0f} MiB",
        )
        for row in result["blocks"]
        if row["opset"] == 23
    ]
    header = ("block", "dtype", "build", "plan", "scratch", "attention scores")
    return _machine(result, "tensorrt-rtx-cu13-bindings") + table(rows, header)


def cache_budget(result: dict[str, Any]) -> str:
    """What reuse is left in a smaller cache."""
    rows = [
        (
            row["cache"],
            f"{row['slots']} of {row['blocks']}",
            "" if row["slots"] in (0, row["blocks"]) else row["chosen_by"],
            f"{row['cache_mib']:.2f} MiB",
            f"{row['skipped_percent']:.1f} %",
            f"{row['psnr_db']:.1f}" if row["slots"] else "identical",
        )
        for row in result["rows"]
    ]
    return table(rows, ("cache", "slots", "chosen by", "stream and cache", "calls skipped", "PSNR, dB"))


def _machine(result: dict[str, Any], *libraries: str) -> str:
    machine = result["machine"]
    versions = ", ".join(
        f"{LIBRARIES.get(name, name)} {machine['versions'][name]}" for name in libraries or ("torch", "onnxruntime")
    )
    return f"{machine['processor']}, {machine['cores']} cores; {versions}.\n\n"


# Libraries whose distributions have other names.
LIBRARIES = {"tensorrt-rtx-cu13-bindings": "TensorRT-RTX"}
HELD_OUT = ("worst_psnr_db", "mean_psnr_db", "psnr_db", "share_skipped", "speedup")
SUMMARY_GAMMA = 0.5
SUMMARY_CYCLES = ("N1R2", "N2R3")
RESULTS = "benchmarks/results"
_FORECAST = tuple(f"{RESULTS}/forecast_quality_{model}.json" for model in TITLES)
_TUNED = tuple(f"{RESULTS}/tuned_{model}.json" for model in TITLES)
_RULES = tuple(f"{RESULTS}/rules_{model}.json" for model in TITLES)
BENCHED = ("cogvideox", "latte", "wan")
_BENCH = {model: f"{RESULTS}/bench_{model}.json" for model in BENCHED}
_REUSE = {model: f"{RESULTS}/reuse_quality_{model}.json" for model in TITLES}
# page -> section -> how to draw it, and from what
PAGES: dict[str, dict[str, tuple[Draw, tuple[str, ...]]]] = {
    "README.md": {
        "side by side": (side_by_side, (*_FORECAST, *_TUNED)),
        "models": (models, (f"{RESULTS}/models.json", f"{RESULTS}/real_size.json")),
    },
    "benchmarks/README.md": {
        "step time": (step_time, (f"{RESULTS}/step_time.json",)),
        "skipping": (skipping, (f"{RESULTS}/skipping.json",)),
        "gains verdict": (gains_verdict, _FORECAST),
        "gains at quality": (gains_at_quality, _FORECAST),
        "gains at share": (gains_at_share, _FORECAST),
        "steadiness": (steadiness, (f"{RESULTS}/steadiness.json",)),
        "rules verdict": (rules_verdict, _RULES),
        "rules": (rules, _RULES),
        "reuse summary": (reuse_summary, tuple(_REUSE.values())),
        **{f"reuse quality {model}": (reuse_quality, (file,)) for model, file in _REUSE.items()},
        "bench agreement": (bench_agreement, tuple(_BENCH.values())),
        **{f"bench {model}": (bench, (file,)) for model, file in _BENCH.items()},
        "bench verdict": (bench_verdict, tuple(_BENCH.values())),
        "tuned": (tuned, _TUNED),
        "cache budget": (cache_budget, (f"{RESULTS}/cache_budget.json",)),
        "startup": (startup, (f"{RESULTS}/startup.json",)),
        "serving load": (serving_load, (f"{RESULTS}/serving_load.json",)),
        "shared weights": (shared_weights, (f"{RESULTS}/shared_weights.json",)),
        "real size": (real_size, (f"{RESULTS}/real_size.json",)),
        "engine build": (engine_build, (f"{RESULTS}/engine_build.json",)),
        "demo scores": (demo_scores, tuple(f"demo/records/{model}/scores.json" for model in DEMOS)),
    },
}


def main() -> None:
    """Rewrite the pages in place."""
    for page in PAGES:
        (REPOSITORY / page).write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    main()
