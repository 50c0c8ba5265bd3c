"""LoRA: low-rank updates of a checkpoint's weights, merged while these are read.

A file of them, as diffusers, PEFT, kohya and ComfyUI write it, holds for some modules two narrow matrices A and B, rank
r, and perhaps a number alpha: the weight becomes W + scale alpha / r B A, or without an alpha W + scale B A. Whole
differences D of weights, biases and norms may be there as well: W + scale D. Every tensor of the file is merged or
refused by name; what it updates is known from headers alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engines.errors import CheckpointError, InvalidRequest, one_line, quoted
from ..engines.files import file_record
from ..engines.manifest import LoraRecord
from .lora_names import LoraNames, Targets, Weights
from .weights import LocalFiles, Stored, quantised, read_json, some

REMEDY = "give the .safetensors file of a LoRA"
DTYPES = ("F64", "F32", "F16", "BF16")
HALF = re.compile(r"(?P<module>.+?)[._](?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.\w+)?\.weight")
IS_A = {"lora_A": True, "lora_down": True, "lora.down": True, "lora_B": False, "lora_up": False, "lora.up": False}
ALPHA = ".alpha"
WEIGHT = (".weight",)
# How a difference's name ends, and that of what it is added to: a parameter of a module, or one that is none's.
DIFFERENCE = re.compile(r"(?P<module>.+)(?P<ending>\.diff(_b|_m)?)")
DIFFERS = {".diff": (".weight", ""), ".diff_b": (".bias",), ".diff_m": (".modulation",)}
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "bias": "biases",
}
SETTINGS = "lora_adapter_metadata"  # in a file's own remarks, as diffusers writes them
CONFIG = "adapter_config.json"  # beside a file, as PEFT does
CHANGES_BASE = ("pissa", "olora", "corda")  # ways to begin a LoRA that take something off the weights it is for


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates, and what they are multiplied by. Raises InvalidRequest for no finite scale.

    `component` is the one of the checkpoint that it is for, where its names do not say.
    """

    path: Path
    scale: float = 1.0
    component: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise InvalidRequest(f"lora: got a scale of {self.scale!r} for {self.path.name}, expected a finite number")


def lora_from_text(text: str) -> Lora:
    """FILE[:SCALE][@COMPONENT]; other colons and signs belong to the file's name. Raises InvalidRequest."""
    before, _, component = text.rpartition("@")
    if before and component.isidentifier():
        return replace(lora_from_text(before), component=component)
    path, colon, scale = text.rpartition(":")
    try:
        number = float(scale) if colon and path else None
    except ValueError:
        number = None
    return Lora(Path(text)) if number is None else Lora(Path(path), number)


class _Settings:
    """What a file's trainer wrote down, by the component it is for, "" for all."""

    def __init__(self, label: str, remarks: Mapping[str, str], config: Path) -> None:
        """Raises CheckpointError for what is unreadable, or makes it no plain LoRA."""
        self._label = label
        try:
            flat = json.loads(remarks.get(SETTINGS, "{}"))
        except ValueError as error:
            raise CheckpointError(f"{label} its {SETTINGS} is no JSON; download it again") from error
        if not flat and config.is_file():
            flat = read_json(config, f"{label} {CONFIG}", REMEDY)
        self.values: dict[str, Any] = dict(flat) if isinstance(flat, dict) else {}
        for name, value in self.values.items():
            last = name.rpartition(".")[2]
            if (last == "use_dora" and value) or (last == "fan_in_fan_out" and value):
                raise CheckpointError(f"{label} has {last}, expected a plain LoRA; merge it with its own library")
            if last == "init_lora_weights" and str(value).startswith(CHANGES_BASE):
                raise CheckpointError(
                    f"{label} was begun with {value}, which changes the weights it is for, expected a plain LoRA; "
                    "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=…)"
                )

    def alpha(self, module: str, rank: int) -> float:
        """Of a module; without any, its rank, so that nothing is scaled. Raises CheckpointError."""
        patterns, alpha = self._of(module, "alpha_pattern") or {}, self._of(module, "lora_alpha")
        try:
            return float(_matching(patterns, module, rank if alpha is None else alpha))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{self._label} has lora_alpha {quoted(alpha)} and alpha_pattern {quoted(patterns)}, expected a number "
                f"and a table of patterns and numbers ({one_line(error)}); download it again"
            ) from error

    def divisor(self, module: str, rank: int) -> float:
        """What that alpha is divided by."""
        return math.sqrt(rank) if self._of(module, "use_rslora") else float(rank)

    def _of(self, module: str, name: str) -> Any:
        prefix = next((key for key in _prefixes(module) if f"{key}{name}" in self.values), "")
        return self.values.get(f"{prefix}{name}")


class _Change(Protocol):
    """Of one weight; `endings` are how that one's name may end behind the module's."""

    @property
    def module(self) -> str: ...

    @property
    def endings(self) -> tuple[str, ...]: ...

    def problem(self, stored: Mapping[str, Stored], shape: tuple[int, ...]) -> str | None:
        """Why it cannot be made to a weight of that shape, by the headers, with the remedy; None where it can."""

    def read(self, file: Any, settings: _Settings, scale: float) -> Tensor:
        """What is added, fp32, in as many elements; `file` is an opened safetensors."""


@dataclass
class _LowRank:
    """The halves of a module's update, and alpha if the file has one."""

    module: str
    names: dict[bool, str] = field(default_factory=dict)  # of A under True, of B under False
    alpha: str | None = None
    endings: tuple[str, ...] = WEIGHT

    def problem(self, stored: Mapping[str, Stored], shape: tuple[int, ...]) -> str | None:
        if set(self.names) != {True, False}:
            missing = "A" if False in self.names else "B"
            return f"{self.module} has no lora_{missing}, expected both; download it again"
        down, up = (stored[self.names[half]] for half in (True, False))
        rank = down.shape[0] if down.shape else 0
        fits = (rank == math.prod(up.shape[1:]) and up.shape[:1] == shape[:1]) and math.prod(
            down.shape[1:]
        ) == math.prod(shape[1:])
        if not fits:
            return (
                f"{self.module} has A of shape {down.shape} and B of {up.shape}, which do not make {shape}, the "
                "weight's; it was made for another model, give one for this"
            )
        if self.alpha is not None and math.prod(stored[self.alpha].shape) != 1:
            return f"{self.alpha} has shape {stored[self.alpha].shape}, expected one number; {REMEDY}"
        return None

    def read(self, file: Any, settings: _Settings, scale: float) -> Tensor:
        down, up = (file.get_tensor(self.names[half]).float().flatten(1) for half in (True, False))
        rank = down.shape[0]
        if self.alpha:
            factor = scale * float(file.get_tensor(self.alpha).reshape(())) / rank
        else:
            factor = scale * settings.alpha(self.module, rank) / settings.divisor(self.module, rank)
        change: Tensor = factor * (up @ down)
        return change


@dataclass(frozen=True)
class _Difference:
    """A tensor that is added as it is."""

    module: str
    endings: tuple[str, ...]
    name: str

    def problem(self, stored: Mapping[str, Stored], shape: tuple[int, ...]) -> str | None:
        got = stored[self.name].shape
        if got == shape:
            return None
        return f"{self.name} has shape {got}, expected {shape}; it was made for another model, give one for this"

    def read(self, file: Any, settings: _Settings, scale: float) -> Tensor:
        change: Tensor = scale * file.get_tensor(self.name).float()
        return change


class LoraFile:
    """An opened Lora. `match` has to be called before `change`."""

    def __init__(self, lora: Lora) -> None:
        """Raises CheckpointError for a file that is none, or of another kind."""
        self.scale, self.component = lora.scale, lora.component
        self.label = f"lora {lora.path.name}:"
        self._path = lora.path
        if lora.path.is_dir() or (lora.path.exists() and lora.path.suffix != ".safetensors"):
            got = "a folder" if lora.path.is_dir() else f"a {lora.path.suffix or 'file without a suffix'}"
            raise CheckpointError(f"{self.label} got {got}, expected safetensors; {REMEDY}, or save it as such")
        header = LocalFiles("lora", lora.path.parent, REMEDY).header(lora.path.name)
        self._stored: Mapping[str, Stored] = header.weights
        self._settings = _Settings(self.label, header.remarks, lora.path.parent / CONFIG)
        self._changes = self._read_changes()
        self._found: dict[tuple[str, str], _Change] = {}

    @cached_property
    def record(self) -> LoraRecord:
        """What a manifest says of it."""
        sha256 = file_record(self._path).sha256
        return LoraRecord(file=self._path.name, sha256=sha256, scale=float(self.scale), component=self.component)

    @property
    def described(self) -> str:
        """In words."""
        return f"{self._path.name}, scale {self.scale:g}{f', for {self.component}' if self.component else ''}"

    @property
    def key(self) -> str:
        """The same for files that change weights alike."""
        component = () if self.component is None else (self.component,)
        return repr((self.record.sha256, float(self.scale), sorted(self._settings.values.items(), key=str), *component))

    def match(self, wanted: Weights, names: LoraNames) -> None:
        """Find the weight of each change among those that an export reads. Raises CheckpointError."""
        targets = Targets(wanted, names, self.component)
        unplaced = targets.why_unplaced(self._path.name, [change.module for change in self._changes.values()])
        if unplaced is not None:
            raise CheckpointError(f"{self.label} {unplaced}")
        found: dict[tuple[str, str], _Change] = {}
        unknown = []
        for shown, change in self._changes.items():
            target = targets.find(change.module, change.endings)
            if target is None:
                unknown.append(shown)
                continue
            if target in found:
                raise CheckpointError(f"{self.label} updates {target[1]} twice, expected once; {REMEDY}")
            problem = change.problem(self._stored, wanted[target[0]][target[1]])
            if problem is not None:
                raise CheckpointError(f"{self.label} {problem}")
            self._settings.alpha(change.module, 1)  # which is refused where it is no number
            found[target] = change
        self._refuse(unknown, names)
        self._found = found

    def change(self, component: str, name: str) -> Tensor | None:
        """What is added to a weight, fp32, in as many elements; None where nothing is. Raises CheckpointError."""
        found = self._found.get((component, name))
        if found is None:
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                change = found.read(file, self._settings, self.scale)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.label} cannot be read ({one_line(error)}); {REMEDY}") from error
        if not torch.isfinite(change).all():
            raise CheckpointError(
                f"{self.label} what it adds to {name} is not finite, expected numbers; download it again, or lower its "
                "scale"
            )
        return change

    def _refuse(self, unknown: Sequence[str], names: LoraNames) -> None:
        """Modules that the checkpoint does not have, where there are any."""
        of_others = [module for module in unknown if names.whose(module)]
        count = f"{len(of_others or unknown)} of its {len(self._changes)} modules"
        if of_others:
            raise CheckpointError(
                f"{self.label} {count} are of {names.whose(of_others[0])} ({some(of_others)}); give one for this model"
            )
        if unknown:
            raise CheckpointError(
                f"{self.label} {count} are none of this checkpoint's ({some(unknown)}), expected all; it was made for "
                "another model, give one for this"
            )

    def _read_changes(self) -> dict[str, _Change]:
        """By what messages call them."""
        halves: dict[str, _LowRank] = {}
        differences: dict[str, _Difference] = {}
        for name, stored in self._stored.items():
            if name.endswith(ALPHA):
                module = name.removesuffix(ALPHA)
                halves.setdefault(module, _LowRank(module)).alpha = name
                continue
            match = HALF.fullmatch(name)
            difference = DIFFERENCE.fullmatch(name)
            if match is None and difference is None:
                kind = next((kind for sign, kind in OTHER_KINDS.items() if sign in name), None)
                got = f"{kind} ({name})" if kind else name
                raise CheckpointError(
                    f"{self.label} got {got}, expected lora_A and lora_B of weights, or diff and diff_b; {REMEDY}"
                )
            if stored.dtype not in DTYPES:
                raise CheckpointError(quantised(self.label.removesuffix(":"), f"{name} is {stored.dtype}"))
            if difference is not None:
                differences[name] = _Difference(difference["module"], DIFFERS[difference["ending"]], name)
                continue
            assert match is not None
            self._add_half(halves, match, name)
        if not halves and not differences:
            raise CheckpointError(f"{self.label} holds no weights, expected lora_A and lora_B; {REMEDY}")
        return {**halves, **differences}

    def _add_half(self, halves: dict[str, _LowRank], match: re.Match[str], name: str) -> None:
        names = halves.setdefault(match["module"], _LowRank(match["module"])).names
        if IS_A[match["half"]] in names:
            raise CheckpointError(f"{self.label} holds several LoRAs ({name}), expected one; save them apart")
        names[IS_A[match["half"]]] = name


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
