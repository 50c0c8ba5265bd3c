"""Whether what a checkpoint stores is what an export reads: names, shapes and dtypes, from headers alone.

A weight that is stored and not read means another model, so each is read by some part, known by the family to be of no
use (the VAE's encoder, say), or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from ..engines.errors import CheckpointError
from .checkpoint import READ_SUFFIXES, Checkpoint
from .models.base import Split
from .weights import QUANTISED_FILES, Stored, check_file, has_weights, quantised, some

# As safetensors names them. Floats that were cast as they are; what needs scales to be read is not among them.
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# What the last part of a name is called where a weight beside it is only right together with it: bitsandbytes, GPTQ,
# AWQ, compressed-tensors, ModelOpt, optimum-quanto, torchao, scaled fp8 of ComfyUI and DeepSeek.
SCALES = re.compile(
    r"SCB|weight_format|scaled?_(weight|input|inv|fp8)|(weight|input|output)_scale(_2|_inv)?|(nested_)?absmax|scales"
    r"|(nested_)?quant_(map|state)|(weight_)?zero_point|qweight|qzeros|qscales|q?zeros|(weight_)?g_idx"
    r"|weight_(packed|shape)|comfy_quant|_data|_scale|_shift|qdata|lut|svd_(up|down)"
)


def check_coverage(split: Split, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that stores other weights than the split reads, and LoRAs of others still.

    Raises CheckpointError with the remedy.
    """
    checkpoint.require_variant()
    _check_files(checkpoint)
    wanted: dict[str, dict[str, tuple[int, ...]]] = {component: {} for component in checkpoint.with_weights}
    for component, names in split.also_stored.items():
        wanted[component] |= names
    for plan in split.parts:
        wanted[plan.component].update(plan.reads(checkpoint))
    for component in checkpoint.with_weights:
        _check_config(checkpoint, component)
        label = checkpoint.label(component)
        check_names(label, wanted[component], checkpoint.stored(component), split.unneeded.get(component, ()))
    for lora in checkpoint.loras:
        lora.match(wanted, split.lora_names)


def _check_files(checkpoint: Checkpoint) -> None:
    """Refuse what stands in place of a tokenizer's or scheduler's file, a link to nothing say."""
    for component in ("tokenizer", "scheduler"):
        label, folder = checkpoint.label(component), checkpoint.component_folder(component)
        for path in sorted(folder.glob("*")):
            if path.suffix in READ_SUFFIXES and not path.is_dir():
                check_file(path, f"{label} {path.name}", checkpoint.remedy(component))


def has_any_weights(checkpoint: Checkpoint) -> bool:
    """Whether there is more than configurations, which are enough to tell what an export would take."""
    return any(has_weights(checkpoint.files(component)) for component in checkpoint.with_weights)


def check_names(
    label: str,
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    unneeded: Collection[str] = (),
) -> None:
    """Require that `wanted`, names and shapes, is stored, and nothing else but what matches a pattern of `unneeded`.

    Raises CheckpointError, which names some of what is wrong.
    """
    unknown = sorted(
        name for name in stored.keys() - wanted.keys() if not any(fnmatchcase(name, known) for known in unneeded)
    )
    scales = [name for name in unknown if any(map(SCALES.fullmatch, name.split(".")))]
    if scales:
        raise CheckpointError(quantised(label, f"it stores {len(scales)} scales, {some(scales)}"))
    odd = sorted(name for name in (*wanted, *unknown) if name in stored and stored[name].dtype not in PLAIN_DTYPES)
    if odd:
        kinds = ", ".join(sorted({stored[name].dtype for name in odd}))
        raise CheckpointError(quantised(label, f"{len(odd)} weights are {kinds}, {some(odd)}"))
    problems = [
        f"{len(names)} {kind} ({some(names)})"
        for kind, names in (("missing", sorted(wanted.keys() - stored.keys())), ("unknown", unknown))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{label}: weights {' and '.join(problems)}, expected the {len(wanted)} that its config.json makes; "
            "download it again, or give the checkpoint that this configuration belongs to"
        )
    _check_shapes(label, wanted, stored)


def _check_shapes(label: str, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]) -> None:
    wrong = sorted(name for name, shape in wanted.items() if stored[name].shape != shape)
    if wrong:
        name = wrong[0]
        others = f"; {len(wrong) - 1} more differ ({some(wrong[1:])})" if wrong[1:] else ""
        raise CheckpointError(
            f"{label} {name} has shape {stored[name].shape}, expected {wanted[name]} by its config.json{others}; "
            "download it again, or give the checkpoint that this configuration belongs to"
        )


def _check_config(checkpoint: Checkpoint, component: str) -> None:
    label = checkpoint.label(component)
    if checkpoint.config(component).get("transformers_weights"):
        raise CheckpointError(
            f"{label} names the file of its weights in its config.json (transformers_weights), which is not read; load "
            "it and save it with save_pretrained"
        )
    if checkpoint.config(component).get("quantization_config"):
        raise CheckpointError(quantised(label, "its config.json has a quantization_config"))
    files = sorted(set(QUANTISED_FILES) & set(checkpoint.files(component).names))
    if files:
        raise CheckpointError(quantised(label, f"it comes with {files[0]}"))
