"""Settings of a policy, tuned for goals on some prompts and seeds, and measured on others.

The pairs of a prompt and a seed are split. On the first part settings are searched. Of those that keep the goal there,
the best one that keeps it on the second part too is chosen. What is reported was measured on the third part, which
decides nothing but whether the goal is kept at all: a profile that misses it there is not written. Fewer pairs are
split in two, and then what is reported has been chosen by.
"""

from __future__ import annotations

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
from .metrics import PSNR, load_metrics
from .search import Calibrated, Search, Settings, Space, check_tunable
from .summary import Summary, summarise

LEAST_PAIRS = 4
LEAST_IN_THREE = 6  # prompts, or pairs where there are fewer prompts, from which on a third part can be held out
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
class Parts:
    """Pairs by what they are used for; where there are only two parts, `selection` and `held_out` are the same."""

    tuning: tuple[Pair, ...]
    selection: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.tuning, *self.selection, *self.held_out)))

    @property
    def reports_what_chose(self) -> bool:
        """Whether what is reported of a setting has been chosen by."""
        return self.selection == self.held_out


def parts_of(pairs: Sequence[Pair]) -> Parts:
    """Split into parts of about one size; no prompt is in two of them where there are enough. Raises InvalidRequest."""
    if len(pairs) < LEAST_PAIRS:
        raise InvalidRequest(
            f"prompts: got {len(pairs)} pairs of a prompt and a seed, expected {LEAST_PAIRS} or more, better some "
            "dozen; give a file with one prompt a line, or more seeds"
        )
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    apart = len(prompts) >= LEAST_IN_THREE
    of = {pair: prompts.index(pair.prompt) if apart else place for place, pair in enumerate(pairs)}
    count = 3 if len(pairs) >= LEAST_IN_THREE else 2
    tuning, *others = (tuple(pair for pair in pairs if of[pair] % count == part) for part in range(count))
    return Parts(tuning, others[0], others[-1])


@dataclass(frozen=True)
class Tuned:
    """What came of one goal. `policy` is None where no setting kept it; summaries are of the parts it was judged on.

    `rejected` settings kept the goal in tuning, and then not on the second part.
    """

    name: str
    goal: Goal
    policy: Policy | None
    rejected: int
    tuning: Summary | None = None
    selection: Summary | None = None
    held_out: Summary | None = None

    @property
    def kept(self) -> bool:
        """Whether the goal was kept on all parts."""
        return self.held_out is not None and self.goal.margin(self.held_out) >= 0


@dataclass(frozen=True)
class Tuning:
    """A job: the settings of `policy` that are looked for, tried `trials` at a time for each goal.

    `request` is what all videos have in common; its prompt, seed and policy are not looked at. Of `kept`, only the
    videos without reuse are used.
    """

    pipeline: VideoPipeline
    request: VideoRequest
    policy: Policy
    goals: Mapping[str, Goal]
    parts: Parts
    trials: int
    kept: Kept

    def check(self) -> None:
        """Raises InvalidRequest for what would be refused later."""
        if self.trials < 1:
            raise InvalidRequest(f"trials: got {self.trials}, expected 1 or more")
        check_tunable(self.policy)
        self._evaluation([self.policy], self.parts.pairs, keeps_references=True).check()

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

        search = Search(self._space(on_progress, cancel), measure)
        for goal in self.goals.values():
            search.run(goal, self.trials)
        chosen = [self._choose(name, search.tried, measure) for name in self.goals]
        return self._held_out(chosen, on_progress, cancel), search.tried

    def _space(self, on_progress: OnProgress, cancel: CancelToken | None) -> Space:
        if not self.policy.calibrates:
            return Settings(self.policy)
        recorded = calibration_of(self.pipeline, self.request, self.parts.tuning, on_progress, cancel)
        return Calibrated(self.policy.calibrate(recorded))

    def _choose(self, name: str, tried: Mapping[Policy, Summary], measure: Callable[..., Summary]) -> Tuned:
        """The best setting that keeps a goal on the second part too."""
        goal, rejected = self.goals[name], 0
        for policy in strictening(tried, goal):
            selection = measure(policy, self.parts.selection)
            if goal.margin(selection) >= 0:
                return Tuned(name, goal, policy, rejected, tried[policy], selection)
            rejected += 1
        return Tuned(name, goal, None, rejected)

    def _held_out(self, chosen: Sequence[Tuned], on_progress: OnProgress, cancel: CancelToken | None) -> list[Tuned]:
        """Measured on the last part, all of them in turns."""
        policies = list(dict.fromkeys(found.policy for found in chosen if found.policy is not None))
        if not policies:
            return list(chosen)
        again = self.parts.reports_what_chose
        summaries = self._measure(policies, self.parts.held_out, on_progress, cancel, keeps_references=again)
        of = dict(zip(policies, summaries, strict=True))
        return [replace(found, held_out=of[found.policy]) if found.policy else found for found in chosen]

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
    keeping = {policy: summary for policy, summary in tried.items() if goal.margin(summary) >= 0}
    margin = -1.0
    for policy in sorted(keeping, key=lambda policy: goal.gain(keeping[policy]), reverse=True):
        if goal.margin(keeping[policy]) > margin:
            margin = goal.margin(keeping[policy])
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
