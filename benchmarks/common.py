"""What every benchmark here shares: medians, the machine, and one JSON line that ends the output."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foresight.evaluation import machine as machines

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "numpy")
# Where they are installed.
GPU_LIBRARIES = ("cupy-cuda13x", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, library versions and commit."""
    return machines.machine((*LIBRARIES, *GPU_LIBRARIES))


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
