"""`foresight export`: a checkpoint taken apart and written as a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..engines.errors import ForesightError
from ..engines.manifest import ModelDtype
from ..engines.progress import Progress
from ..engines.registry import COMPILERS, check_compiler
from ..engines.wording import MEBI
from ..exporter.registry import REGISTRY as MODELS
from ..exporter.registry import find_model
from .build import check_target, compile_engines
from .completion import names
from .console import print_result, progress
from .options import OUTPUT_FOLDER, alternatives, common, group
from .rows import (
    caution,
    compiled_row,
    describe_compiled,
    describe_dtypes,
    describe_loras,
    describe_profiles,
    describe_source,
)

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..exporter.plan import ExportPlan


NO_PROFILES = "profiles: none tuned for this model and these sizes; foresight tune makes some"


@dataclass(frozen=True)
class Job:
    """What to read, and what to write."""

    model: str
    checkpoint: str | None
    revision: str | None
    variant: str | None
    loras: tuple[str, ...]
    output: Path | None


@dataclass(frozen=True)
class Sizes:
    """The fields of an ExportRequest, which only torch's world can check."""

    dtype: ModelDtype
    vae_dtype: ModelDtype | None
    height: int | None
    width: int | None
    frames: int | None
    resolution: str | None
    aspect: str | None
    duration: str | None
    flow_shift: float | None
    max_batch: int


def _models() -> str:
    """The names in words."""
    demos = [name for name, model in MODELS.items() if model.comes_with_a_clone]
    published = [name for name in MODELS if name not in demos]
    return f"{alternatives(published)}; in a clone also {', '.join(demos)}."


def _preset(name: str) -> str:
    """What the families with tables of sizes say of one of their names."""
    return "  ".join(dict.fromkeys(model.presets[name] for model in MODELS.values() if name in model.presets))


@click.command()
@group(
    "job",
    Job,
    click.option(
        "--model",
        required=True,
        shell_complete=names([name for name, model in MODELS.items() if model.can_be_had]),
        help=_models(),
    ),
    click.option(
        "--checkpoint", help="A diffusers folder, a hub id or its page's address, instead of the model's own."
    ),
    click.option("--revision", help="Branch, tag or commit of a checkpoint on the hub.  [default: main]"),
    click.option("--variant", help="Read model.VARIANT.safetensors, fp16 say, of components that have it."),
    click.option(
        "--lora",
        "loras",
        metavar="FILE[:SCALE]",
        multiple=True,
        help="Merge a LoRA (.safetensors), FILE@transformer_2 into that component; may be given several times.",
    ),
    click.option("--output", type=OUTPUT_FOLDER, help="The bundle to write.  [default: bundles/MODEL]"),
)
@group(
    "sizes",
    Sizes,
    click.option(
        "--dtype",
        default="fp32",
        show_default=True,
        shell_complete=names(get_args(ModelDtype)),
        help="fp32, fp16 or bf16 (GPUs, and CPUs with openvino); the reuse metric stays fp32.",
    ),
    click.option(
        "--vae-dtype",
        shell_complete=names(get_args(ModelDtype)),
        help="The decoder's, where it is to be another.  [default: that of --dtype]",
    ),
    click.option("--height", type=int, help="Pixels.  [default: the checkpoint's]"),
    click.option("--width", type=int, help="Pixels.  [default: the checkpoint's]"),
    click.option("--frames", type=int, help="[default: the checkpoint's]"),
    click.option("--resolution", help=_preset("resolution")),
    click.option("--aspect", help=_preset("aspect")),
    click.option("--duration", help=_preset("duration")),
    click.option(
        "--flow-shift",
        type=float,
        help="Of schedulers of flows: more than 1 spends more steps on high noise.  [default: the checkpoint's]",
    ),
    click.option("--max-batch", type=int, default=4, show_default=True, help="Most prompts in one batch."),
)
@click.option("--opset", type=click.IntRange(18, 23), default=23, show_default=True, help="ONNX operator set.")
@click.option(
    "--backend",
    shell_complete=names(COMPILERS),
    help=f"Compile engines too: {alternatives(COMPILERS)}; as `build` does.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@common
def export(job: Job, sizes: Sizes, opset: int, backend: str | None, dry_run: bool, as_json: bool) -> None:
    """Take a checkpoint apart and write it as a bundle: one graph per block."""
    find_model(job.model)  # before torch, which takes its time
    with progress() as show:
        show(Progress("loading torch", 0, 0, ""))
        try:
            from ..exporter.export import Export, ExportRequest
        except ModuleNotFoundError as error:
            raise ForesightError(f"export: {error.name} is not installed; install foresight-engines[export]") from error
    if backend is not None:
        check_compiler(backend)
    from ..exporter.lora import lora_from_text

    request, loras = ExportRequest(**vars(sizes)), [lora_from_text(text) for text in job.loras]
    exported = Export(job.model, request, job.checkpoint, job.output, opset, job.revision, job.variant, loras)
    plan = exported.plan()
    if dry_run:
        print_result(plan, as_json, _describe_plan(plan))
        return
    if backend is not None:
        check_target(backend)
    exported.fetch()  # with the progress bars of the hub's library
    with progress() as show:
        bundle = exported.run(on_progress=show)
    row = _row(bundle, plan, exported.was_up_to_date)
    lines = _describe(bundle, plan, row)
    if backend is not None:
        compiled = compile_engines(bundle, backend)
        row["engines"] = compiled_row(compiled)
        lines += describe_compiled(compiled)
    print_result(row, as_json, lines)


def _row(bundle: Bundle, plan: ExportPlan, was_up_to_date: bool) -> dict[str, Any]:
    manifest = bundle.manifest
    in_grey_levels = {part.name for stage in manifest.decoder[-1:] for part in stage.parts}
    worst = max(manifest.parts, key=lambda part: 0 if part.name in in_grey_levels else part.max_difference)
    return {
        "bundle": str(bundle.path),
        "id": bundle.id,
        "was_up_to_date": was_up_to_date,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "blocks": len(manifest.blocks),
        "cache_bytes": plan.cache_bytes,
        "loras": list(plan.loras),
        "profiles": [profile.name for profile in manifest.profiles],
        "largest_difference": {"part": worst.name, "value": worst.max_difference},
        "cautions": list(manifest.cautions),
    }


def _describe(bundle: Bundle, plan: ExportPlan, row: dict[str, Any]) -> list[str]:
    found, worst = "is up to date: " if row["was_up_to_date"] else "", row["largest_difference"]
    return [
        f"{row['bundle']}: {found}{row['blocks']} blocks, {row['bytes'] / MEBI:.1f} MiB, {describe_dtypes(plan)}",
        f"largest difference from eager: {worst['value']:.2g} ({worst['part']})",
        f"cache for one guided prompt: {plan.cache_bytes / MEBI:.1f} MiB",
        *describe_loras(bundle.manifest.loras),
        *_describe_shift(plan),
        *(describe_profiles(bundle.manifest.profiles) or [NO_PROFILES]),
        *map(caution, plan.cautions),
    ]


def _describe_plan(plan: ExportPlan) -> list[str]:
    shape, dtypes = plan.shape, describe_dtypes(plan)
    return [
        f"would write {plan.output}: {plan.model} from {describe_source(plan)}, {dtypes}, opset {plan.opset}",
        f"video: {shape['frames']} frames of {shape['height']} x {shape['width']}",
        *(f"lora: {lora}" for lora in plan.loras),
        *_describe_shift(plan),
        *([f"download: {plan.download_bytes / MEBI:.1f} MiB"] if plan.download_bytes else []),
        f"graphs: {len(plan.parts)}, of which {plan.blocks} blocks of {plan.kinds} kinds",
        f"size: {plan.bundle_bytes / MEBI:.1f} MiB of weights ({plan.free_disk_bytes / MEBI:.0f} MiB free)",
        f"cache for one guided prompt: {plan.cache_bytes / MEBI:.1f} MiB",
        *map(caution, plan.cautions),
    ]


def _describe_shift(plan: ExportPlan) -> list[str]:
    shift = plan.flow_shift
    return [] if shift is None else [f"flow shift: {shift['value']:g}, {shift['reason']}; --flow-shift sets another"]
