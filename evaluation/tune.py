"""Settings of policies, tuned for goals on some prompts and seeds, and measured on others.

The pairs of a prompt and a seed are split. On the first part settings of each policy are searched. Of those that keep
the goal there, the best one that keeps it with the pairs of the second part too is each policy's candidate, and of
these the best one on the second part is chosen. A goal counts as kept where other videos are expected to keep it, which
asks for a margin (`Goal.foreseen`). What is reported was measured on the third part, which decides nothing but whether
the goal is kept at all: a profile that misses it there by more than `Goal.slack` is not written. Few pairs are split in
two, and then what is reported has been chosen by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..engines.arrays import HostArray
from ..engines.errors import InvalidRequest
from ..engines.progress import OnProgress, silent
from ..runtime.admission import CancelToken
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import Policy
from ..runtime.request import VideoRequest
from .calibration import calibration_of
from .evaluate import REFERENCE, Evaluation, Pair, Row, VideoKey, Videos, candidates_of
from .goals import Goal, Quality
from .held_out import Parts
from .metrics import PSNR, load_metrics
from .search import Calibrated, Search, Settings, Space, check_tunable
from .summary import Summary, summarise

GOALS: dict[str, Goal] = {"quality": Quality(45), "balanced": Quality(40), "fast": Quality(35)}  # dB


class Kept(Protocol):
    """Where rows and videos are kept; see EvaluationFolder."""

    @property
    def videos(self) -> Videos: ...

    def rows(self) -> list[Row]: ...

    def keep(self, row: Row) -> None: ...


class InMemory:
    """Keeps rows and videos as long as it is there itself."""

    def __init__(self) -> None:
        self.videos: dict[VideoKey, HostArray] = {}
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """All so far."""
        return self._rows

    def keep(self, row: Row) -> None:
        """One more."""
        self._rows.append(row)


@dataclass(frozen=True)
class Candidate:
    """The best setting of one policy for a goal; None, as its summaries are, where no setting kept it.

    `rejected` settings kept the goal in tuning, and then not with the pairs of selection. `choosing` is of the pairs of
    both.
    """

    name: str
    rejected: int
    policy: Policy | None = None
    tuning: Summary | None = None
    selection: Summary | None = None
    choosing: Summary | None = None


@dataclass(frozen=True)
class Tuned:
    """What came of one goal: the best of the candidates, one of each policy, and what it did on the pairs held out.

    Where that missed the goal, it is `missed`, and `best` is the one of another goal, if one keeps this goal too.
    """

    name: str
    goal: Goal
    best: Candidate
    candidates: tuple[Candidate, ...]
    held_out: Summary | None = None
    missed: Tuned | None = None

    @property
    def policy(self) -> Policy | None:
        """None where no setting kept the goal."""
        return self.best.policy

    @property
    def kept(self) -> bool:
        """Whether the goal was kept on all parts."""
        return self.held_out is not None and self.goal.margin(self.held_out) >= 0

    @property
    def written(self) -> bool:
        """Whether the goal was kept, or missed by so little that it is a profile."""
        return self.held_out is not None and self.goal.margin(self.held_out) >= -self.goal.slack

    def or_another(self, others: Sequence[Tuned]) -> Tuned:
        """Where the goal was missed, with the setting that was chosen for another goal and keeps this one on all parts.

        Of several the best in selection. Videos held out choose nothing here either: they only tell what was missed.
        """
        if self.written or self.held_out is None:
            return self
        gains = {
            self.goal.gain(one.best.selection): one
            for one in others
            if one.best.selection and one.best.choosing and one.held_out
            if self.goal.foreseen(one.best.choosing) >= 0 and self.goal.margin(one.held_out) >= 0
        }
        if not gains:
            return self
        other = gains[max(gains)]
        return replace(self, best=other.best, held_out=other.held_out, missed=self)


@dataclass(frozen=True)
class Tuning:
    """A job: the settings of `policies` that are looked for, tried `trials` at a time for each policy and goal.

    `request` is what all videos have in common; its prompt, seed and policy are not looked at. Of `kept`, only the
    videos without reuse are used.
    """

    pipeline: VideoPipeline
    request: VideoRequest
    policies: Sequence[Policy]
    goals: Mapping[str, Goal]
    parts: Parts
    trials: int
    kept: Kept

    def check(self) -> None:
        """Raises InvalidRequest for what would be refused later."""
        if self.trials < 1:
            raise InvalidRequest(f"trials: got {self.trials}, expected 1 or more")
        for policy in self.policies:
            check_tunable(policy)
        self._evaluation(self.policies, self.parts.pairs, keeps_references=True).check()

    @property
    def kept_videos(self) -> tuple[int, int]:
        """How many videos are kept at most, and the bytes of each."""
        shape = self.pipeline.manifest.shape
        return len(self.parts.pairs), shape.frames * shape.height * shape.width * 3

    def run(
        self, on_progress: OnProgress = silent, cancel: CancelToken | None = None
    ) -> tuple[list[Tuned], dict[Policy, Summary]]:
        """What came of each goal, and all settings that were tried. Raises what `Evaluation.run` raises."""

        def measure(policy: Policy, part: Sequence[Pair] = self.parts.tuning) -> Summary:
            (summary,) = self._measure([policy], part, on_progress, cancel, keeps_references=True)
            return summary

        searches = [Search(self._space(policy, on_progress, cancel), measure) for policy in self.policies]
        for search, goal in itertools.product(searches, self.goals.values()):
            search.run(goal, self.trials)
        tuned = [self._choose(name, searches, measure) for name in self.goals]
        tried = {policy: summary for search in searches for policy, summary in search.tried.items()}
        return self._held_out(tuned, on_progress, cancel), tried

    def _space(self, policy: Policy, on_progress: OnProgress, cancel: CancelToken | None) -> Space:
        steps = self.request.steps or self.pipeline.manifest.defaults.steps
        if not policy.calibrates:
            turns = self.pipeline.turns(steps)
            # each transformer has a warm-up, of as many steps: shares of the longest turn leave something to skip
            return Settings(policy, steps * max(map(len, turns)) // turns[-1].stop)
        return Calibrated(policy, calibration_of(self.pipeline, self.request, self.parts.tuning, on_progress, cancel))

    def _choose(self, name: str, searches: Sequence[Search], measure: Callable[..., Summary]) -> Tuned:
        """The best candidate on the second part."""
        goal = self.goals[name]
        candidates = tuple(
            self._candidate(policy.name, goal, search.tried, measure)
            for policy, search in zip(self.policies, searches, strict=True)
        )
        gains = [-1.0 if one.selection is None else goal.gain(one.selection) for one in candidates]
        return Tuned(name, goal, candidates[gains.index(max(gains))], candidates)

    def _candidate(
        self, name: str, goal: Goal, tried: Mapping[Policy, Summary], measure: Callable[..., Summary]
    ) -> Candidate:
        """The best setting that keeps a goal with the pairs of the second part too."""
        rejected = 0
        for policy in strictening(tried, goal):
            choosing = measure(policy, self.parts.choosing)
            if goal.foreseen(choosing) >= 0:
                selection = measure(policy, self.parts.selection)
                return Candidate(name, rejected, policy, tried[policy], selection, choosing)
            rejected += 1
        return Candidate(name, rejected)

    def _held_out(self, chosen: Sequence[Tuned], on_progress: OnProgress, cancel: CancelToken | None) -> list[Tuned]:
        """Measured on the last part, all of them in turns."""
        policies = list(dict.fromkeys(found.policy for found in chosen if found.policy is not None))
        if not policies:
            return list(chosen)
        again = self.parts.reports_what_chose
        summaries = self._measure(policies, self.parts.held_out, on_progress, cancel, keeps_references=again)
        of = dict(zip(policies, summaries, strict=True))
        measured = [replace(found, held_out=of[found.policy]) if found.policy else found for found in chosen]
        return [one.or_another(measured) for one in measured]

    def _measure(
        self,
        policies: Sequence[Policy],
        pairs: Sequence[Pair],
        on_progress: OnProgress,
        cancel: CancelToken | None,
        keeps_references: bool,
    ) -> list[Summary]:
        job = self._evaluation(policies, pairs, keeps_references)
        for row in job.run(self.kept.rows(), on_progress, cancel):
            self.kept.keep(row)
        rows = {row.key: row for row in self.kept.rows()}
        return [
            summarise([rows[VideoKey(candidate.name, pair)] for pair in pairs], [PSNR]) for candidate in job.candidates
        ]

    def _evaluation(self, policies: Sequence[Policy], pairs: Sequence[Pair], keeps_references: bool) -> Evaluation:
        videos, metrics = OnlyReferences(self.kept.videos), load_metrics([PSNR])
        return Evaluation(
            self.pipeline, self.request, candidates_of(policies), pairs, metrics, videos, keeps_references
        )


def strictening(tried: Mapping[Policy, Summary], goal: Goal) -> Iterator[Policy]:
    """Settings that keep a goal, the best one first; each of the others keeps it by more than all before it."""
    keeping = {policy: summary for policy, summary in tried.items() if goal.foreseen(summary) >= 0}
    margin = -1.0
    for policy in sorted(keeping, key=lambda policy: goal.gain(keeping[policy]), reverse=True):
        if goal.foreseen(keeping[policy]) > margin:
            margin = goal.foreseen(keeping[policy])
            yield policy


class OnlyReferences:
    """Keeps the videos without reuse; of the others, which are measured as they come, only the newest."""

    def __init__(self, kept: Videos) -> None:
        self._kept = kept
        self._newest: dict[VideoKey, HostArray] = {}

    def __contains__(self, key: object) -> bool:
        """A video of a candidate counts as kept: its row says all that is asked of it."""
        return isinstance(key, VideoKey) and (key.candidate != REFERENCE or key in self._kept)

    def __getitem__(self, key: VideoKey) -> HostArray:
        return self._kept[key] if key.candidate == REFERENCE else self._newest[key]

    def __setitem__(self, key: VideoKey, frames: HostArray) -> None:
        if key.candidate == REFERENCE:
            self._kept[key] = frames
        else:
            self._newest = {key: frames}
