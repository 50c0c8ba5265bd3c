"""What one request did: per step and block what was computed, reused or dead, what was measured, how long it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from .decisions import Decision, Measure


@dataclass(frozen=True)
class StepTrace:
    """One denoising step. All tuples have one entry per block.

    `decisions` are the values of `Decision`. `distances` are the measured changes, of the prompt that changed most,
    None where the block did not run or had no earlier output. `metrics` and `limits` are what the decision rested
    on. `milliseconds` is the wall time of the whole step, sampler and guidance included; on a GPU, that of handing it
    over and of waiting for the step before, which it settles to. Policies that forecast whole steps also have:
    `estimate`, what they expect a forecast to have cost so far if this step were one, and `estimate_limit`, up to which
    it is; and of a step that ran `error`, how far off its forecast would have been. `expert` is which of the model's
    transformers it was a step of.
    """

    timestep: float
    milliseconds: float
    decisions: tuple[str, ...]
    distances: tuple[float | None, ...]
    metrics: tuple[float | None, ...]
    limits: tuple[float | None, ...]
    estimate: float | None = None
    estimate_limit: float | None = None
    error: float | None = None
    expert: int = 0


@dataclass
class Trace:
    """The record of a request, or of its prompts that were decided on together, filled while it runs, then unchanged.

    `policy` and `backend` are their names and settings; `blocks` and `kinds` name the blocks in execution order, of the
    first transformer where several take turns; `guidances` are one a prompt, and `later_guidances` the same for each
    of the others. With
    `latents_given` the noise came from the caller and the seeds were not used. `text_ms`, `denoise_ms`, `decode_ms`
    are wall times of the phases; of denoising, `engine_ms` is what the host spent inside engines, on a GPU only to
    hand work over, and `wait_ms` what it waited for the device. `cache_bytes` is what the stream and the cached
    outputs took, and `uncached` names the blocks for whose output there was no room. `planned_bytes` is what the
    pipeline with this request was expected to take of the device's memory, `device_bytes` what its arrays, without
    the engines, have taken at most so far (None where that is not counted). `truncated_prompts` were cut to the
    model's length. A request for a summary ends without `steps`; `summary` then has how many block calls
    there were of each Decision's value.
    """

    model: str
    bundle: str
    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    policy: dict[str, Any]
    backend: dict[str, str]
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    steps_requested: int
    guidances: tuple[float, ...]
    seeds: tuple[int, ...]
    latents_given: bool
    steps: list[StepTrace] = field(default_factory=list)
    summary: dict[str, int] | None = None
    text_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    engine_ms: float = 0.0
    wait_ms: float = 0.0
    cache_bytes: int = 0
    uncached: tuple[str, ...] = ()
    planned_bytes: int = 0
    device_bytes: int | None = None
    truncated_prompts: tuple[str, ...] = ()
    later_guidances: tuple[tuple[float, ...], ...] = ()

    def record(
        self,
        timestep: float,
        milliseconds: float,
        decisions: Sequence[Decision],
        measures: Sequence[Measure | None],
        estimate: Measure | None = None,
        expert: int = 0,
    ) -> None:
        """Add a step; its distances follow when they have reached the host."""
        self.steps.append(
            StepTrace(
                timestep=timestep,
                milliseconds=milliseconds,
                decisions=tuple(decision.value for decision in decisions),
                distances=(None,) * len(decisions),
                metrics=tuple(measure.metric if measure else None for measure in measures),
                limits=tuple(measure.limit if measure else None for measure in measures),
                estimate=estimate.metric if estimate else None,
                estimate_limit=estimate.limit if estimate else None,
                expert=expert,
            )
        )

    def measure(self, step: int, distances: Sequence[float | None]) -> None:
        """Add what a recorded step measured, per block."""
        self.steps[step] = replace(self.steps[step], distances=tuple(distances))

    def err(self, step: int, error: float) -> None:
        """Add how far from its forecast a recorded step was, of the batch's worst prompt."""
        self.steps[step] = replace(self.steps[step], error=error)

    @property
    def has_finite_changes(self) -> bool:
        """Whether all measured changes of blocks are finite numbers."""
        changes = (distance for record in self.steps for distance in record.distances if distance is not None)
        return all(map(math.isfinite, changes))

    def first_not_finite(self) -> str | None:
        """Where a measured change first was no finite number: the step, and the block if its change was measured."""
        for step, record in enumerate(self.steps, 1):
            for block, distance in zip(self.blocks, record.distances, strict=True):
                if distance is not None and not math.isfinite(distance):
                    return f"step {step}, {block}"
            if record.error is not None and not math.isfinite(record.error):
                return f"step {step}"
        return None

    def count(self, decision: Decision) -> int:
        """How many block calls of the request ended that way."""
        if self.summary is not None:
            return self.summary[decision.value]
        return sum(step.decisions.count(decision.value) for step in self.steps)

    @property
    def blocks_computed(self) -> int:
        """Block calls that ran."""
        return self.count(Decision.COMPUTE)

    @property
    def blocks_reused(self) -> int:
        """Block calls whose cached output, or residual, was handed on instead."""
        return self.count(Decision.REUSE)

    @property
    def blocks_dead(self) -> int:
        """Block calls that did not run because a later reused block replaced their output."""
        return self.count(Decision.DEAD)

    @property
    def blocks_forecast(self) -> int:
        """Block calls of steps in which no engine ran, as the model's output was made of earlier ones."""
        return self.count(Decision.FORECAST)

    @property
    def blocks_possible(self) -> int:
        """Block calls of the same request without reuse."""
        return sum(map(self.count, Decision))

    @property
    def share_skipped(self) -> float:
        """Share of block calls that did not run, 0 to 1."""
        possible = self.blocks_possible
        return 1 - self.blocks_computed / possible if possible else 0.0

    def summarise(self) -> None:
        """Let the record of single steps go, when all are done; the totals stay."""
        self.summary = {decision.value: self.count(decision) for decision in Decision}
        self.steps.clear()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, with the totals; numbers that are not finite become None."""
        totals = {
            name: getattr(self, name)
            for name in (
                "blocks_computed",
                "blocks_reused",
                "blocks_dead",
                "blocks_forecast",
                "blocks_possible",
                "share_skipped",
            )
        }
        return _finite({**asdict(self), **totals})  # type: ignore[no-any-return]


def turns_of(trace: Trace) -> list[range]:
    """The steps of each transformer that had some: of one, all that were asked for."""
    experts = [step.expert for step in trace.steps]
    switches = [step for step in range(1, len(experts)) if experts[step - 1] != experts[step]]
    return [range(first, after) for first, after in pairwise([0, *switches, trace.steps_requested])]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
