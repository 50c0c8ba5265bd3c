"""What every benchmark here shares: medians, the machine, and one JSON line that ends the output."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "diffusers", "onnx", "onnxruntime", "numpy")
# Where they are installed.
GPU_LIBRARIES = ("cupy-cuda13x", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, library versions and commit."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def finish(name: str, result: dict[str, Any], save: bool, facts: Mapping[str, Any] | None = None) -> None:
    """Print the result as one JSON line, and with `save` write it to benchmarks/results/NAME.json.

    `facts` are what the machine has besides what every machine has.
    """
    document = {"benchmark": name, "machine": machine() | dict(facts or {}), **result}
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def median(values: Iterable[float]) -> float:
    """The median, rounded to four digits, as figures this noisy deserve."""
    return float(f"{statistics.median(values):.4g}")


def reason_of(error: BaseException) -> str:
    """An error in one line, as the reason why something could not be measured."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= 400 else message[:400] + '…'}"


def _versions() -> dict[str, str]:
    installed = {distribution.metadata["Name"].replace("_", "-") for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in (*LIBRARIES, *GPU_LIBRARIES) if name in installed}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
