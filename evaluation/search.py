"""The search for the setting of a policy that keeps a goal best: Optuna's, the only place that imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import Any

from ..engines.errors import InvalidRequest, one_line
from ..runtime.policies import Policy
from ..runtime.policies.base import SearchRange
from .goals import Goal, score
from .summary import Summary

SEED = 0
RANDOM = 4  # settings that are tried before the first that is chosen by those before it
DIGITS = 3  # of a number that is tried


def check_optuna() -> None:
    """Raises InvalidRequest where it is missing."""
    try:
        import optuna  # noqa: F401 - as long as it can be
    except ImportError as error:
        raise InvalidRequest(
            f'tune: needs optuna, which cannot be imported ({one_line(error)}); pip install "foresight-engines[tune]"'
        ) from error


def searched(policy: Policy) -> dict[str, SearchRange]:
    """The settings of a policy that are looked for. Raises InvalidRequest where it has none."""
    own: tuple[Field[Any], ...] = fields(policy) if is_dataclass(policy) else ()
    found = {setting.name: setting.metadata["search"] for setting in own if "search" in setting.metadata}
    if not found:
        raise InvalidRequest(f"policy: got {policy.name}, which has nothing to tune, expected another one")
    return found


@dataclass
class Search:
    """Settings of one policy, and what `measure` said of each; several goals share what was tried.

    Settings that are not looked for are those of `policy`. `measure` may raise InvalidRequest for a policy that the
    request cannot have.
    """

    policy: Policy
    measure: Callable[[Policy], Summary]
    tried: dict[Policy, Summary] = field(default_factory=dict)

    def run(self, goal: Goal, trials: int) -> None:
        """Try that many settings for a goal; what was tried before is known, and tried again takes no time."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        spaces = {name: _distribution(optuna, wanted) for name, wanted in searched(self.policy).items()}
        sampler = optuna.samplers.TPESampler(seed=SEED, n_startup_trials=RANDOM)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for policy, summary in self.tried.items():
            parameters = {name: getattr(policy, name) for name in spaces}
            known = optuna.trial.create_trial(params=parameters, distributions=spaces, value=score(goal, summary))
            study.add_trial(known)
        for settings in () if self.tried else self._beginning(spaces):
            study.enqueue_trial(settings)
        for _ in range(trials):
            trial = study.ask(spaces)
            done = self._try(trial.params)
            if done is None:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, score(goal, done))

    def _beginning(self, names: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is tried first: the settings as they were given, then those that the policy recommends."""
        policies = [self.policy, *(replace(self.policy, **rung) for rung in self.policy.ladder)]  # type: ignore[type-var]
        settings = [{name: getattr(policy, name) for name in names} for policy in policies]
        return [one for place, one in enumerate(settings) if one not in settings[:place]]

    def _try(self, settings: Mapping[str, Any]) -> Summary | None:
        """What a setting does; None where there is no such policy."""
        numbers = {name: _rounded(value) for name, value in settings.items()}
        try:
            policy = replace(self.policy, **numbers)  # type: ignore[type-var]
        except InvalidRequest:
            return None
        if policy not in self.tried:
            self.tried[policy] = self.measure(policy)
        return self.tried[policy]


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _distribution(optuna: Any, wanted: SearchRange) -> Any:
    if isinstance(wanted.low, int) and isinstance(wanted.high, int):
        return optuna.distributions.IntDistribution(wanted.low, wanted.high, log=wanted.log)
    return optuna.distributions.FloatDistribution(wanted.low, wanted.high, log=wanted.log)
