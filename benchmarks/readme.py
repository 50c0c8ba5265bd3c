"""Writes the tables of README.md from the recorded results, between `<!-- name -->` and `<!-- end -->` markers.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import table

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
GIB = 2**30


def render(text: str) -> str:
    """`text` with every marked section replaced by its table."""
    for name, (file, draw) in SECTIONS.items():
        result = json.loads((REPOSITORY / file).read_text(encoding="utf-8"))
        section = re.search(rf"<!-- {name} -->\n.*?<!-- end -->", text, re.DOTALL)
        assert section is not None, f"README.md has no section {name}"
        text = f"{text[: section.start()]}<!-- {name} -->\n{draw(result)}\n<!-- end -->{text[section.end() :]}"
    return text


def demo_scores(result: dict[str, Any]) -> str:
    """How often the demo model does what the prompt says, by the judge of demo/judge.py."""
    names = ("pairs", "colour", "shape", "direction", "intact")
    rows = [
        (title, *(result[key][name] for name in names))
        for title, key in (("trained", "totals_trained"), ("held out", "totals_held_out"), ("all", "totals"))
    ]
    return table(rows, ("combinations", *names))


def step_time(result: dict[str, Any]) -> str:
    """Every candidate's time per step, by number of threads."""
    counts = list(result["by_threads"])
    rows = []
    for name in result["by_threads"][counts[0]]:
        cells = [result["by_threads"][count][name] for count in counts]
        rows.append((name, *(x for cell in cells for x in (f"{cell['step_ms']:.0f}", f"{cell['ratio_to_eager']:.2f}"))))
    header = [x for count in counts for x in (f"{count} thread{'s' * (count != '1')}, ms", "of eager")]
    return _machine(result) + table(rows, ("one step without reuse", *header))


def real_size(result: dict[str, Any]) -> str:
    """Export at real size."""
    titles = {"latte_1": "Latte-1's configuration", "t5_1b": "a T5 encoder of 1 B parameters"}
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
    return table(rows, ("random weights, fp32", "checkpoint", "export", "peak memory", "blocks", "largest difference"))


def skipping(result: dict[str, Any]) -> str:
    """What a skipped block call saves."""
    rows = [
        (
            name,
            f"{row['blocks_computed']} of {row['blocks_possible']}",
            f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.2f}",
            f"{row['loop_share_percent']:.1f} %",
        )
        for name, row in result["policies"].items()
    ]
    return table(rows, ("static policy", "blocks run", "speed-up", "efficiency", "loop's own share"))


def reuse_quality(result: dict[str, Any]) -> str:
    """Every setting on the demo model."""
    rows = [
        (
            row["cache"],
            row["cycle"],
            row["gamma"],
            f"{row['skipped_percent']:.1f} %",
            f"{row['psnr_db']:.1f}" if row["psnr_db"] is not None else "identical",
            f"{row['ssim']:.4f}",
            f"{row['speedup']:.2f}x",
        )
        for row in result["rows"]
    ]
    return table(rows, ("cache", "cycle", "gamma", "calls skipped", "PSNR, dB", "SSIM", "speed-up"))


def startup(result: dict[str, Any]) -> str:
    """What embedding costs."""
    row = (f"{result['import_ms']:.0f} ms", f"{result['ready_ms'] / 1e3:.2f} s", f"{result['peak_mib']:.0f} MiB")
    return table([row], ("`import foresight`", "process start to ready for the first step", "peak memory of a run"))


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
    return table(rows, ("block", "dtype", "build", "plan", "scratch", "attention scores"))


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


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "onnxruntime"))
    return f"{machine['processor']}, {machine['cores']} cores; {versions}.\n\n"


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo scores": ("demo/scores.json", demo_scores),
    "step time": ("benchmarks/results/step_time.json", step_time),
    "real size": ("benchmarks/results/real_size.json", real_size),
    "skipping": ("benchmarks/results/skipping.json", skipping),
    "reuse quality": ("benchmarks/results/reuse_quality.json", reuse_quality),
    "cache budget": ("benchmarks/results/cache_budget.json", cache_budget),
    "engine build": ("benchmarks/results/engine_build.json", engine_build),
    "startup": ("benchmarks/results/startup.json", startup),
}


def main() -> None:
    """Rewrite README.md in place."""
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
