"""LoRA: low-rank updates of a checkpoint's weights, merged while these are read.

A file of them, as diffusers, PEFT, kohya and ComfyUI write it, holds for some modules two narrow matrices A and B, rank
r, and perhaps a number alpha: the weight becomes W + scale alpha / r B A, or without an alpha W + scale B A. Every
tensor of the file is merged or refused by name; what it updates is known from headers alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engines.errors import CheckpointError, InvalidRequest, one_line, quoted
from ..engines.files import file_record
from ..engines.manifest import LoraRecord
from .weights import LocalFiles, Stored, quantised, read_json, some

Weights = Mapping[str, Mapping[str, tuple[int, ...]]]  # by component: names and shapes

REMEDY = "give the .safetensors file of a LoRA"
DTYPES = ("F64", "F32", "F16", "BF16")
HALF = re.compile(r"(?P<module>.+?)[._](?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.\w+)?\.weight")
IS_A = {"lora_A": True, "lora_down": True, "lora.down": True, "lora_B": False, "lora_up": False, "lora.up": False}
ALPHA = ".alpha"
OUTER = ("base_model.model.", "diffusion_model.", "model.diffusion_model.")  # what writers put before all names
FLAT = {"lora_unet_": "transformer", "lora_transformer_": "transformer", "lora_te_": "text_encoder"}  # dots are gone
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "diff": "whole differences",
    "bias": "biases",
}
SETTINGS = "lora_adapter_metadata"  # in a file's own remarks, as diffusers writes them
CONFIG = "adapter_config.json"  # beside a file, as PEFT does
CHANGES_BASE = ("pissa", "olora", "corda")  # ways to begin a LoRA that take something off the weights it is for


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates, and what they are multiplied by. Raises InvalidRequest for no finite scale."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise InvalidRequest(f"lora: got a scale of {self.scale!r} for {self.path.name}, expected a finite number")


def lora_from_text(text: str) -> Lora:
    """FILE or FILE:SCALE; other colons belong to the file's name. Raises InvalidRequest."""
    path, colon, scale = text.rpartition(":")
    try:
        number = float(scale) if colon and path else None
    except ValueError:
        number = None
    return Lora(Path(text)) if number is None else Lora(Path(path), number)


@dataclass(frozen=True)
class _Update:
    """Of one weight: the names of A and B in the file, and alpha / r or where it is."""

    down: str
    up: str
    alpha: str | None
    rank: int
    module: str


@dataclass
class _Halves:
    """What a file holds of one module."""

    names: dict[bool, str] = field(default_factory=dict)  # of A under True, of B under False
    alpha: str | None = None


class LoraFile:
    """An opened Lora. `match` has to be called before `change`."""

    def __init__(self, lora: Lora) -> None:
        """Raises CheckpointError for a file that is none, or of another kind."""
        self.scale = lora.scale
        self.label = f"lora {lora.path.name}:"
        self._path = lora.path
        if lora.path.is_dir() or (lora.path.exists() and lora.path.suffix != ".safetensors"):
            got = "a folder" if lora.path.is_dir() else f"a {lora.path.suffix or 'file without a suffix'}"
            raise CheckpointError(f"{self.label} got {got}, expected safetensors; {REMEDY}, or save it as such")
        header = LocalFiles("lora", lora.path.parent, REMEDY).header(lora.path.name)
        self._stored: Mapping[str, Stored] = header.weights
        self._settings = self._read_settings(header.remarks)
        self._halves = self._read_halves()
        self._updates: dict[tuple[str, str], _Update] = {}

    @cached_property
    def record(self) -> LoraRecord:
        """What a manifest says of it."""
        return LoraRecord(file=self._path.name, sha256=file_record(self._path).sha256, scale=float(self.scale))

    @property
    def described(self) -> str:
        """In words."""
        return f"{self._path.name}, scale {self.scale:g}"

    @property
    def key(self) -> str:
        """The same for files that change weights alike."""
        return repr((self.record.sha256, float(self.scale), sorted(self._settings.items(), key=str)))

    def match(self, wanted: Weights) -> None:
        """Find the weight of each update among those that an export reads. Raises CheckpointError."""
        found: dict[tuple[str, str], _Update] = {}
        unknown = []
        for module, halves in self._halves.items():
            target = _find(module, wanted)
            if target is None:
                unknown.append(module)
                continue
            if target in found:
                raise CheckpointError(f"{self.label} updates {target[1]} twice, expected once; {REMEDY}")
            found[target] = self._update(module, halves, wanted[target[0]][target[1]])
            self._alpha(found[target])
        if unknown:
            raise CheckpointError(
                f"{self.label} {len(unknown)} of its {len(self._halves)} modules are none of this checkpoint's "
                f"({some(unknown)}), expected all; it was made for another model, give one for this"
            )
        self._updates = found

    def change(self, component: str, name: str) -> Tensor | None:
        """What is added to a weight, fp32, flat behind the first dimension; None where nothing is. CheckpointError."""
        update = self._updates.get((component, name))
        if update is None:
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                down, up = (file.get_tensor(half).float().flatten(1) for half in (update.down, update.up))
                alpha = float(file.get_tensor(update.alpha).reshape(())) if update.alpha else self._alpha(update)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.label} cannot be read ({one_line(error)}); {REMEDY}") from error
        change: Tensor = (self.scale * alpha / self._divisor(update)) * (up @ down)
        if not torch.isfinite(change).all():
            raise CheckpointError(
                f"{self.label} what it adds to {name} is not finite, expected numbers; download it again, or lower its "
                "scale"
            )
        return change

    def _update(self, module: str, halves: _Halves, shape: tuple[int, ...]) -> _Update:
        if set(halves.names) != {True, False}:
            missing = "A" if False in halves.names else "B"
            raise CheckpointError(f"{self.label} {module} has no lora_{missing}, expected both; download it again")
        down, up = (self._stored[halves.names[half]] for half in (True, False))
        rank = down.shape[0] if down.shape else 0
        fits = (rank == math.prod(up.shape[1:]) and up.shape[:1] == shape[:1]) and math.prod(
            down.shape[1:]
        ) == math.prod(shape[1:])
        if not fits:
            raise CheckpointError(
                f"{self.label} {module} has A of shape {down.shape} and B of {up.shape}, which do not make {shape}, "
                "the weight's; it was made for another model, give one for this"
            )
        if halves.alpha is not None and math.prod(self._stored[halves.alpha].shape) != 1:
            shape = self._stored[halves.alpha].shape
            raise CheckpointError(f"{self.label} {halves.alpha} has shape {shape}, expected one number; {REMEDY}")
        return _Update(halves.names[True], halves.names[False], halves.alpha, rank, module)

    def _read_halves(self) -> dict[str, _Halves]:
        halves: dict[str, _Halves] = {}
        for name, stored in self._stored.items():
            if name.endswith(ALPHA):
                halves.setdefault(name.removesuffix(ALPHA), _Halves()).alpha = name
                continue
            match = HALF.fullmatch(name)
            if match is None:
                kind = next((kind for sign, kind in OTHER_KINDS.items() if sign in name), None)
                got = f"{kind} ({name})" if kind else name
                raise CheckpointError(f"{self.label} got {got}, expected lora_A and lora_B of weights alone; {REMEDY}")
            if stored.dtype not in DTYPES:
                raise CheckpointError(quantised(self.label.removesuffix(":"), f"{name} is {stored.dtype}"))
            names = halves.setdefault(match["module"], _Halves()).names
            if IS_A[match["half"]] in names:
                raise CheckpointError(f"{self.label} holds several LoRAs ({name}), expected one; save them apart")
            names[IS_A[match["half"]]] = name
        if not halves:
            raise CheckpointError(f"{self.label} holds no weights, expected lora_A and lora_B; {REMEDY}")
        return halves

    def _read_settings(self, remarks: Mapping[str, str]) -> dict[str, Any]:
        """By the component they are for, "" for all, what its trainer wrote down."""
        try:
            flat = json.loads(remarks.get(SETTINGS, "{}"))
        except ValueError as error:
            raise CheckpointError(f"{self.label} its {SETTINGS} is no JSON; download it again") from error
        config = self._path.parent / CONFIG
        if not flat and config.is_file():
            flat = read_json(config, f"{self.label} {CONFIG}", REMEDY)
        settings: dict[str, Any] = dict(flat) if isinstance(flat, dict) else {}
        for name, value in settings.items():
            last = name.rpartition(".")[2]
            if (last == "use_dora" and value) or (last == "fan_in_fan_out" and value):
                raise CheckpointError(f"{self.label} has {last}, expected a plain LoRA; merge it with its own library")
            if last == "init_lora_weights" and str(value).startswith(CHANGES_BASE):
                raise CheckpointError(
                    f"{self.label} was begun with {value}, which changes the weights it is for, expected a plain LoRA; "
                    "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=…)"
                )
        return settings

    def _setting(self, update: _Update, name: str) -> Any:
        prefix = next((key for key in _prefixes(update.module) if f"{key}{name}" in self._settings), "")
        return self._settings.get(f"{prefix}{name}")

    def _alpha(self, update: _Update) -> float:
        """Of a module; without any, its rank, so that nothing is scaled. Raises CheckpointError."""
        patterns, alpha = self._setting(update, "alpha_pattern") or {}, self._setting(update, "lora_alpha")
        try:
            return float(_matching(patterns, update.module, update.rank if alpha is None else alpha))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{self.label} has lora_alpha {quoted(alpha)} and alpha_pattern {quoted(patterns)}, expected a number "
                f"and a table of patterns and numbers ({one_line(error)}); download it again"
            ) from error

    def _divisor(self, update: _Update) -> float:
        scaled = update.alpha is None and self._setting(update, "use_rslora")
        return math.sqrt(update.rank) if scaled else float(update.rank)


def merged(tensor: Tensor, loras: Sequence[LoraFile], component: str, name: str) -> Tensor:
    """A weight with what LoRAs change of it, fp32; the tensor itself where none does. Raises CheckpointError."""
    for lora in loras:
        change = lora.change(component, name)
        if change is not None:
            tensor = tensor.float() + change.reshape(tensor.shape)
    return tensor


def _matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """What a table of patterns has for a module."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def _prefixes(module: str) -> Iterator[str]:
    """What settings of that module's component begin with."""
    yield module.partition(".")[0] + "."
    yield ""


def _find(module: str, wanted: Weights) -> tuple[str, str] | None:
    """The component and the weight that a module's name in a LoRA stands for."""
    for prefix, component in FLAT.items():
        if module.startswith(prefix):
            flat = module.removeprefix(prefix)
            names = [name for name in wanted[component] if name.removesuffix(".weight").replace(".", "_") == flat]
            return (component, names[0]) if len(names) == 1 else None
    for outer in OUTER:
        module = module.removeprefix(outer)
    component, _, rest = module.partition(".")
    if component not in wanted:
        component, rest = "transformer", module
    name = f"{rest}.weight"
    return (component, name) if name in wanted[component] else None
