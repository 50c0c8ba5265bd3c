"""How many threads an engine gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from foresight.engines.cores import MOST_THREADS, available_cores, engine_threads
from foresight.engines.errors import InvalidRequest


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("max 100000", None), ("6400000 100000", None)]
)
def test_a_containers_share_of_time_limits_the_threads(tmp_path: Path, quota: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    everything = available_cores(tmp_path / "none")
    assert available_cores(tmp_path / "cpu.max") == (cores or everything)


def test_an_engine_gets_what_was_asked_for_or_the_cores() -> None:
    assert engine_threads(40) == 40
    assert engine_threads(None) == min(available_cores(), MOST_THREADS)


@pytest.mark.parametrize("threads", [0, -1])
def test_an_engine_needs_a_thread(threads: int) -> None:
    with pytest.raises(InvalidRequest, match=f"threads: got {threads}, expected 1 or more"):
        engine_threads(threads)
