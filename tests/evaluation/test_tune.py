"""Tuning: which pairs are used for what, what is chosen, and what is not written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest

from foresight.engines.errors import InvalidRequest
from foresight.evaluation.evaluate import REFERENCE, Pair, pairs_of
from foresight.evaluation.folder import opened
from foresight.evaluation.goals import Goal, Quality, Speedup
from foresight.evaluation.held_out import Parts, parts_of
from foresight.evaluation.summary import Summary
from foresight.evaluation.tune import GOALS, Candidate, InMemory, Tuned, Tuning, strictening
from foresight.evaluation.tuned import profiles_of, tuning_document
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import FixedSchedule, Forecast, Policy, Static
from foresight.runtime.policies.base import SearchRange
from foresight.runtime.profiles import policy_of
from foresight.runtime.request import VideoRequest
from tests.evaluation.summaries import summary

pytest.importorskip("optuna")

STEPS = 6
PROMPTS = ["a dog", "a cat", "a fish", "a bird", "a cow", "a horse", "a fox", "a hen"]
FIRST = Static(warmup=2, cache="residual")


def tuning(
    pipeline: VideoPipeline, goals: Mapping[str, Goal], *, pairs: Sequence[Pair] | None = None, trials: int = 4
) -> Tuning:
    parts = parts_of(pairs or pairs_of(PROMPTS, 1))
    return Tuning(pipeline, VideoRequest("", steps=STEPS), [FIRST], goals, parts, trials, InMemory())


# Which pairs


@pytest.mark.parametrize(("prompts", "seeds"), [(6, 1), (7, 1), (12, 2), (1, 6), (3, 2)])
def test_enough_pairs_are_split_in_three(prompts: int, seeds: int) -> None:
    pairs = pairs_of([f"prompt {number}" for number in range(prompts)], seeds)
    parts = parts_of(pairs)
    assert sorted((*parts.tuning, *parts.selection, *parts.held_out)) == sorted(pairs) == sorted(parts.pairs)
    assert abs(len(parts.choosing) - len(parts.held_out)) <= seeds and not parts.reports_what_chose
    assert 0 <= len(parts.tuning) - len(parts.selection) <= seeds


def test_no_prompt_is_in_two_parts_where_there_are_enough() -> None:
    parts = parts_of(pairs_of(PROMPTS, 3))
    sets = [{pair.prompt for pair in part} for part in (parts.tuning, parts.selection, parts.held_out)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(PROMPTS)


def test_few_pairs_are_split_in_two() -> None:
    parts = parts_of(pairs_of(PROMPTS[:4], 1))
    assert parts.selection == parts.held_out and parts.reports_what_chose
    assert (len(parts.tuning), len(parts.held_out), len(parts.pairs)) == (2, 2, 4)


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 1), (3, 1), (1, 3)])
def test_too_few_pairs_are_refused(prompts: int, seeds: int) -> None:
    with pytest.raises(InvalidRequest, match="prompts: got [13] pairs .* expected 4 or more, .* more seeds"):
        parts_of(pairs_of(PROMPTS[:prompts], seeds))


# What is chosen


def test_settings_come_by_how_good_they_are_each_stricter_than_those_before() -> None:
    numbers = {0.5: (36.0, 0.6), 0.4: (34.0, 0.7), 0.3: (38.0, 0.5), 0.2: (37.0, 0.4), 0.1: (50.0, 0.3)}
    tried: dict[Policy, Summary] = {
        Forecast(tolerance=tolerance): summary(worst=worst, skipped=skipped)
        for tolerance, (worst, skipped) in numbers.items()
    }
    found = [policy.tolerance for policy in strictening(tried, Quality(35)) if isinstance(policy, Forecast)]
    assert found == [0.5, 0.3, 0.1]


@pytest.fixture(scope="module")
def done(pipeline: VideoPipeline) -> tuple[Tuning, list[Tuned], dict[Policy, object]]:
    job = tuning(pipeline, {"some": Quality(5), "all": Quality(199)})
    tuned, tried = job.run()
    return job, tuned, dict(tried)


def test_what_is_tuned_keeps_its_goal_on_every_part(done: tuple[Tuning, list[Tuned], dict[Policy, object]]) -> None:
    _, (some, _), tried = done
    assert some.kept and some.policy in tried
    for part, videos in ((some.best.tuning, 2), (some.best.selection, 2), (some.held_out, 4)):
        assert part is not None and part.videos == videos and part.share_skipped > 0
        assert part.worst_psnr_db is None or part.worst_psnr_db >= 5


def test_a_goal_that_only_identical_videos_keep_is_kept_by_nothing_that_skips(
    done: tuple[Tuning, list[Tuned], dict[Policy, object]],
) -> None:
    _, (_, strict), _ = done
    assert (strict.policy, strict.best.tuning, strict.held_out, strict.written) == (None, None, None, False)


def test_references_are_made_once_but_for_those_that_times_are_reported_of(
    done: tuple[Tuning, list[Tuned], dict[Policy, object]],
) -> None:
    job, _, _ = done
    made = Counter(row.key for row in job.kept.rows())
    assert set(made.values()) == {1}
    references = {pair for (name, pair) in made if name == REFERENCE}
    assert references == set(job.parts.pairs)


def test_only_videos_without_reuse_are_kept(done: tuple[Tuning, list[Tuned], dict[Policy, object]]) -> None:
    job, _, _ = done
    assert isinstance(job.kept, InMemory)
    assert {key.candidate for key in job.kept.videos} == {REFERENCE}
    assert len(job.kept.videos) == job.kept_videos[0]


def test_the_profile_of_a_tuned_setting_is_that_policy(
    done: tuple[Tuning, list[Tuned], dict[Policy, object]],
) -> None:
    job, tuned, _ = done
    profile = next(profile for profile in profiles_of(job, tuned) if profile.name == "some")
    assert policy_of(profile) == tuned[0].policy
    assert (profile.steps, profile.goal, profile.held_out.pairs) == (STEPS, "worst PSNR of 5 dB or more", 4)


def test_the_document_says_what_was_tried_and_what_for(
    done: tuple[Tuning, list[Tuned], dict[Policy, object]],
) -> None:
    job, tuned, tried = done
    document = tuning_document(job, tuned, {policy: summary() for policy in tried})
    assert document["pairs"] == {"tuning": 2, "selection": 2, "held_out": 4, "reports_what_chose": False}
    assert document["policies"] == ["static:warmup=2,cache=residual"]
    assert len(document["tried"]) == len(tried)
    assert [profile["name"] for profile in document["profiles"]] == ["some", "all"]


@dataclass(frozen=True)
class Dial(Policy):
    """A policy that a script knows."""

    name: ClassVar[str] = "dial"
    dial: float = field(default=0.01, metadata={"help": "", "search": SearchRange(0.001, 0.1, log=True)})
    gain: float = 1.0


class Scripted(Tuning):
    """Measures what a script says of each part: how fast quality falls with the dial there."""

    def check(self) -> None:
        """No pipeline knows of the dial."""

    def _measure(self, policies, pairs, *_, **__):  # type: ignore[no-untyped-def]
        parts = self.parts
        places = {parts.tuning: 0, parts.choosing: 1, parts.selection: 1, parts.held_out: 2}
        slope = (1, *self.slopes)[places[tuple(pairs)]] * 1000
        return [summary(worst=60 - slope * one.dial, skipped=one.gain * one.dial) for one in policies]

    slopes: tuple[float, float] = (1, 1)


def scripted(
    pipeline: VideoPipeline, slopes: tuple[float, float], policies: Sequence[Policy], goal: float = 40
) -> tuple[Tuning, Tuned]:
    job = Scripted(**vars(tuning(pipeline, {"some": Quality(goal)}, trials=10)) | {"policies": policies})
    object.__setattr__(job, "slopes", slopes)
    (one,), _ = job.run()
    return job, one


@pytest.mark.parametrize(
    ("slopes", "kept", "rejected"), [((1, 1), True, False), ((4, 1), True, True), ((1, 9), False, False)]
)
def test_what_misses_the_goal_on_other_pairs_is_rejected_or_not_written(
    pipeline: VideoPipeline, slopes: tuple[float, float], kept: bool, rejected: bool
) -> None:
    job, one = scripted(pipeline, slopes, [Dial()])
    assert (one.kept, one.best.rejected > 0) == (kept, rejected)
    assert len(profiles_of(job, [one])) == kept
    notes = tuning_document(job, [one], {})["notes"]
    assert any("missed on the pairs held out" in note for note in notes) == (not kept)


def test_a_goal_that_is_missed_by_little_on_pairs_held_out_is_written_and_told(pipeline: VideoPipeline) -> None:
    _, one = scripted(pipeline, (1, 1), [Dial()])
    assert isinstance(one.policy, Dial)
    almost = (60 - 39.5) / 1000 / one.policy.dial
    job, one = scripted(pipeline, (1, almost), [Dial()])
    assert (one.kept, one.written, len(profiles_of(job, [one]))) == (False, True, 1)
    (note,) = tuning_document(job, [one], {})["notes"]
    assert note.startswith("some: written, though the goal was missed")


def test_of_several_policies_the_one_that_is_best_in_selection_is_taken(pipeline: VideoPipeline) -> None:
    policies = [Dial(), Dial(gain=3.0), Dial(gain=2.0)]
    job, one = scripted(pipeline, (1, 1), policies)
    assert isinstance(one.policy, Dial) and one.policy.gain == 3.0
    assert [candidate.policy is not None for candidate in one.candidates] == [True] * 3
    (profile,) = tuning_document(job, [one], {})["profiles"]
    assert profile["policy"]["gain"] == 3.0
    assert [candidate["policy"].count("gain") for candidate in profile["candidates"]] == [0, 1, 1]


def tuned(name: str, goal: float, worst: float, skipped: float) -> Tuned:
    """A goal whose setting has that worst video everywhere but held out, where it has 10 dB less."""
    chosen, held_out = summary(worst=worst, skipped=skipped), summary(worst=worst - 10, skipped=skipped)
    best = Candidate("dial", 0, Dial(dial=skipped), chosen, chosen, chosen)
    return Tuned(name, Quality(goal), best, (best,), held_out)


def test_a_goal_that_was_missed_takes_the_setting_of_another_that_keeps_it() -> None:
    fast, others = tuned("fast", 35, 36, 0.8), [tuned("quality", 45, 60, 0.3), tuned("balanced", 40, 49, 0.6)]
    assert not fast.written
    taken = fast.or_another([*others, fast])
    assert (taken.policy, taken.held_out, taken.missed) == (others[1].policy, others[1].held_out, fast)
    assert (taken.name, taken.goal, taken.kept) == ("fast", Quality(35), True)
    assert [one.or_another([*others, fast]) for one in others] == others


def test_no_setting_is_taken_that_was_not_chosen_for_as_strict_a_goal() -> None:
    quality = tuned("quality", 45, 46, 0.5)
    lucky = replace(tuned("fast", 35, 36, 0.8), held_out=summary(worst=50, skipped=0.8))
    assert quality.or_another([quality, lucky]) == quality


def test_videos_held_out_choose_nothing(pipeline: VideoPipeline) -> None:
    policies = [Dial(), Dial(gain=3.0)]
    found = [scripted(pipeline, (1, slope), policies)[1].policy for slope in (0.5, 1, 9)]
    assert found[0] == found[1] == found[2]


def test_a_goal_that_nothing_keeps_is_told(pipeline: VideoPipeline) -> None:
    job = tuning(pipeline, {"wild": Speedup(1000)}, trials=2)
    tuned, tried = job.run()
    assert not profiles_of(job, tuned) and len(tried) == 2
    (note,) = (note for note in tuning_document(job, tuned, tried)["notes"] if note.startswith("wild"))
    assert note.startswith("wild: not written, as no setting that was tried kept the goal")


def test_a_policy_that_calibrates_is_made_of_requests_without_reuse(pipeline: VideoPipeline) -> None:
    job = replace(tuning(pipeline, {"some": Quality(5)}, trials=3), policies=[FixedSchedule()])
    job.check()
    (one,), tried = job.run()
    assert one.kept and isinstance(one.policy, FixedSchedule) and one.policy.computed.endswith(str(STEPS))
    assert len(tried) == len({policy for policy in tried if policy.name == one.policy.name}) > 1
    (profile,) = profiles_of(job, [one])
    assert policy_of(profile) == one.policy


def test_without_a_third_part_the_report_says_so(pipeline: VideoPipeline) -> None:
    job = tuning(pipeline, {"some": Quality(5)}, pairs=pairs_of(PROMPTS[:4], 1), trials=1)
    tuned, tried = job.run()
    assert any(note.startswith("held out: 2 pairs chose") for note in tuning_document(job, tuned, tried)["notes"])
    assert max(Counter(row.key for row in job.kept.rows()).values()) == 1


def test_a_tuning_in_a_folder_is_gone_on_with(pipeline: VideoPipeline, tmp_path: Path) -> None:
    def run(folder: Path) -> tuple[list[Tuned], int]:
        with opened(folder, {}) as kept:
            job = Tuning(pipeline, VideoRequest("", steps=STEPS), [FIRST], {"some": Quality(5)}, PARTS, 3, kept)
            tuned, _ = job.run()
            return tuned, len(kept.rows())

    first, rows = run(tmp_path / "t")
    lines = (tmp_path / "t" / "rows.jsonl").read_text().splitlines(keepends=True)
    assert run(tmp_path / "t") == (first, rows)
    (tmp_path / "t" / "rows.jsonl").write_text("".join(lines[: len(lines) // 2]))
    again, count = run(tmp_path / "t")
    assert count == rows and [one.policy for one in again] == [one.policy for one in first]


PARTS: Parts = parts_of(pairs_of(PROMPTS, 1))


@pytest.mark.parametrize("trials", [0, -1])
def test_no_trials_are_refused(pipeline: VideoPipeline, trials: int) -> None:
    with pytest.raises(InvalidRequest, match=f"trials: got {trials}, expected 1 or more"):
        tuning(pipeline, GOALS, trials=trials).check()


def test_what_the_bundle_refuses_is_refused_before_anything_runs(pipeline: VideoPipeline) -> None:
    job = Tuning(pipeline, VideoRequest("", steps=101), [FIRST], GOALS, PARTS, 1, InMemory())
    with pytest.raises(InvalidRequest, match="steps: got 101"):
        job.check()
