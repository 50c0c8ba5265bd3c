"""Peers and this package's policies on the same requests, in turns: quality, speed, and what an abort leaves behind.

Every contender makes every pair's video from the same noise. Each is held against a reference, its own implementation
without any cache: its frames, and in the same round its times. Nothing here knows whose contenders they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from ..engines.arrays import HostArray
from ..engines.errors import ForesightError, InvalidRequest, one_line
from ..engines.progress import Counter, OnProgress, silent
from .evaluate import Pair
from .outcome import AfterAbort, Agreement, Outcome, Row, Sample, Unavailable
from .quality import psnr

WARM_UP_STEPS = 2
ABORTED_AT = (
    0.7  # of the steps, made odd: by then every cache is in use, and one that reuses every other step is out of step
)


@dataclass(frozen=True)
class Task:
    """One video to be made. `latents` is the initial noise, (latent shape) fp32, which is only read."""

    prompt: str
    negative_prompt: str
    seed: int
    latents: HostArray
    steps: int
    guidance: float


@dataclass(frozen=True)
class Made:
    """A video: frames (F, H, W, 3) uint8, final latents fp32, and what the denoising loop alone took.

    `cpu_ms` is the processor time of the process, `wall_ms` that of the clock. `block_work` is how much blocks were
    given to do, in whatever its reference counts too; 0 where nothing is counted.
    """

    frames: HostArray
    latents: HostArray
    cpu_ms: float
    wall_ms: float
    block_work: int = 0


class Aborted(Exception):
    """The request was aborted, as it was asked to be."""


class Make(Protocol):
    """Makes a video; with `stop_after`, the request is aborted after that many steps, which raises Aborted."""

    def __call__(self, task: Task, stop_after: int | None = None) -> Made: ...


@dataclass(frozen=True)
class Contender:
    """What takes turns. While `switched` is entered it is on; then it makes videos, one after the other.

    `reference` is the name of the contender that it is held against, its own for one without a cache. `own` are those
    of this package, whose errors are raised; others are left out with theirs. `adapted` says what had to be done to it
    or to its model for it to work, none of which its makers ship.
    """

    name: str
    reference: str
    switched: Callable[[], AbstractContextManager[Make]]
    own: bool = False
    adapted: str = ""

    @property
    def kind(self) -> str:
        """Whose it is, and whether it is as its makers ship it."""
        return "this project" if self.own else "adapted" if self.adapted else "as shipped"


@dataclass
class _Results:
    """What is known of a contender so far."""

    samples: list[Sample] = field(default_factory=list)
    first: HostArray | None = None  # final latents of its first video
    after_abort: AfterAbort | None = None


@dataclass(frozen=True)
class Bench:
    """A job: all contenders on all pairs, each request of so many steps.

    `noise` gives a seed's initial latents. A contender that is not `own` and raises is left out from then on, and so
    are those that are held against it.
    """

    contenders: Sequence[Contender]
    pairs: Sequence[Pair]
    noise: Callable[[int], HostArray]
    steps: int
    guidance: float
    negative_prompt: str = ""

    def run(self, on_progress: OnProgress = silent) -> Outcome:
        """Warm up, run the rounds, then the aborts. Raises InvalidRequest, and what an `own` contender raises."""
        if not self.pairs:
            raise InvalidRequest("pairs: got none, expected one at least")
        turns = (1 + len(self.pairs) + 1) * len(self.contenders)
        run, made = _Run(self), Counter("comparing", turns, "turns", on_progress)
        for contender in self.contenders:
            made.tell(f"warming up {contender.name}")
            run.attempt(contender, run.warm_up)
            made.advance()
        for turn, pair in enumerate(self.pairs):
            run.round(turn, pair, made)
        for contender in self.contenders:
            made.tell(f"aborting {contender.name}")
            run.attempt(contender, run.abort)
            made.advance()
        return run.outcome()

    def task(self, pair: Pair) -> Task:
        """What every contender is given for a pair."""
        return Task(pair.prompt, self.negative_prompt, pair.seed, self.noise(pair.seed), self.steps, self.guidance)


@dataclass
class _Run:
    """What is known so far."""

    bench: Bench
    unavailable: dict[str, str] = field(default_factory=dict)
    results: dict[str, _Results] = field(default_factory=lambda: defaultdict(_Results))
    compared: dict[tuple[str, str], list[tuple[float | None, float]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def present(self) -> list[Contender]:
        """Those that run, and whose references do."""
        return [
            contender
            for contender in self.bench.contenders
            if contender.name not in self.unavailable and contender.reference not in self.unavailable
        ]

    def attempt(self, contender: Contender, work: Callable[[Contender], object]) -> None:
        """Do it, unless it is known not to run; what another's library raises is why it does not."""
        if contender not in self.present:
            return
        try:
            work(contender)
        except Exception as error:  # of another's library: it may be any
            if contender.own:
                raise
            told = one_line(error)
            kind = "" if isinstance(error, ForesightError) and told else f"{type(error).__name__}: "
            self.unavailable[contender.name] = f"{kind}{told}"

    def warm_up(self, contender: Contender) -> None:
        with contender.switched() as make:
            _abort(make, self.bench.task(self.bench.pairs[0]), min(WARM_UP_STEPS, self.bench.steps))

    def round(self, turn: int, pair: Pair, made: Counter) -> None:
        """One video of each, another one first in every round."""
        task = self.bench.task(pair)
        videos: dict[str, Made] = {}
        first = turn % len(self.bench.contenders)
        for contender in (*self.bench.contenders[first:], *self.bench.contenders[:first]):
            made.tell(f"{contender.name}, seed {pair.seed}")
            self.attempt(contender, partial(_turn, task, videos))
            made.advance()
        for contender in self.present:
            self._keep(contender, videos[contender.name], videos[contender.reference])
        references = [contender.name for contender in self.present if contender.reference == contender.name]
        for other in references[1:]:
            found = _agreement(videos[references[0]], videos[other])
            self.compared[references[0], other].append(found)

    def _keep(self, contender: Contender, video: Made, reference: Made) -> None:
        results = self.results[contender.name]
        if results.first is None:
            results.first = video.latents
        results.samples.append(
            Sample(
                psnr_db=_finite(psnr(video.frames, reference.frames)),
                cpu_ms=video.cpu_ms,
                wall_ms=video.wall_ms,
                reference_cpu_ms=reference.cpu_ms,
                reference_wall_ms=reference.wall_ms,
                block_work=video.block_work,
                reference_block_work=reference.block_work,
            )
        )

    def abort(self, contender: Contender) -> None:
        """The first pair's video before and after another request was aborted."""
        task = self.bench.task(self.bench.pairs[0])
        pair = (
            self.bench.pairs[1]
            if len(self.bench.pairs) > 1
            else self.bench.pairs[0]._replace(seed=self.bench.pairs[0].seed + 1)
        )
        results = self.results[contender.name]
        with contender.switched() as make:
            before = make(task)
            _abort(make, self.bench.task(pair), round(ABORTED_AT * self.bench.steps) | 1)
            after = make(task)
        results.after_abort = AfterAbort(
            repeats=results.first is not None and _same(before.latents, results.first),
            same=_same(after.latents, before.latents),
            psnr_db=_finite(psnr(after.frames, before.frames)),
        )

    def outcome(self) -> Outcome:
        reasons = self.unavailable | {
            contender.name: f"{contender.reference}, which it is compared with, does not run"
            for contender in self.bench.contenders
            if contender.reference in self.unavailable and contender.name not in self.unavailable
        }
        return Outcome(
            rows=[
                Row.of(contender, self.results[contender.name].samples, self.results[contender.name].after_abort)
                for contender in self.present
            ],
            agreements=[Agreement.of(*names, found) for names, found in self.compared.items()],
            unavailable=[Unavailable(name, reason) for name, reason in reasons.items()],
        )


def pairs_around(prompts: Sequence[str], count: int) -> list[Pair]:
    """That many pairs, going round the prompts; every pair has a seed of its own. Raises InvalidRequest."""
    if count < 1:
        raise InvalidRequest(f"pairs: got {count}, expected 1 or more")
    return [Pair(prompts[index % len(prompts)], index) for index in range(count)]


def _turn(task: Task, videos: dict[str, Made], contender: Contender) -> None:
    with contender.switched() as make:
        videos[contender.name] = make(task)


def _abort(make: Make, task: Task, steps: int) -> None:
    """Have a request aborted; one that has no more steps may end before it is."""
    with suppress(Aborted):
        make(task, steps)


def _same(one: HostArray, other: HostArray) -> bool:
    return one.tobytes() == other.tobytes()


def _agreement(one: Made, other: Made) -> tuple[float | None, float]:
    return _finite(psnr(one.frames, other.frames)), float(np.abs(one.latents - other.latents).max())


def _finite(decibels: float) -> float | None:
    return decibels if math.isfinite(decibels) else None
