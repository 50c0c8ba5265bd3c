"""Messages never contradict themselves, and name the command that their reader has."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foresight.engines.wording import command, mebibytes

MEBI = 2**20


def test_sizes_that_differ_are_written_differently() -> None:
    assert mebibytes(0.2 * MEBI, 0.21 * MEBI) == ("0.20", "0.21")
    assert mebibytes(1.0 * MEBI, 2.0 * MEBI) == ("1.0", "2.0")
    assert mebibytes(200 * MEBI, 300 * MEBI) == ("200", "300")
    assert mebibytes(5 * MEBI, 5 * MEBI) == ("5.0", "5.0")


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_any_two_sizes_in_whole_bytes_are_told_apart(one: int, other: int) -> None:
    first, second = mebibytes(one, other)
    assert (first == second) == (one == other)


@pytest.mark.parametrize(
    ("ran", "words"), [("/x/cli.py", "python cli.py"), ("/bin/foresight", "foresight"), ("", "foresight")]
)
def test_a_command_is_named_as_it_was_run(monkeypatch: pytest.MonkeyPatch, ran: str, words: str) -> None:
    monkeypatch.setattr(sys, "argv", [ran])
    assert command("export --model latte") == f"{words} export --model latte"
