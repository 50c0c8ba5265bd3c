"""Contenders take turns, are held against their own reference, and are told apart by what an abort leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from foresight.engines.errors import InvalidRequest
from foresight.evaluation.bench import Aborted, Bench, Contender, Made, Make, Task, pairs_around
from foresight.evaluation.evaluate import Pair
from foresight.evaluation.outcome import Outcome, Row

PAIRS = [Pair("a dog", 3), Pair("a cat", 4), Pair("a dog", 5)]
GREY = 100


@dataclass
class Fake:
    """Makes grey videos, `off` grey levels away from the seed's, in so many ms of the processor; `log` has its calls.

    With `leaks`, a request that was aborted spoils the next one, as long as the contender stays switched on.
    """

    name: str
    log: list[str]
    off: int = 0
    cpu_ms: list[float] = field(default_factory=lambda: [10.0])
    leaks: bool = False
    error: Exception | None = None
    block_work: int = 0
    _spoilt: bool = False
    _made: int = 0

    @contextmanager
    def switched(self) -> Iterator[Make]:
        self._spoilt = False
        yield self.make

    def make(self, task: Task, stop_after: int | None = None) -> Made:
        self.log.append(f"{self.name} {task.seed}{'' if stop_after is None else f' aborted after {stop_after}'}")
        if self.error is not None:
            raise self.error
        if stop_after is not None:
            self._spoilt = self.leaks
            raise Aborted
        level = GREY + task.seed + self.off + self._spoilt
        self._spoilt = False
        cpu_ms = self.cpu_ms[self._made % len(self.cpu_ms)]
        self._made += 1
        frames = np.full((2, 8, 8, 3), level, np.uint8)
        return Made(frames, task.latents + np.float32(level), cpu_ms, 2 * cpu_ms, self.block_work)

    def contender(self, reference: str, own: bool = False, adapted: str = "") -> Contender:
        return Contender(self.name, reference, self.switched, own, adapted)


@pytest.fixture
def log() -> list[str]:
    return []


def run(*contenders: Contender, pairs: list[Pair] = PAIRS) -> Outcome:
    return Bench(contenders, pairs, lambda seed: np.full(4, seed, np.float32), steps=10, guidance=2.0).run()


def row_of(outcome: Outcome, name: str) -> Row:
    (row,) = (row for row in outcome.rows if row.name == name)
    return row


def test_all_warm_up_first_and_another_one_begins_every_round(log: list[str]) -> None:
    run(*(Fake(name, log).contender("a") for name in "abc"))
    assert log[:3] == [f"{name} 3 aborted after 2" for name in "abc"]
    assert log[3:12] == ["a 3", "b 3", "c 3", "b 4", "c 4", "a 4", "c 5", "a 5", "b 5"]


def test_every_contender_is_aborted_between_two_requests_that_are_the_same(log: list[str]) -> None:
    run(Fake("a", log).contender("a"))
    assert log[4:] == ["a 3", "a 4 aborted after 7", "a 3"]
    log.clear()
    run(Fake("a", log).contender("a"), pairs=PAIRS[:1])
    assert log[2:] == ["a 3", "a 4 aborted after 7", "a 3"], (
        "where there is one pair, the other request has its own seed"
    )


def test_all_are_given_the_same_noise_prompt_and_seed(log: list[str]) -> None:
    seen: dict[str, list[tuple[str, int, bytes]]] = {"a": [], "b": []}

    @contextmanager
    def switched(name: str) -> Iterator[Make]:
        def make(task: Task, stop_after: int | None = None) -> Made:
            seen[name].append((task.prompt, task.seed, task.latents.tobytes()))
            return Fake(name, log).make(task)

        yield make

    run(*(Contender(name, "a", partial(switched, name)) for name in "ab"))
    assert seen["a"] == seen["b"]
    assert [told[:2] for told in seen["a"][1:4]] == PAIRS


def test_work_that_blocks_were_spared_is_a_share_of_the_references_where_it_is_counted(
    log: list[str],
) -> None:
    reference = Fake("a", log, block_work=40).contender("a")
    outcome = run(reference, Fake("b", log, block_work=10).contender("a"), Fake("c", log).contender("a"))
    saved = [row_of(outcome, name).block_work_saved for name in "abc"]
    assert saved == [0, 0.75, None]


def test_speed_is_a_ratio_within_a_round_and_its_median_is_told_with_the_outermost(log: list[str]) -> None:
    reference = Fake("a", log, cpu_ms=[100.0, 200.0, 300.0])
    other = Fake("b", log, cpu_ms=[50.0, 160.0, 100.0])
    row = row_of(run(reference.contender("a"), other.contender("a")), "b")
    assert (row.cpu_speedup.low, row.cpu_speedup.median, row.cpu_speedup.high) == (1.25, 2.0, 3.0)
    assert row.wall_speedup == row.cpu_speedup
    assert (row.cpu_ms, row.wall_ms) == (100.0, 200.0)


def test_quality_is_against_the_own_reference(log: list[str]) -> None:
    outcome = run(
        Fake("ours", log, off=7).contender("ours", own=True),
        Fake("our policy", log, off=8).contender("ours", own=True),
        Fake("theirs", log).contender("theirs"),
        Fake("their cache", log, off=2).contender("theirs"),
    )
    assert row_of(outcome, "our policy").psnr_db == pytest.approx(20 * math.log10(255))
    assert row_of(outcome, "their cache").worst_psnr_db == pytest.approx(20 * math.log10(255 / 2))
    assert row_of(outcome, "theirs").psnr_db is None and row_of(outcome, "theirs").identical == len(PAIRS)


def test_pooled_psnr_is_that_of_the_mean_error_and_counts_identical_videos(log: list[str]) -> None:
    class Sometimes(Fake):
        def make(self, task: Task, stop_after: int | None = None) -> Made:
            self.off = 4 if task.seed == PAIRS[0].seed else 0
            return super().make(task, stop_after)

    row = row_of(run(Fake("a", log).contender("a"), Sometimes("b", log).contender("a")), "b")
    assert row.identical == 2
    assert row.psnr_db == pytest.approx(10 * math.log10(255**2 / (4**2 / 3)))
    assert row.mean_psnr_db == row.worst_psnr_db == pytest.approx(20 * math.log10(255 / 4))


def test_references_should_make_the_same_videos(log: list[str]) -> None:
    outcome = run(Fake("a", log).contender("a"), Fake("b", log, off=1).contender("b"))
    (agreement,) = outcome.agreements
    assert (agreement.one, agreement.other, agreement.identical) == ("a", "b", 0)
    assert agreement.worst_psnr_db == pytest.approx(20 * math.log10(255))
    assert agreement.latents_max_abs == 1.0


def test_what_an_aborted_request_leaves_behind_shows_in_the_next_one(log: list[str]) -> None:
    outcome = run(Fake("a", log).contender("a"), Fake("b", log, leaks=True).contender("a"))
    clean, spoilt = (row_of(outcome, name).after_abort for name in "ab")
    assert clean is not None and clean.repeats and clean.same and clean.psnr_db is None
    assert spoilt is not None and spoilt.repeats and not spoilt.same
    assert spoilt.psnr_db == pytest.approx(20 * math.log10(255))


def test_a_contender_that_raises_is_left_out_with_its_reason_on_one_line(log: list[str]) -> None:
    broken = Fake("b", log, error=RuntimeError("two\nlines"))
    outcome = run(Fake("a", log).contender("a"), broken.contender("a"))
    assert [row.name for row in outcome.rows] == ["a"]
    assert [(missing.name, missing.reason) for missing in outcome.unavailable] == [("b", "RuntimeError: two lines")]
    assert log.count("b 3 aborted after 2") == 1 and "b 3" not in log, "it is not asked again"


def test_without_its_reference_a_contender_is_left_out_too(log: list[str]) -> None:
    broken = Fake("a", log, error=ValueError("no"))
    outcome = run(broken.contender("a"), Fake("b", log).contender("a"), Fake("c", log).contender("c"))
    assert [row.name for row in outcome.rows] == ["c"]
    assert {missing.name for missing in outcome.unavailable} == {"a", "b"}


def test_an_error_of_this_package_is_no_reason_to_leave_it_out(log: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        run(Fake("a", log, error=InvalidRequest("steps: got 0")).contender("a", own=True))


def test_whose_a_contender_is_and_whether_it_was_changed_is_told(log: list[str]) -> None:
    fake = Fake("a", log)
    kinds = [fake.contender("a", own=True).kind, fake.contender("a").kind, fake.contender("a", adapted="so").kind]
    assert kinds == ["this project", "as shipped", "adapted"]


def test_pairs_go_round_the_prompts_and_each_has_a_seed_of_its_own() -> None:
    assert pairs_around(["x", "y"], 3) == [("x", 0), ("y", 1), ("x", 2)]
    with pytest.raises(InvalidRequest, match="pairs: got 0"):
        pairs_around(["x"], 0)
    with pytest.raises(InvalidRequest, match="pairs: got none"):
        run(pairs=[])
