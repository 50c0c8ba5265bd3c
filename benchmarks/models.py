"""What every model takes: weights, bundle, memory of a guided prompt; and, of the demo models, the time of a step.

The published models are counted from their configurations, so nothing is downloaded and nothing of them is run. The
demo models are exported and run on this machine's CPU, a request without reuse to warm up and some to measure.

    python -m benchmarks.models --save
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foresight
from benchmarks.common import finish, median, table
from foresight.engines.manifest import (
    FileRecord,
    Manifest,
    SamplerSettings,
    Source,
    part_files,
)
from foresight.exporter.export import Export, ExportRequest, manifest_from_export
from foresight.exporter.models.base import Split
from foresight.exporter.registry import REGISTRY
from foresight.runtime.memory import plan_memory
from zoo import PUBLISHED, write_published
from zoo.base import Sizes

NO_FILE = ""  # where a hash belongs of what nobody wrote


@dataclass(frozen=True)
class Case:
    """A model by its name on the command line; the dtype and sizes to count it for, as `export` takes them."""

    model: str
    dtype: Any
    sizes: Sizes = field(default_factory=dict)

    @property
    def is_demo(self) -> bool:
        """Whether its weights are in the repository."""
        return REGISTRY[self.model].comes_with_a_clone

    @property
    def request(self) -> ExportRequest:
        """What to export."""
        return ExportRequest(self.dtype, **self.sizes)


CASES = (
    *(Case(model, known.dtype, sizes) for model, known in PUBLISHED.items() for sizes in known.sizes.values()),
    *(Case(model, "fp32") for model, row in REGISTRY.items() if row.comes_with_a_clone),
)


def count(case: Case, work: Path) -> dict[str, Any]:
    """What a published model takes, from its configuration alone."""
    export = Export(case.model, case.request, str(write_published(case.model, work / case.model)), work / "bundle")
    manifest = manifest_without_files(export, PUBLISHED[case.model].kept)
    return facts(export, case, manifest)


def measure(case: Case, work: Path, requests: int) -> dict[str, Any]:
    """What a demo model takes, from its bundle, and a guided step's time on the CPU, without reuse.

    That is the median step of the fastest request, which other programs on the machine disturbed least.
    """
    export = Export(case.model, case.request, None, work / "bundle")
    with foresight.load(export.run().path) as pipeline:
        prompt = pipeline.manifest.defaults.prompt
        traces = [pipeline(prompt, policy=foresight.NoReuse()).trace for _ in range(1 + requests)][1:]
        step_ms = min(median(step.milliseconds for step in trace.steps) for trace in traces)
        return facts(export, case, pipeline.manifest) | {"step_ms": step_ms}


def facts(export: Export, case: Case, manifest: Manifest) -> dict[str, Any]:
    """A row of the result; sizes in bytes, memory as it is planned for one guided prompt."""
    memory, low_memory = (plan_memory(manifest, low_memory=low) for low in (False, True))
    forecast = plan_memory(manifest, slots=0, outputs=foresight.Forecast.outputs)
    return {
        "model": case.model,
        "checkpoint": f"demo/{export.row.family}" if case.is_demo else _first(export.row.checkpoint),
        "sizes": dict(case.sizes),
        "dtype": manifest.dtype,
        "frames": manifest.shape.frames,
        "height": manifest.shape.height,
        "width": manifest.shape.width,
        "parameters": _parameters(export.split),
        "bundle_bytes": sum(record.bytes for record in manifest.files.values()),
        "cache_bytes": memory.cache,
        "memory_bytes": memory.total,
        "low_memory_bytes": low_memory.total,
        "forecast_bytes": forecast.total,
    }


def manifest_without_files(export: Export, kept: int) -> Manifest:
    """The manifest that an export would write, as far as memory is counted from it; `kept` is the sampler's."""
    split = export.split
    parts = {plan.name: plan.part for plan in split.parts}
    files = {part_files(parts[plan.name])[1]: _record(plan.module) for plan in split.parts}
    sampler = SamplerSettings(table=NO_FILE, scheduler=NO_FILE, max_steps=1, kept=kept)
    source = Source(checkpoint=export.model, sha256=NO_FILE)
    return manifest_from_export(export, parts, files, sampler, source, generator={})


def _first(place: str | Mapping[str, str]) -> str:
    """Where a checkpoint is published; of one whose components are published apart, the transformer."""
    return place if isinstance(place, str) else place["transformer"]


def _record(module: Any) -> FileRecord:
    return FileRecord(bytes=sum(p.numel() * p.element_size() for p in module.parameters()), sha256=NO_FILE)


def _parameters(split: Split) -> int:
    """Of all weights that are read. What the later chunks of a decoder's stage run has the weights of the first."""
    again = {stage.next.name for stage in split.decoder if stage.next is not None}
    return sum(p.numel() for plan in split.parts if plan.name not in again for p in plan.module.parameters())


def main() -> None:
    """Count and measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5, help="measured, of each demo model")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/models.json")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            rows.append(measure(case, work, options.requests) if case.is_demo else count(case, work))
    names = (
        "model",
        "dtype",
        "parameters",
        "bundle_bytes",
        "memory_bytes",
        "low_memory_bytes",
        "forecast_bytes",
        "step_ms",
    )
    print(table([[row.get(name, "") for name in names] for row in rows], names))
    finish("models", {"rows": rows}, options.save)


if __name__ == "__main__":
    main()
