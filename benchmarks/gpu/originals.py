"""The transformers as their authors run them: what the engines are measured against.

Diffusers' own for Latte and CogVideoX. Open-Sora is not in diffusers; its eager code here is that of our STDiT3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, LatteTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from foresight.engines.manifest import Manifest
from foresight.exporter.models.base import TORCH_DTYPES
from foresight.exporter.models.cogvideox.modules import rotary_tables
from foresight.exporter.models.open_sora import FPS
from foresight.exporter.models.open_sora.config import STDiT3Config
from foresight.exporter.models.open_sora.stdit3 import STDiT3


@dataclass(frozen=True)
class Step:
    """What every transformer takes: latents (B, …), text states (B, S, C), timesteps (B,), on one device."""

    latents: Tensor
    text: Tensor
    timestep: Tensor


@dataclass(frozen=True)
class Original:
    """A transformer, and one step as it takes it."""

    step: Step
    module: nn.Module
    arguments: dict[str, Any]


def load_original(checkpoint: Path, manifest: Manifest, sizes: Mapping[str, int], device: str) -> Original:
    """The transformer that a bundle was made from, in the bundle's dtype, and a step of random numbers."""
    dtype = TORCH_DTYPES[manifest.dtype]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    step = Step(
        latents=random(sizes["batch"], *manifest.shape.latents),
        text=random(*manifest.condition.input("text_states").resolve(sizes)),
        timestep=torch.full((sizes["batch"],), 500, device=device),
    )
    original = ORIGINALS[manifest.family](checkpoint, manifest, step)
    original.module.eval().to(device)
    return original


def _latte(checkpoint: Path, manifest: Manifest, step: Step) -> Original:
    dtype = TORCH_DTYPES[manifest.dtype]
    module = LatteTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=dtype)
    return Original(step, module, _diffusers_arguments(step))


def _cogvideox(checkpoint: Path, manifest: Manifest, step: Step) -> Original:
    dtype = TORCH_DTYPES[manifest.dtype]
    module = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=dtype)
    rotary = None
    if module.config.use_rotary_positional_embeddings:
        tables = rotary_tables(module, manifest.shape.latents)
        rotary = tuple(table.to(step.latents.device) for table in tables)
    return Original(step, module, _diffusers_arguments(step) | {"image_rotary_emb": rotary})


def _diffusers_arguments(step: Step) -> dict[str, Any]:
    return {
        "hidden_states": step.latents,
        "encoder_hidden_states": step.text,
        "timestep": step.timestep,
        "return_dict": False,
    }


def _open_sora(checkpoint: Path, manifest: Manifest, step: Step) -> Original:
    folder = checkpoint / "transformer"
    with torch.device("meta"):
        module = STDiT3(STDiT3Config.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    module.to(TORCH_DTYPES[manifest.dtype])
    arguments = {
        "latents": step.latents,
        "timestep": step.timestep,
        "text": step.text,
        "text_mask": torch.ones(step.text.shape[:2], dtype=torch.int64, device=step.text.device),
        "fps": FPS,
        "height": manifest.shape.height,
        "width": manifest.shape.width,
    }
    return Original(step, module, arguments)


ORIGINALS: dict[str, Callable[[Path, Manifest, Step], Original]] = {
    "latte": _latte,
    "cogvideox": _cogvideox,
    "open_sora": _open_sora,
}
