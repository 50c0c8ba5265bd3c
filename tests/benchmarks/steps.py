"""Steps that only say that they were taken: what other processes import, which should not take long."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.step_time import Step


def logged_step(log: Path, name: str, fails_in: int | None = None) -> Step:
    """Its step writes the name, and how many of the processes that were made for one are still there."""
    taken = 0
    with (log / "processes").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")

    def step() -> None:
        nonlocal taken
        taken += 1
        if taken == fails_in:
            raise RuntimeError(f"{name} fails")
        made = (log / "processes").read_text(encoding="utf-8").split()
        there = sum(Path("/proc", number).exists() for number in made)
        with (log / "steps").open("a", encoding="utf-8") as file:
            file.write(f"{name} of {there}\n")

    return step
