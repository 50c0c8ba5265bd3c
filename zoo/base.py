"""What the zoo offers of a family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foresight.engines.manifest import Manifest

Config = dict[str, Any]
Sizes = Mapping[str, Any]  # fields of an ExportRequest


@dataclass(frozen=True)
class Published:
    """A model as it is published, but for its weights.

    `files` are the configurations of its checkpoint by their names in it, `dtype` is what it is run in. `sizes` are
    those that it is measured at, by the titles of the results; the first one stands for the model. `kept` is how many
    samples and outputs its sampler keeps at once. A script that is only tried has a random checkpoint of the settings
    `small` instead, at `small_sizes`.
    """

    files: Mapping[str, Config]
    dtype: str
    sizes: Mapping[str, Sizes]
    small: Config = field(default_factory=dict)
    small_sizes: Sizes = field(default_factory=dict)
    kept: int = 2  # by DDIM and Euler

    def write(self, folder: Path) -> Path:
        """Write the configurations as a checkpoint without weights; returns its folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1))
        return folder


@dataclass(frozen=True)
class Example:
    """What tests export of a family: the settings of a random checkpoint in which all occurs that the family has.

    `model` is the name to export it by.
    """

    model: str
    settings: Config = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What every transformer takes: latents (B, …), text states (B, S, C), timesteps (B,), on one device."""

    latents: Tensor
    text: Tensor
    timestep: Tensor


@dataclass(frozen=True)
class Original:
    """A transformer as its authors run it, and one step as it takes it."""

    step: Step
    module: nn.Module
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One family of models.

    `write_random(folder, **settings)` writes a random checkpoint in the layout that the real ones are published in,
    and returns its folder. It is tiny unless the settings say otherwise: `transformer`, `text` (T5) and `vae` override
    what their config.json would have, as those of `published` do. `original(component, config)` makes the transformer
    or the VAE that a config.json describes by its authors' own code, `load_original(checkpoint, manifest, step)` the
    transformer with its weights, in the bundle's dtype. Nothing here imports torch before it is called.
    """

    title: str
    published: Mapping[str, Published]
    example: Example
    write_random: Callable[..., Path]
    original: Callable[[str, Config], nn.Module]
    load_original: Callable[[Path, Manifest, Step], Original]
