"""How many threads an engine on the CPU gets."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InvalidRequest

MOST_THREADS = 16  # unless asked for more: every engine has so many
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


def available_cores(cgroup: Path = CGROUP_CPU) -> int:
    """How many cores this process may use: those it is bound to, and no more than its container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, cgroup.read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return cores
    return max(1, min(cores, -(-quota // period)))


def engine_threads(asked: int | None) -> int:
    """The threads that an engine may use: those asked for, or the cores, up to 16. Raises InvalidRequest."""
    if asked is not None and asked < 1:
        raise InvalidRequest(f"threads: got {asked}, expected 1 or more")
    return asked or min(available_cores(), MOST_THREADS)
