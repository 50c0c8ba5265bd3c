"""The search for the setting of a policy that keeps a goal best: Optuna's, the only place that imports it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

from ..engines.errors import InvalidRequest, one_line
from ..runtime.policies import Policy
from ..runtime.policies.base import Calibration, SearchRange
from .goals import Goal, score
from .summary import Summary

SEED = 0
RANDOM = 4  # settings that are tried before the first that is chosen by those before it
ASKED = 10  # times as many settings are asked for as are to be tried, since some come again
DIGITS = 3  # of a number that is tried
WARMUP, LATER = SearchRange(0.2, 0.4, of_steps=True), SearchRange(0.05, 0.4, of_steps=True)
FIRST_SHARES = ((0.3, 0.15), (0.2, 0.2), (0.3, 0.3), (0.2, 0.12))  # steps that run at first, and later


def check_optuna() -> None:
    """Raises InvalidRequest where it is missing."""
    try:
        import optuna  # noqa: F401 - as long as it can be
    except ImportError as error:
        raise InvalidRequest(
            f'tune: needs optuna, which cannot be imported ({one_line(error)}); pip install "foresight-engines[tune]"'
        ) from error


def check_tunable(policy: Policy) -> Policy:
    """The policy itself. Raises InvalidRequest where there is nothing to look for."""
    if not policy.calibrates and not searched(policy, steps=1):
        raise InvalidRequest(f"policy: got {policy.name}, which has nothing to tune, expected another one")
    return policy


def searched(policy: Policy, steps: int) -> dict[str, SearchRange]:
    """The settings of a policy that are looked for, for requests of that many steps."""
    own: tuple[Field[Any], ...] = fields(policy) if is_dataclass(policy) else ()
    ranges: dict[str, SearchRange] = {
        setting.name: setting.metadata["search"] for setting in own if "search" in setting.metadata
    }
    return {name: wanted.for_steps(steps) for name, wanted in ranges.items()}


class Space(Protocol):
    """Policies that are tried, each by some numbers; `first` are those of the ones to begin with."""

    @property
    def ranges(self) -> Mapping[str, SearchRange]: ...

    @property
    def first(self) -> Sequence[Mapping[str, float]]: ...

    def policy(self, numbers: Mapping[str, float]) -> Policy | None:
        """The policy of these numbers, which are within the ranges; None where there is none."""
        ...

    def numbers(self, policy: Policy) -> dict[str, float]:
        """Those of a policy that was made of some."""
        ...


class Settings:
    """The settings of one policy, for requests of that many steps; those that are not looked for stay."""

    def __init__(self, policy: Policy, steps: int) -> None:
        self._policy = policy.spelled_out(steps)
        policies = [self._policy, *(replace(self._policy, **rung) for rung in policy.ladder)]  # type: ignore[type-var]
        wanted = searched(policy, steps)
        found = [{name: getattr(one, name) for name in wanted} for one in policies]
        self.first = [one for place, one in enumerate(found) if one not in found[:place]]
        self.ranges = {name: _widened(one, (numbers[name] for numbers in found)) for name, one in wanted.items()}

    def policy(self, numbers: Mapping[str, float]) -> Policy | None:
        """See Space."""
        try:
            changed = {name: _rounded(value) for name, value in numbers.items()}
            made: Policy = replace(self._policy, **changed)  # type: ignore[type-var]
        except InvalidRequest:
            return None
        return made

    def numbers(self, policy: Policy) -> dict[str, float]:
        """See Space."""
        return {name: getattr(policy, name) for name in self.ranges}


class Calibrated:
    """What a policy makes of recorded requests, by how many steps run at first without a break, and how many later.

    Those with which later turns begin run in any case, and count for neither.
    """

    def __init__(self, policy: Policy, recorded: Calibration) -> None:
        self._calibrate = functools.cache(functools.partial(policy.calibrate, recorded))
        self._numbers: dict[Policy, dict[str, float]] = {}
        self._begun = [step for turn in recorded.turns[1:] for step in turn[: policy.warmup_steps(len(turn))]]
        steps = recorded.schedule.steps
        ranges = {"warmup": WARMUP, "later": LATER}
        self.ranges = {name: wanted.for_steps(steps) for name, wanted in ranges.items()}
        shares = ({"warmup": warmup, "later": later} for warmup, later in FIRST_SHARES)
        self.first = [{name: math.ceil(share * steps) for name, share in one.items()} for one in shares]

    def policy(self, numbers: Mapping[str, float]) -> Policy | None:
        """See Space."""
        warmup, later = int(numbers["warmup"]), int(numbers["later"])
        begun = sum(step >= warmup for step in self._begun)
        made = self._calibrate(warmup).get(warmup + begun + later)
        if made is not None:
            self._numbers.setdefault(made, dict(numbers))
        return made

    def numbers(self, policy: Policy) -> dict[str, float]:
        """See Space."""
        return self._numbers[policy]


@dataclass
class Search:
    """Policies of a space, and what `measure` said of each that was tried; several goals share that."""

    space: Space
    measure: Callable[[Policy], Summary]
    tried: dict[Policy, Summary] = field(default_factory=dict)

    def run(self, goal: Goal, trials: int) -> None:
        """Try that many settings for a goal, fewer where there are not as many; what was tried before is known."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        spaces = {name: _distribution(optuna, wanted) for name, wanted in self.space.ranges.items()}
        sampler = optuna.samplers.TPESampler(seed=SEED, n_startup_trials=RANDOM)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for policy, summary in self.tried.items():
            parameters = self.space.numbers(policy)
            known = optuna.trial.create_trial(params=parameters, distributions=spaces, value=score(goal, summary))
            study.add_trial(known)
        for settings in () if self.tried else self.space.first:
            study.enqueue_trial(dict(settings))
        wanted = len(self.tried) + trials
        for _ in range(trials * ASKED):
            if len(self.tried) >= wanted:
                break
            trial = study.ask(spaces)
            done = self._try(trial.params)
            if done is None:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, score(goal, done))

    def _try(self, numbers: Mapping[str, float]) -> Summary | None:
        """What a policy does; None where there is no such one."""
        policy = self.space.policy(numbers)
        if policy is not None and policy not in self.tried:
            self.tried[policy] = self.measure(policy)
        return None if policy is None else self.tried[policy]


def _widened(wanted: SearchRange, values: Iterable[float]) -> SearchRange:
    """With room for these values, which users chose."""
    low, *_, high = sorted([wanted.low, wanted.high, *values])
    return replace(wanted, low=low, high=high)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _distribution(optuna: Any, wanted: SearchRange) -> Any:
    if isinstance(wanted.low, int) and isinstance(wanted.high, int):
        return optuna.distributions.IntDistribution(wanted.low, wanted.high, log=wanted.log)
    return optuna.distributions.FloatDistribution(wanted.low, wanted.high, log=wanted.log)
