"""What one run measures: where it lies, the device it runs on, and the sizes of the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.step_time import ROWS, TEXT_TOKENS
from foresight.engines.bundle import open_bundle
from foresight.engines.manifest import Manifest, Part, largest_sizes

if TYPE_CHECKING:  # what exports needs torch, which may be missing here
    from foresight.exporter.export import Export

COMPILING = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*COMPILING, "onnxruntime")


@dataclass(frozen=True)
class Setup:
    """What is measured. `size` are the fields of an ExportRequest that say how large the video is."""

    model: str
    device: str
    dtype: str
    opset: int
    size: Mapping[str, Any]
    checkpoint: Path
    bundle: Path
    graph: Path

    @property
    def threads(self) -> int | None:
        """One on a CPU, which is for trying the script: threads that wait for each other suffer from company."""
        return 1 if self.device == "cpu" else None

    @property
    def manifest(self) -> Manifest:
        """The bundle's. Raises BundleError where there is none."""
        return open_bundle(self.bundle).manifest

    @property
    def transformer(self) -> Part:
        """The whole transformer as one part."""
        manifest = self.manifest
        return whole_part((manifest.prologue, *manifest.blocks, manifest.epilogue), manifest.streams)

    @property
    def sizes(self) -> dict[str, int]:
        """The named dimensions of the request that is measured."""
        return request_sizes(self.manifest.ranges)

    def export(self) -> Export:
        """The export that makes the bundle; it also knows how the checkpoint falls into parts."""
        from foresight.exporter.export import Export
        from foresight.exporter.models.base import ExportRequest

        request = ExportRequest(dtype=self.dtype, max_batch=ROWS // 2, **self.size)  # type: ignore[arg-type]
        return Export(self.model, request, str(self.checkpoint), self.bundle, self.opset)

    def plan_path(self, backend: str) -> Path:
        """Where the plan of the whole transformer for this device lies. Raises EngineError."""
        from foresight.engines.compiled import fingerprint
        from foresight.engines.tensorrt.library import find_target

        return self.graph.with_name(f"{backend}-{fingerprint(find_target(backend, self.device))}.plan")


def request_sizes(ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The named dimensions of one guided prompt: a text of common length, all else as large as the ranges allow."""
    shortest, longest = ranges["text"]
    return largest_sizes(ranges, batch=ROWS, text=max(shortest, min(TEXT_TOKENS, longest)))


def whole_part(parts: Sequence[Part], streams: Sequence[str]) -> Part:
    """Parts in a row as one: the inputs that none of them computes, and what comes out at the end."""
    inside = {spec.name for part in parts for spec in part.outputs} | {f"cached_{name}" for name in streams}
    inputs = {spec.name: spec for part in parts for spec in part.inputs if spec.name not in inside}
    return Part(
        name="transformer",
        kind="transformer",
        graph="transformer.onnx",
        inputs=tuple(inputs.values()),
        outputs=parts[-1].outputs,
        max_difference=0.0,
    )
