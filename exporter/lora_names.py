"""Which weight of a checkpoint a name in a LoRA stands for.

Names are those of the checkpoint or those of the model's original code, which a family's LoraNames tells, behind what
trainers put before all names; kohya's have underscores where the others have dots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .weights import some

Weights = Mapping[str, Mapping[str, tuple[int, ...]]]  # by component: names and shapes

TRANSFORMER = "transformer"  # for which a LoRA is that names no component; a second one's name begins with it
OUTER = ("base_model.model.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.")  # what stands before all names
FLAT = {  # dots are gone; the longer prefix first
    "lora_unet__": TRANSFORMER,
    "lora_unet_": TRANSFORMER,
    "lora_transformer_": TRANSFORMER,
    "lora_te_": "text_encoder",
}


@dataclass(frozen=True)
class LoraNames:
    """What LoRAs of a family call a transformer's weights, where that is not what its checkpoints call them.

    `original` has parts of a checkpoint's names with what the model's original code has there, exchanged in this order.
    `others` has what marks the names of modules that this family's other models have, with words for those models.
    """

    original: tuple[tuple[str, str], ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)

    def original_name(self, name: str) -> str:
        """Of a weight that a checkpoint calls so."""
        for own, original in self.original:
            name = name.replace(own, original)
        return name

    def whose(self, module: str) -> str | None:
        """Words for the models that have such a module; None where no mark is in its name."""
        return next((models for mark, models in self.others.items() if mark in module), None)


class Targets:
    """The weights that an export reads, by all their names; `component` is what a LoRA is said to be for, if it is."""

    def __init__(self, wanted: Weights, names: LoraNames, component: str | None) -> None:
        self._transformers = tuple(name for name in wanted if name.startswith(TRANSFORMER))
        self._components = tuple(wanted)
        self._component = component
        self._dotted: dict[str, dict[str, str]] = {}
        self._flat: dict[str, dict[str, set[str]]] = {}
        for name, weights in wanted.items():
            spelled = names if name in self._transformers else LoraNames()
            self._dotted[name] = {spelled.original_name(weight): weight for weight in weights} | {w: w for w in weights}
            self._flat[name] = {}
            for spelling, weight in self._dotted[name].items():
                self._flat[name].setdefault(_flattened(spelling), set()).add(weight)

    def why_unplaced(self, file: str, modules: Iterable[str]) -> str | None:
        """Why it cannot be told which component the modules of a file are for, with the remedy; None where it can."""
        said = {self._said(module)[0] for module in modules}
        named = sorted(name for name in said if name not in (None, TRANSFORMER))
        if self._component is not None and self._component not in self._components:
            return f"got the component {self._component}, expected {' or '.join(self._components)}; give one of these"
        if self._component is not None and named:
            return f"its names are for {some(named)}, got the component {self._component} as well; leave that out"
        is_of_any = said & {None, TRANSFORMER} and not set(named) & set(self._transformers)
        if self._component is None and is_of_any and len(self._transformers) > 1:
            ways = " or ".join(f"{file}@{name}" for name in self._transformers)
            return f"does not say which of {len(self._transformers)} transformers it is for; give {ways}, or both"
        return None

    def find(self, module: str, endings: Sequence[str]) -> tuple[str, str] | None:
        """The component and weight that a module's name and the first possible of these endings stand for."""
        said, rest, flat = self._said(module)
        component = self._component or said or TRANSFORMER
        for ending in endings:
            if flat:
                found = self._flat[component].get(_flattened(rest + ending), set())
            else:
                weight = self._dotted[component].get(rest + ending)
                found = {weight} if weight is not None else set()
            if len(found) == 1:
                return component, next(iter(found))
        return None

    def _said(self, module: str) -> tuple[str | None, str, bool]:
        """The component that a name says it is for, what comes behind, and whether dots are gone from that."""
        for prefix, component in FLAT.items():
            if module.startswith(prefix):
                return component, module.removeprefix(prefix), True
        for outer in OUTER:
            module = module.removeprefix(outer)
        first, _, rest = module.partition(".")
        return (first, rest, False) if first in self._components else (None, module, False)


def _flattened(name: str) -> str:
    return name.replace(".", "_")
