"""Reuse policies: which blocks to run in a step, decided from numbers alone.

A policy is an immutable setting; `begin` makes the decider of one request, which is asked for a `plan` before every
step and told afterwards what was measured. Decisions for a step use only what earlier steps measured, so no device
ever waits for its own metric.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, get_args

from ..engines.errors import InvalidRequest, quoted

CacheMode = Literal["output", "residual"]
CACHE_MODES: tuple[CacheMode, ...] = get_args(CacheMode)
WARMUP_SHARE = 0.15  # of all steps (arXiv 2506.00329, section 4: 8 of 50)
LAMBDA_WEIGHTS = (1.0, 0.1, 0.01)  # of the last three warm-up changes, newest first

# The mean squared change of a block, one number per prompt of the batch.
Distance: TypeAlias = Sequence[float]


class Decision(enum.Enum):
    """What a step does with a block."""

    COMPUTE = "computed"
    REUSE = "reused"
    DEAD = "dead"  # its output would be replaced further on, so nothing depends on whether it runs


@dataclass(frozen=True)
class Measure:
    """A block's last measured change and the limit up to which it may be reused, of the batch's worst prompt."""

    metric: float
    limit: float


class Decider(Protocol):
    """The decisions of one request. Mutable; never shared between requests."""

    def plan(self, step: int) -> list[Decision]:
        """COMPUTE or REUSE for every block of `step`."""

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        """What `step` measured: per block the change from its last computed output, None where there is none."""

    def measures(self) -> list[Measure | None]:
        """What the next plan will be based on, per block; None where nothing was measured."""


class Policy(Protocol):
    """An immutable setting. `cache` says what is cached: a block's output, or what it adds to the stream.

    A dataclass; each field's metadata has its `help`, and as `default` words for a default that is None.
    """

    name: ClassVar[str]

    @property
    def cache(self) -> CacheMode: ...

    def begin(self, steps: int, blocks: int) -> Decider:
        """The decider of a request of that many steps on a model of that many blocks."""


@dataclass(frozen=True)
class NoReuse:
    """Every block runs in every step."""

    name: ClassVar[str] = "none"
    cache: CacheMode = field(default="output", metadata={"help": "What is cached: output or residual."})

    def __post_init__(self) -> None:
        _check_cache(self.cache)

    def begin(self, steps: int, blocks: int) -> Decider:
        """See Policy.begin."""
        return _Always(blocks)


@dataclass(frozen=True)
class Cycle:
    """When reuse is allowed: after `warmup` steps (None: 15 % of all) the first `reuse_steps` of every `interval`."""

    reuse_steps: int = field(default=1, metadata={"help": "Steps of a cycle that may reuse."})
    interval: int = field(default=2, metadata={"help": "Steps of a cycle."})
    warmup: int | None = field(
        default=None, metadata={"help": "Steps before any reuse.", "default": f"{100 * WARMUP_SHARE:.0f} % of all"}
    )

    def __post_init__(self) -> None:
        for name in ("reuse_steps", "interval", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "warmup" and value is None):
                raise InvalidRequest(f"{name}: got {quoted(value)}, expected a whole number")
        if self.reuse_steps < 1:
            raise InvalidRequest(
                f"reuse_steps: got {quoted(self.reuse_steps)}, expected 1 or more; for none use policy none"
            )
        if self.interval <= self.reuse_steps:
            raise InvalidRequest(
                f"interval: got {quoted(self.interval)}, expected more than reuse_steps ({quoted(self.reuse_steps)}), "
                "so that every cycle computes all blocks once"
            )
        if self.warmup is not None and self.warmup < 2:
            raise InvalidRequest(f"warmup: got {quoted(self.warmup)}, expected 2 or more: a change needs two steps")

    def warmup_steps(self, steps: int) -> int:
        """The number of warm-up steps of a request."""
        return self.warmup if self.warmup is not None else max(2, math.ceil(WARMUP_SHARE * steps))

    def allows(self, step: int, steps: int) -> bool:
        """Whether blocks may be reused in `step`; the last step is always computed."""
        since = step - self.warmup_steps(steps)
        return since >= 0 and step < steps - 1 and since % self.interval < self.reuse_steps


@dataclass(frozen=True)
class Static(Cycle):
    """All blocks are reused in every step that the cycle allows, whatever they measure."""

    name: ClassVar[str] = "static"
    cache: CacheMode = field(default="output", metadata={"help": "What is cached: output or residual."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cache(self.cache)

    def begin(self, steps: int, blocks: int) -> Decider:
        """See Policy.begin."""
        return _ByCycle(self, steps, blocks)


@dataclass(frozen=True)
class Foresight(Cycle):
    """A block is reused where its last change is at most `gamma` times what it changed during warm-up.

    arXiv 2506.00329: with MSE_t the change of the block's output from step t - 1 to t and W warm-up steps, the
    threshold is lambda = MSE_{W-1} + MSE_{W-2} / 10 + MSE_{W-3} / 100; a block is reused in an allowed step if its
    last measured change delta <= gamma lambda. `gamma` in (0, 2]: more is faster and less exact. In a batch a block
    is reused only where every prompt would reuse it.
    """

    name: ClassVar[str] = "foresight"
    gamma: float = field(default=0.5, metadata={"help": "More is faster and less exact, up to 2."})
    cache: CacheMode = field(default="output", metadata={"help": "What is cached: output or residual."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cache(self.cache)
        if not isinstance(self.gamma, (int, float)) or not 0 < self.gamma <= 2:
            raise InvalidRequest(f"gamma: got {quoted(self.gamma)}, expected more than 0 and at most 2")

    def begin(self, steps: int, blocks: int) -> Decider:
        """See Policy.begin."""
        return _ByChange(self, steps, blocks)


POLICIES: dict[str, type[NoReuse] | type[Static] | type[Foresight]] = {
    policy.name: policy for policy in (Foresight, Static, NoReuse)
}


def policy_from_settings(name: str, **settings: Any) -> Policy:
    """A policy by name; settings that are None keep their default, those that the policy lacks are refused."""
    if name not in POLICIES:
        raise InvalidRequest(f"policy: got {quoted(name)}, expected one of {', '.join(POLICIES)}")
    given = {key: value for key, value in settings.items() if value is not None}
    known = set(POLICIES[name].__dataclass_fields__)
    for key in sorted(set(given) - known):
        raise InvalidRequest(f"{key}: policy {name} has no such setting; it has {', '.join(sorted(known)) or 'none'}")
    return POLICIES[name](**given)


def policy_settings(policy: Policy) -> dict[str, Any]:
    """A policy's name and settings, for traces."""
    settings = asdict(policy) if is_dataclass(policy) and not isinstance(policy, type) else {"cache": policy.cache}
    return {"name": policy.name, **settings}


def eliminate_dead(decisions: Sequence[Decision]) -> list[Decision]:
    """With outputs cached, every block before the deepest reused one is dead: its output would be replaced."""
    deepest = max((index for index, decision in enumerate(decisions) if decision is Decision.REUSE), default=0)
    return [Decision.DEAD] * deepest + list(decisions[deepest:])


class _Always:
    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    def plan(self, step: int) -> list[Decision]:
        return [Decision.COMPUTE] * self._blocks

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        pass

    def measures(self) -> list[Measure | None]:
        return [None] * self._blocks


class _ByCycle(_Always):
    def __init__(self, policy: Static, steps: int, blocks: int) -> None:
        super().__init__(blocks)
        self._policy = policy
        self._steps = steps

    def plan(self, step: int) -> list[Decision]:
        reuse = self._policy.allows(step, self._steps)
        return [Decision.REUSE if reuse else Decision.COMPUTE] * self._blocks


@dataclass
class _Change:
    """One block of one request: delta and lambda per prompt."""

    metric: tuple[float, ...] = ()
    threshold: tuple[float, ...] = ()
    warmup: list[tuple[float, ...]] = field(default_factory=list)


class _ByChange:
    def __init__(self, policy: Foresight, steps: int, blocks: int) -> None:
        self._policy = policy
        self._steps = steps
        self._changes = [_Change() for _ in range(blocks)]

    def plan(self, step: int) -> list[Decision]:
        allowed = self._policy.allows(step, self._steps)
        return [
            Decision.REUSE if allowed and measure is not None and _within(measure) else Decision.COMPUTE
            for measure in self.measures()
        ]

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        last_warmup = self._policy.warmup_steps(self._steps) - 1
        for change, distance in zip(self._changes, distances, strict=True):
            if distance is None:
                continue
            change.metric = tuple(distance)
            if step <= last_warmup:
                change.warmup.append(change.metric)
            if step == last_warmup:
                change.threshold = _weighted_sum(change.warmup)
                change.warmup.clear()

    def measures(self) -> list[Measure | None]:
        return [self._worst(change) for change in self._changes]

    def _worst(self, change: _Change) -> Measure | None:
        if not change.metric or not change.threshold:
            return None
        pairs = zip(change.metric, change.threshold, strict=True)
        measures = [Measure(metric, self._policy.gamma * threshold) for metric, threshold in pairs]
        refused = [measure for measure in measures if not _within(measure)]
        return max(refused or measures, key=lambda measure: measure.metric - measure.limit)


def _within(measure: Measure) -> bool:
    """A change that is not finite is never a licence to reuse, nor is a limit that is not."""
    return math.isfinite(measure.limit) and measure.metric <= measure.limit


def _weighted_sum(changes: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    newest_first = list(reversed(changes))[: len(LAMBDA_WEIGHTS)]
    return tuple(
        sum(weight * change for weight, change in zip(LAMBDA_WEIGHTS, prompt, strict=False))
        for prompt in zip(*newest_first, strict=True)
    )


def _check_cache(cache: str) -> None:
    if cache not in CACHE_MODES:
        raise InvalidRequest(f"cache: got {quoted(cache)}, expected output or residual")
