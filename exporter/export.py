"""The export job: take a checkpoint apart, write one graph per part, check each against eager, make the bundle.

Everything is written into `<output>.partial`, with a record of what is done, and renamed at the end: a bundle exists
whole or not at all, and an interrupted export goes on where it stopped. One part's weights are in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import onnx
import torch
import transformers

from ..engines import progress as told
from ..engines.bundle import (
    MANIFEST,
    SCHEMA,
    Bundle,
    mark_as_newest,
    open_bundle,
    refuse_inside_bundle,
    verify_files,
)
from ..engines.errors import BundleError, IntegrityError, InvalidRequest, OutputError
from ..engines.files import resumable, write_atomically
from ..engines.manifest import (
    Expert,
    FileRecord,
    Manifest,
    Part,
    PolicyProfile,
    SamplerSettings,
    Source,
    Stage,
    stream_bytes_per_row,
)
from ..engines.progress import OnPart, OnProgress, silent
from .check import TOLERANCES, check_part
from .checkpoint import Checkpoint, find_checkpoint
from .coverage import check_coverage, has_any_weights
from .graph import Graph, graph_from_module, write_graph
from .lora import Lora, LoraFile
from .models import split_checkpoint
from .models.base import ExportRequest as ExportRequest  # what Export takes
from .models.base import PartPlan, Split, StagePlan, assign_parameters
from .partial import KEY, PartialBundle
from .plan import ExportPlan, plan_export
from .registry import find_model
from .sampler import check_scheduler, sampler_from_table, write_table

OPSET = 23
SAMPLER = "sampler.npz"


@dataclass(frozen=True)
class _Doing:
    """Says what is being done with a part."""

    on_progress: OnProgress
    done: int
    total: int
    part: str

    def tell(self, what: str) -> None:
        self.on_progress(told.Progress("exporting", self.done, self.total, "parts", f"{what} {self.part}"))


class Export:
    """One export: `model` is a registered name, `checkpoint` a folder or hub id (default: the model's own).

    `revision` is of the hub, `variant` one that weights are there of, such as fp16. Of a checkpoint on the hub only
    configurations and headers are downloaded before `fetch` or `run`. `loras` are merged into the weights.
    """

    def __init__(
        self,
        model: str,
        request: ExportRequest | None = None,
        checkpoint: str | None = None,
        output: Path | None = None,
        opset: int = OPSET,
        revision: str | None = None,
        variant: str | None = None,
        loras: Sequence[Lora] = (),
    ) -> None:
        self.model = model
        self.row = find_model(model)
        self.request = request or ExportRequest()
        self.was_up_to_date = False
        self._is_own = checkpoint in (None, self.row.checkpoint)
        self.opset = opset
        self.output = output or Path("bundles") / model
        if self.output.name in ("", ".."):
            raise InvalidRequest(f"output: got {str(self.output)!r}, expected the name of the folder to make")
        self.checkpoint: Checkpoint = find_checkpoint(checkpoint or self.row.checkpoint, revision, variant)
        self.checkpoint.loras = tuple(map(LoraFile, loras))
        self.split: Split = split_checkpoint(self.row.family, self.checkpoint, self.request)

    def plan(self) -> ExportPlan:
        """What `run` would do; writes nothing. Raises CheckpointError, OutputError where that could not be done."""
        _check_free(self.output)
        if not self.checkpoint.is_local or has_any_weights(self.checkpoint):
            check_scheduler(self.split.scheduler(), self.row.defaults.steps)
        plan = plan_export(self.model, self.request, self.opset, self.checkpoint, self.split, self.output)
        if self.checkpoint.is_local and has_any_weights(self.checkpoint):
            _ = self._tokenizer
        return plan

    @cached_property
    def _tokenizer(self) -> str:
        return self.split.tokenizer()

    def fetch(self) -> None:
        """Check the checkpoint by its headers, then download all that is read of it; a folder is there already.

        Raises CheckpointError.
        """
        if not self.checkpoint.is_local:
            check_coverage(self.split, self.checkpoint)
            self.checkpoint.fetch()

    def run(self, progress: OnPart = lambda done, total, name: None, on_progress: OnProgress | None = None) -> Bundle:
        """Write the bundle, or find that it is there already, made from the same checkpoint in the same way.

        `was_up_to_date` then says which; either way it is the newest, which `run` takes where it is given none.
        `progress` is told the parts done, their number and the one that comes next; `on_progress` also of the
        bytes that are hashed before. Raises CheckpointError, ExportError, OutputError.
        """
        self.fetch()
        self.checkpoint.hash(on_progress)
        present = self._present(on_progress)
        self.was_up_to_date = present is not None
        if present is not None:
            mark_as_newest(present)
            return present
        _check_free(self.output)
        self.check()
        with resumable(self.output, f"export to {self.output}", again="export") as partial:
            bundle = PartialBundle(partial, self.key)
            self._write_tables(bundle)
            self._write_parts(bundle, progress, on_progress or silent)
            sampler = sampler_from_table(partial / SAMPLER, self.split.scheduler())
            generator = _versions() | {KEY: self.key}
            bundle.finish(manifest_from_export(self, bundle.parts, bundle.files, sampler, self.source, generator))
        return open_bundle(self.output)

    def check(self) -> None:
        """Refuse a checkpoint whose weights are not those that the export reads. Raises CheckpointError."""
        check_coverage(self.split, self.checkpoint)
        self.split.check()

    @property
    def profiles(self) -> tuple[PolicyProfile, ...]:
        """Those that were tuned for the model, for its own checkpoint and sizes in fp32; for others there are none."""
        own = replace(ExportRequest(), max_batch=self.request.max_batch)
        is_own = self.request == own and self._is_own and not self.checkpoint.loras
        return self.row.profiles() if is_own else ()

    @property
    def source(self) -> Source:
        """What the manifest says of the checkpoint."""
        return Source(
            checkpoint=_public_name(self.checkpoint),
            sha256=self.checkpoint.sha256,
            revision=self.checkpoint.revision,
            variant=self.checkpoint.read_variant,
        )

    @property
    def key(self) -> str:
        """Names this export: two with the same key write the same bundle."""
        parts: tuple[Any, ...] = (SCHEMA, self.checkpoint.sha256, self.request.asked(), self.opset)
        parts += (_versions(), self.model)
        if self.checkpoint.revision is not None:
            parts += (self.checkpoint.revision,)
        parts += tuple(lora.key for lora in self.checkpoint.loras)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _present(self, on_progress: OnProgress | None) -> Bundle | None:
        try:
            bundle = open_bundle(self.output)
            if bundle.manifest.generator.get(KEY) != self.key:
                return None
            verify_files(bundle, on_progress)
        except (BundleError, IntegrityError):
            return None
        return bundle

    def _write_tables(self, bundle: PartialBundle) -> None:
        """Tokenizer and sampler: done first, as they take a second and may be refused."""
        names = (self.split.text.tokenizer, SAMPLER)
        if not bundle.has(*names):
            write_atomically(bundle.folder / self.split.text.tokenizer, self._tokenizer.encode())
            write_table(self.split.scheduler(), bundle.folder / SAMPLER)
            bundle.record(names)

    def _write_parts(self, bundle: PartialBundle, progress: OnPart, on_progress: OnProgress) -> None:
        plans = list(self.split.parts)
        graphs: dict[str, Graph] = {}
        for index, plan in enumerate(plans):
            progress(index, len(plans), plan.name)
            doing = _Doing(on_progress, index, len(plans), plan.name)
            if not bundle.has_part(plan.name):
                self._write_part(bundle, plan, graphs, doing)
        progress(len(plans), len(plans), "done")

    def _write_part(self, bundle: PartialBundle, plan: PartPlan, graphs: dict[str, Graph], doing: _Doing) -> None:
        if plan.kind not in graphs:
            doing.tell("tracing")
            graphs[plan.kind] = graph_from_plan(plan, self.opset)
        doing.tell("writing")
        assign_parameters(plan.module, lambda name: plan.parameter(self.checkpoint, name))
        files = write_graph(graphs[plan.kind], plan.module.get_parameter, bundle.folder / plan.part.graph)
        doing.tell("checking")
        difference = check_part(plan, files[0], TOLERANCES[self.request.dtype_of(plan.component)])
        assign_parameters(plan.module, lambda name: plan.module.get_parameter(name).to("meta"))
        bundle.record([file.name for file in files], msgspec.structs.replace(plan.part, max_difference=difference))


def graph_from_plan(plan: PartPlan, opset: int) -> Graph:
    """The graph of a part, traced with parameters that nobody touches and so take no memory. Raises ExportError.

    torch.onnx keeps some of them for as long as the graph lives; of a mapped checkpoint that would be the whole file.
    """
    assign_parameters(plan.module, lambda name: torch.empty_like(plan.module.get_parameter(name), device="cpu"))
    generator = torch.Generator().manual_seed(0)
    sizes = plan.check_sizes[-1]
    return graph_from_module(
        plan.module,
        inputs={i.spec.name: i.example(sizes, generator) for i in plan.inputs},
        outputs=[spec.name for spec in plan.outputs],
        dynamic={
            i.spec.name: {axis: dim for axis, dim in enumerate(i.spec.shape) if isinstance(dim, str)}
            for i in plan.inputs
        },
        opset=opset,
    )


def manifest_from_export(
    export: Export,
    parts: Mapping[str, Part],
    files: dict[str, FileRecord],
    sampler: SamplerSettings,
    source: Source,
    generator: dict[str, str],
) -> Manifest:
    """The manifest of the bundle that an export makes, of these parts and files."""
    split = export.split
    blocks = tuple(parts[plan.name] for plan in split.blocks)
    return Manifest(
        schema=SCHEMA,
        model=export.model,
        family=export.row.family,
        source=source,
        generator=generator,
        dtype=export.request.dtype,
        vae_dtype=export.request.vae_dtype,
        opset=export.opset,
        shape=split.shape,
        ranges=split.ranges,
        streams=split.streams,
        guidance_order=split.guidance_order,
        text_encoder=parts["text_encoder"],
        condition=parts["condition"],
        prologue=parts["prologue"],
        blocks=blocks,
        epilogue=parts["epilogue"],
        decoder=tuple(_stage_from_plan(stage, parts) for stage in split.decoder),
        text=split.text,
        sampler=sampler,
        defaults=export.row.defaults,
        cache_bytes_per_row={block.name: stream_bytes_per_row(block, split.streams, split.ranges) for block in blocks},
        loras=tuple(lora.record for lora in export.checkpoint.loras),
        cautions=split.cautions,
        files=files,
        later_experts=tuple(_later_experts(export, parts)),
        profiles=export.profiles,
    )


def _later_experts(export: Export, parts: Mapping[str, Part]) -> Iterator[Expert]:
    defaults = export.row
    for index, plan in enumerate(export.split.later_experts):
        own = defaults.later_guidances[index : index + 1]
        yield Expert(
            below=plan.below,
            condition=parts[plan.condition.name],
            prologue=parts[plan.prologue.name],
            blocks=tuple(parts[block.name] for block in plan.blocks),
            epilogue=parts[plan.epilogue.name],
            guidance=own[0] if own else defaults.defaults.guidance,
        )


def _stage_from_plan(plan: StagePlan, parts: Mapping[str, Part]) -> Stage:
    later = None if plan.next is None else parts[plan.next.name]
    return Stage(first=parts[plan.first.name], next=later, axis=plan.axis, chunks=plan.chunks)


def _versions() -> dict[str, str]:
    libraries = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "onnx": onnx}
    return {name: str(library.__version__) for name, library in libraries.items()}


def _public_name(checkpoint: Checkpoint) -> str:
    """A folder's name without the path that leads to it, which is nobody else's business."""
    return checkpoint.folder.name if Path(checkpoint.name).is_dir() else checkpoint.name


def _check_free(output: Path) -> None:
    """Refuse to write into a bundle, or over anything but one. Raises InvalidRequest, OutputError."""
    refuse_inside_bundle(output)
    if output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir())):
        return
    if output.exists():
        raise OutputError(f"export to {output}: something that is no bundle is there; choose another output")
