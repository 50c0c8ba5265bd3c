"""Words that messages share: sizes that can be told apart, counted nouns, and the command that the reader typed."""

from __future__ import annotations

import sys
from pathlib import Path

MEBI = 2**20


def mebibytes(*sizes: float) -> tuple[str, ...]:
    """Sizes in bytes as numbers of MiB, with as few decimals as tell different ones apart (at least one below 100)."""
    for decimals in range(0 if min(sizes) >= 100 * MEBI else 1, 8):
        words = tuple(f"{size / MEBI:.{decimals}f}" for size in sizes)
        if len(set(words)) == len(set(sizes)):
            break
    return words


def plural(count: int, noun: str) -> str:
    """A count and its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def command(arguments: str) -> str:
    """How the reader would run our command line: from a clone as `python cli.py …`, else as `foresight …`."""
    return f"{'python cli.py' if Path(sys.argv[0]).name == 'cli.py' else 'foresight'} {arguments}"
