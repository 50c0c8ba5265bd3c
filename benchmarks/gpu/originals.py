"""The transformers as their authors run them: what the engines are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foresight.engines.manifest import Manifest
from foresight.exporter.models.base import TORCH_DTYPES
from zoo import FAMILIES
from zoo.base import Original, Step


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
    original = FAMILIES[manifest.family].load_original(checkpoint, manifest, step)
    original.module.eval().to(device)
    return original
