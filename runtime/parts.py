"""Running one part of a bundle, and judging what it made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.backend import Engine
from ..engines.errors import EngineError
from ..engines.manifest import Part

FLOATS = ("fp32", "fp16", "bf16")
# A norm sums squares in fp32. Of larger values they overflow, and what is divided by that is zeros, and so finite.
LARGEST = 1e16

Check = Callable[[Part, Mapping[str, Array]], None]


def run_part(
    engine: Engine, part: Part, arrays: Arrays, inputs: Mapping[str, Array], sizes: Mapping[str, int]
) -> dict[str, Array]:
    """Run a part whose outputs nobody has allocated yet; returns them."""
    outputs = {spec.name: arrays.empty(spec.resolve(sizes), spec.dtype) for spec in part.outputs}
    run_engine(engine, {**inputs, **outputs})
    return outputs


def run_engine(engine: Engine, tensors: dict[str, Array]) -> None:
    """Run it; `tensors` is empty afterwards, so that an error that is kept keeps none of them."""
    try:
        engine.run(tensors)
    finally:
        tensors.clear()


def check_finite(part: Part, tensors: Mapping[str, Array]) -> None:
    """Refuse what a part made where no video can be made of it. Raises EngineError.

    What is left for a next chunk is not looked at: it is large, and shows in what that becomes.
    """
    for spec in part.outputs:
        if spec.dtype not in FLOATS or spec.name.startswith("new_"):
            continue
        values = tensors[spec.name].astype(np.float32) if spec.dtype == "bf16" else tensors[spec.name]
        wrong = wrong_values(values)
        if wrong is not None:
            raise EngineError(
                f"{part.name}: got {wrong} in {spec.name}, expected finite ones up to {LARGEST:g}; lower the "
                "guidance, or export with dtype bf16 or fp32"
            )


def wrong_values(values: Array) -> str | None:
    """What is wrong with values that no model can compute with, in a few words; None where nothing is."""
    most = max(float(values.max()), -float(values.min()))  # NaN where there is one
    if not math.isfinite(most):
        return "values that are not finite"
    return f"values as large as {most:.2g}" if most > LARGEST else None


def pass_all(part: Part, tensors: Mapping[str, Array]) -> None:
    """A check that refuses nothing, for who looks for what is not finite."""
