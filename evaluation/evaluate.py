"""Policies judged on many prompts and seeds: each video is held against the same request without reuse.

The request without reuse and the policies take turns, pair by pair, so that a machine that slows down does so for all
of them. Nothing here knows of files: videos go into whatever stands in for a dictionary, and rows are yielded as they
come, so that whoever keeps both can go on where it was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from .. import __version__
from ..engines.arrays import HostArray
from ..engines.errors import Cancelled, InvalidRequest
from ..engines.progress import OnProgress, Progress, silent
from ..runtime.admission import CancelToken
from ..runtime.decisions import Decision
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import POLICIES, NoReuse, Policy
from ..runtime.policies.notation import text_of
from ..runtime.request import VideoRequest
from ..runtime.trace import Trace
from .metrics import Judged, LoadedMetric

REFERENCE = NoReuse.name


class Pair(NamedTuple):
    """What a video is made of: the same for all policies."""

    prompt: str
    seed: int


class VideoKey(NamedTuple):
    """A video: whose, and of what."""

    candidate: str
    pair: Pair


class Videos(Protocol):
    """Where videos are kept, (frames, height, width, 3) uint8; a dictionary is one."""

    def __contains__(self, key: object, /) -> bool: ...

    def __getitem__(self, key: VideoKey, /) -> HostArray: ...

    def __setitem__(self, key: VideoKey, frames: HostArray, /) -> None: ...


@dataclass(frozen=True)
class Candidate:
    """A policy that is judged, by a name that no other one has."""

    name: str
    policy: Policy


@dataclass(frozen=True)
class Row:
    """One video of one candidate; those of the reference are rows too.

    `reference_ms` is what denoising took without reuse, in the same round; `truncated` says that the prompt was cut to
    the model's length. Of `metrics` those that are not finite are
    None: a PSNR where the video is identical.
    """

    candidate: str
    prompt: str
    seed: int
    blocks_computed: int
    blocks_possible: int
    steps: int
    steps_skipped: int
    denoise_ms: float
    reference_ms: float
    truncated: bool = False
    metrics: dict[str, float | None] = field(default_factory=dict)

    @property
    def key(self) -> VideoKey:
        """The video that it is of."""
        return VideoKey(self.candidate, Pair(self.prompt, self.seed))

    @property
    def share_skipped(self) -> float:
        """Of the block calls, 0 to 1."""
        return 1 - self.blocks_computed / self.blocks_possible

    @property
    def share_steps_skipped(self) -> float:
        """Of the steps those in which no block ran, 0 to 1."""
        return self.steps_skipped / self.steps

    @property
    def speedup(self) -> float:
        """Of denoising, against the same request without reuse."""
        return self.reference_ms / self.denoise_ms

    @property
    def ceiling(self) -> float:
        """What the speed-up would be if all blocks took the same time and nothing else took any."""
        return self.blocks_possible / self.blocks_computed if self.blocks_computed else math.inf


def candidates_of(policies: Iterable[Policy]) -> list[Candidate]:
    """Named by what they are. Raises InvalidRequest for one that comes twice, and for none at all."""
    found: dict[str, Candidate] = {}
    for policy in policies:
        name = text_of(policy)
        if name in found:
            raise InvalidRequest(f"policy: got {name} twice, expected each setting once")
        if policy.name == REFERENCE:
            raise InvalidRequest(f"policy: got {name}, which the others are compared with, expected one that reuses")
        found[name] = Candidate(name, policy)
    if not found:
        raise InvalidRequest("policy: got none, expected one at least")
    return list(found.values())


def ladder(pipeline: VideoPipeline, request: VideoRequest) -> tuple[list[Policy], list[str]]:
    """Every registered policy in the settings that it names for this; and why some are none for this bundle.

    Raises InvalidRequest where the request is refused whatever its policy.
    """
    pipeline.check(replace(request, policy=NoReuse()))
    rungs = [kind(**settings) for kind in POLICIES.values() for settings in kind.ladder]
    fitting, notes = [], []
    for policy in rungs:
        try:
            pipeline.check(replace(request, policy=policy))
            fitting.append(policy)
        except InvalidRequest as error:
            notes.append(f"left out {text_of(policy)}: {error}")
    return fitting, notes


def settings_of(pipeline: VideoPipeline, request: VideoRequest) -> dict[str, Any]:
    """What the rows of one evaluation have in common, as plain JSON values: of others, neither times compare."""
    defaults, limits = pipeline.manifest.defaults, pipeline.limits
    negative = request.negative_prompt
    steps = defaults.steps if request.steps is None else request.steps
    return {
        "version": __version__,
        "bundle": pipeline.bundle.id,
        "steps": steps,
        "guidance": defaults.guidance if request.guidance is None else request.guidance,
        **_of_later_experts(pipeline, request, steps),
        "negative_prompt": defaults.negative_prompt if negative is None else negative,
        "backend": pipeline.backend.describe(),
        "cache_memory": limits.cache_memory,
        "cache_profile": None if limits.cache_profile is None else limits.cache_profile.digest,
        "cuda_graphs": limits.fixed_slots,
    }


def _of_later_experts(pipeline: VideoPipeline, request: VideoRequest, steps: int) -> dict[str, Any]:
    """What else there is to say of models whose transformers take turns; nothing of others."""
    later = pipeline.manifest.later_experts
    if not later:
        return {}
    given = request.guidance if request.guidance_2 is None else request.guidance_2
    return {
        "later_guidances": [expert.guidance if given is None else given for expert in later],
        "turns": [len(turn) for turn in pipeline.turns(steps)],
    }


def pairs_of(prompts: Sequence[str], seeds: int) -> list[Pair]:
    """Every prompt with `seeds` seeds, no two alike: seed i of prompt n is n plus i times the number of prompts.

    A prompt that comes twice counts once. Raises InvalidRequest.
    """
    if seeds < 1:
        raise InvalidRequest(f"seeds: got {seeds}, expected 1 or more")
    different = list(dict.fromkeys(prompts))
    count = len(different)
    return [Pair(prompt, line + turn * count) for turn in range(seeds) for line, prompt in enumerate(different)]


@dataclass(frozen=True)
class Evaluation:
    """A job: every candidate on every pair.

    `request` is what all videos have in common; its prompt, seed and policy are not looked at. `videos` is filled with
    the frames of all candidates and of the reference, which are kept nowhere else. With `keeps_references` a pair that
    lacks a candidate is not begun anew: where candidates come one after the other, and times are the lesser matter.
    """

    pipeline: VideoPipeline
    request: VideoRequest
    candidates: Sequence[Candidate]
    pairs: Sequence[Pair]
    metrics: Sequence[LoadedMetric]
    videos: Videos
    keeps_references: bool = False

    def check(self) -> None:
        """Raises InvalidRequest for what the pipeline would refuse later."""
        for candidate in self._all:
            self.pipeline.check(self._request(candidate, self.pairs[0]))
        for pair in self.pairs:
            self.pipeline.check(self._request(self._all[0], pair))

    def missing(self, known: Iterable[Row]) -> dict[Pair, list[Candidate]]:
        """Per pair the candidates that have no row and video yet."""
        kept = {row.key for row in known if row.key in self.videos}
        missing = {
            pair: [candidate for candidate in self.candidates if VideoKey(candidate.name, pair) not in kept]
            for pair in self.pairs
        }
        return {
            pair: candidates if VideoKey(REFERENCE, pair) in kept else list(self.candidates)
            for pair, candidates in missing.items()
            if candidates or VideoKey(REFERENCE, pair) not in kept
        }

    def run(
        self, known: Iterable[Row] = (), on_progress: OnProgress = silent, cancel: CancelToken | None = None
    ) -> Iterator[Row]:
        """Yields every row that is not `known`, and those that are but lack a metric.

        A pair that lacks a candidate is begun anew with its request without reuse: times of another day do not compare,
        but see `keeps_references`. The first request is a warm-up, of as few steps as there can be.
        `on_progress` is told the videos that are done. Raises what a request raises: Cancelled, EngineError,
        OutOfMemory, IntegrityError.
        """
        known = list(known)
        rounds = self.missing(known)
        wanted = {VideoKey(candidate.name, pair) for candidate in self._all for pair in self.pairs}
        wanted -= {VideoKey(candidate.name, pair) for pair, those in rounds.items() for candidate in those}
        wanted -= {VideoKey(REFERENCE, pair) for pair in rounds}
        for row in known:
            if row.key in wanted and self._unmeasured(row):
                yield self._measured(row)
        reference_ms = self._kept_references(known)
        told = _Videos(sum((pair not in reference_ms) + len(rounds[pair]) for pair in rounds), on_progress)
        for turn, (pair, those) in enumerate(rounds.items()):
            if turn == 0:
                warm_up = replace(self._request(self._all[0], pair), steps=self.pipeline.fewest_steps())
                self.pipeline.generate(warm_up, on_progress=told.of("warming up"), cancel=cancel)
            if pair not in reference_ms:
                reference = self._make(self._all[0], pair, told, cancel)
                reference_ms[pair] = reference.denoise_ms
                yield self._measured(_row(REFERENCE, pair, reference, reference_ms[pair]))
            first = turn % len(those)
            for candidate in (*those[first:], *those[:first]):
                trace = self._make(candidate, pair, told, cancel)
                yield self._measured(_row(candidate.name, pair, trace, reference_ms[pair]))

    def of_sets(self, candidate: Candidate) -> dict[str, float | None]:
        """The metrics that judge all videos of a candidate together; None where one is not finite."""
        return {
            loaded.metric.name: _finite(loaded.measure(self._judged(candidate.name, pair) for pair in self.pairs))
            for loaded in self.metrics
            if loaded.metric.of_set
        }

    @property
    def names(self) -> list[str]:
        """Of the reference and the candidates."""
        return [candidate.name for candidate in self._all]

    @property
    def _all(self) -> list[Candidate]:
        return [Candidate(REFERENCE, NoReuse()), *self.candidates]

    def _kept_references(self, known: Iterable[Row]) -> dict[Pair, float]:
        """How long the requests without reuse took that are not made again."""
        references = [row for row in known if row.candidate == REFERENCE and row.key in self.videos]
        return {row.key.pair: row.denoise_ms for row in references} if self.keeps_references else {}

    def _request(self, candidate: Candidate, pair: Pair) -> VideoRequest:
        return replace(self.request, prompt=pair.prompt, seed=pair.seed, policy=candidate.policy)

    def _make(self, candidate: Candidate, pair: Pair, told: _Videos, cancel: CancelToken | None) -> Trace:
        """Make a video and put it away: none is in memory while the next one is made."""
        if cancel is not None and cancel.is_set():
            raise Cancelled("request: cancelled between two videos")
        request, label = self._request(candidate, pair), f"{candidate.name}, seed {pair.seed}"
        (video,) = self.pipeline.generate(request, on_progress=told.of(label), cancel=cancel)
        self.videos[VideoKey(candidate.name, pair)] = video.frames
        told.done += 1
        return video.trace

    def _judged(self, candidate: str, pair: Pair) -> Judged:
        frames, reference = (self.videos[VideoKey(name, pair)] for name in (candidate, REFERENCE))
        return Judged(frames, reference, pair.prompt)

    def _unmeasured(self, row: Row) -> list[LoadedMetric]:
        """A reference is not compared with itself."""
        return [
            loaded
            for loaded in self.metrics
            if not loaded.metric.of_set
            and loaded.metric.name not in row.metrics
            and not (loaded.metric.compares and row.candidate == REFERENCE)
        ]

    def _measured(self, row: Row) -> Row:
        unmeasured = self._unmeasured(row)
        if not unmeasured:
            return row
        judged = self._judged(*row.key)
        values = {loaded.metric.name: _finite(loaded.measure([judged])) for loaded in unmeasured}
        return replace(row, metrics={**row.metrics, **values})


@dataclass
class _Videos:
    """Tells how many videos are done, and how far the next one is."""

    total: int
    on_progress: OnProgress
    done: int = 0

    def of(self, name: str) -> Callable[[Progress], None]:
        share = 0.0

        def show(progress: Progress) -> None:
            nonlocal share
            if progress.unit == "steps":
                share = progress.fraction
            detail = f"{name}: {progress.phase}"
            self.on_progress(Progress("evaluating", self.done, self.total, "videos", detail, share))

        return show


def _row(candidate: str, pair: Pair, trace: Trace, reference_ms: float) -> Row:
    ran = [Decision.COMPUTE.value in step.decisions for step in trace.steps]
    return Row(
        candidate=candidate,
        prompt=pair.prompt,
        seed=pair.seed,
        blocks_computed=trace.blocks_computed,
        blocks_possible=trace.blocks_possible,
        steps=len(ran),
        steps_skipped=ran.count(False),
        denoise_ms=trace.denoise_ms,
        reference_ms=reference_ms,
        truncated=bool(trace.truncated_prompts),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
