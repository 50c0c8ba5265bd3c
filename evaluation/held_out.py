"""Which pairs of a prompt and a seed are used for what when settings are tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engines.errors import InvalidRequest
from .evaluate import Pair

LEAST_PAIRS = 4
LEAST_IN_THREE = 6  # prompts, or pairs where there are fewer prompts, from which on a third part can be held out
TUNING, SELECTION, HELD_OUT = range(3)
IN_THREE = (TUNING, HELD_OUT, SELECTION, HELD_OUT)  # in turns: half of the pairs choose, half report
IN_TWO = (TUNING, HELD_OUT)


@dataclass(frozen=True)
class Parts:
    """Pairs by what they are used for; where there are only two parts, `selection` and `held_out` are the same."""

    tuning: tuple[Pair, ...]
    selection: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    @property
    def choosing(self) -> tuple[Pair, ...]:
        """Those that have a say in what is chosen."""
        return (*self.tuning, *self.selection)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.choosing, *self.held_out)))

    @property
    def reports_what_chose(self) -> bool:
        """Whether what is reported of a setting has been chosen by."""
        return self.selection == self.held_out


def parts_of(pairs: Sequence[Pair]) -> Parts:
    """Half of the pairs to choose by, in two parts, and half held out; fewer than six are split in two.

    No prompt is in two parts where there are enough. Raises InvalidRequest.
    """
    if len(pairs) < LEAST_PAIRS:
        raise InvalidRequest(
            f"prompts: got {len(pairs)} pairs of a prompt and a seed, expected {LEAST_PAIRS} or more, better some "
            "dozen; give a file with one prompt a line, or more seeds"
        )
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    apart = len(prompts) >= LEAST_IN_THREE
    turns = IN_THREE if len(pairs) >= LEAST_IN_THREE else IN_TWO
    found: dict[int, list[Pair]] = {part: [] for part in turns}
    for place, pair in enumerate(pairs):
        turn = prompts.index(pair.prompt) if apart else place
        found[turns[turn % len(turns)]].append(pair)
    held_out = tuple(found[HELD_OUT])
    return Parts(tuple(found[TUNING]), tuple(found[SELECTION]) if SELECTION in found else held_out, held_out)
