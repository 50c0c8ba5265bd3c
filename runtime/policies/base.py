"""What a policy is: which blocks, or whole steps, need not run, decided from numbers alone.

A policy is an immutable setting. `begin` makes the decider of one request, which is asked before every step and told
afterwards what was measured. Decisions for a step use only what earlier steps measured, so no device ever waits for
its own metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from ..caches import CACHE_MODES
from ..decisions import Decision, Distance, Measure

if TYPE_CHECKING:
    from ...engines.arrays import Array, HostArray
    from ..sampler import Schedule


@dataclass(frozen=True)
class Context:
    """What a policy learns of a request.

    `schedule` is the sampler's table for the request's steps, timesteps and coefficients; `kinds` are those of the
    blocks, in execution order; `prompts` is the number of videos in the batch. Where transformers take turns, each has
    a decider of its own, which counts from 0 the steps that are its transformer's: those that begin after `before`
    others, `count` of them (None: all that follow).
    """

    schedule: Schedule
    kinds: tuple[str, ...]
    prompts: int = 1
    before: int = 0
    count: int | None = None

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.schedule.steps - self.before if self.count is None else self.count

    @property
    def timesteps(self) -> HostArray:
        """Of each step, (steps,) fp64."""
        return self.schedule.timesteps[self._own]

    @property
    def signal_scales(self) -> HostArray:
        """Of each step, (steps,) fp64; see Schedule."""
        return self.schedule.signal_scales[self._own]

    def sensitivities(self) -> HostArray:
        """Of each step, (steps,) fp64; see Schedule.sensitivities."""
        return self.schedule.sensitivities()[self._own]

    @property
    def _own(self) -> slice:
        return slice(self.before, self.before + self.steps)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.kinds)


class Decider:
    """The decisions of one request; mutable, never shared between requests. This one has every block run.

    In each step it is asked for a `forecast`; where there is none, for its `measures` and its `plan`, and once the
    model has run, for what it `expected`.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def forecast(self, step: int) -> Sequence[float] | None:
        """Weights of the last computed model outputs, newest first, whose sum stands in for that of `step`.

        None has the step run. Asked before anything of the step is; what the step before measured may not be told yet.
        """
        return None

    def estimate(self) -> Measure | None:
        """What the last answer of `forecast` rested on; None where it was no matter of numbers."""
        return None

    def expected(self, step: int) -> Sequence[float] | None:
        """Weights of the outputs before, newest first, whose sum would have stood in for that of `step`.

        None has nothing measured. How far off that was is told before the `forecast` of the step after.
        """
        return None

    def see(self, step: int, output: Array) -> None:
        """The guided output of a step that ran, (prompts, …) on the device; it is only read, and not changed later."""

    def observe_output(self, step: int, errors: Distance) -> None:
        """How far what was expected of `step` was from the output: the root mean square, per prompt."""

    def plan(self, step: int) -> list[Decision]:
        """COMPUTE or REUSE for every block of `step`."""
        return [Decision.COMPUTE] * self.context.blocks

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        """What `step` measured: per block the change from its last computed output, None where there is none."""

    def measures(self) -> list[Measure | None]:
        """What the next plan will be based on, per block; None where nothing was measured."""
        return [None] * self.context.blocks


def cache_setting() -> Any:
    """The field that every policy has which caches blocks: the name of a mode."""
    modes = " or ".join(CACHE_MODES)
    told = {"help": f"What is cached: {modes}.", "values": tuple(CACHE_MODES)}
    return field(default=next(iter(CACHE_MODES)), metadata=told)


@dataclass(frozen=True)
class SearchRange:
    """Between which values a setting is looked for, both included; whole numbers where these are.

    `log`: by their ratios, not by their differences. `of_steps`: both are shares of a request's steps, and the setting
    is a number of steps.
    """

    low: float
    high: float
    log: bool = False
    of_steps: bool = False

    def for_steps(self, steps: int) -> SearchRange:
        """The same for requests of that many steps."""
        if not self.of_steps:
            return self
        low, high = (max(1, math.ceil(share * steps)) for share in (self.low, self.high))
        return SearchRange(low, high)


@dataclass(frozen=True)
class Calibration:
    """What requests without reuse put out, one after the other.

    `products` are the inner products of the guided outputs of all steps, divided by how many numbers an output has:
    (requests, steps, steps) fp64. `switches` are the steps with which another transformer took over.
    """

    schedule: Schedule
    products: HostArray
    switches: tuple[int, ...] = ()

    @property
    def turns(self) -> list[range]:
        """The steps of each transformer that had some: it has a decider, and forecasts, of its own."""
        return [range(first, after) for first, after in pairwise((0, *self.switches, self.schedule.steps))]


class Policy:
    """An immutable setting; policies are frozen dataclasses, whose fields are what a user may set.

    Each field's metadata has its `help`, as `default` words for a default that is None, as `values` the names that it
    may be, where it is one of a few, and as `search` a SearchRange, where tuning looks for it. `outputs` is how many of
    the last computed model outputs a forecast is made of: that many arrays of the latents' size are kept. `ladder` has
    the settings, the most exact first, that an evaluation tries where it is not told which. One that `calibrates` is
    not searched by its settings, but among those that it makes of what requests without reuse put out.
    """

    name: ClassVar[str]
    outputs: ClassVar[int] = 0
    ladder: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    calibrates: ClassVar[bool] = False

    @property
    def cache(self) -> str:
        """The cache mode: what is kept of a block, see runtime/caches."""
        return next(iter(CACHE_MODES))

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        """Per block whether it is ever reused, or its change wanted; others get no room in the cache."""
        return (True,) * len(kinds)

    def warmup_steps(self, steps: int) -> int:
        """How many steps of a request run whole before any that may not."""
        return 0

    def spelled_out(self, steps: int) -> Policy:
        """The same policy for requests of that many steps, with settings in place of what follows from their number."""
        return self

    def may_reuse(self, steps: int) -> bool:
        """Whether a request of that many steps has one that may reuse anything."""
        return self.warmup_steps(steps) < steps - 1

    def begin(self, context: Context) -> Decider:
        """The decider of a request. Raises InvalidRequest where the policy does not serve it."""
        raise NotImplementedError

    def calibrate(self, calibration: Calibration, warmup: int) -> Mapping[int, Policy]:
        """By how many steps run, settings that fit best what was recorded, and run the first `warmup` steps at least.

        Those that begin a turn run too, as many as `warmup_steps` says. Raises InvalidRequest.
        """
        raise NotImplementedError

    def describe(self, steps: int) -> str:
        """The policy in words, for a transformer of that many steps: its name and settings, if it has no better."""
        settings: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        return ", ".join([self.name, *(f"{name} {value}" for name, value in settings.items())])
