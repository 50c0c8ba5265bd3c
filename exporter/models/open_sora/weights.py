"""Whether a checkpoint's weights are exactly those of a module."""

from __future__ import annotations

from collections.abc import Collection

from ....engines.errors import CheckpointError

NAMED = 5  # names that a message lists


def check_names(
    what: str, expected: Collection[str], stored: Collection[str], aliases: Collection[tuple[str, str]] = ()
) -> None:
    """Require that every expected weight is stored, and nothing else. Raises CheckpointError, which names some.

    `aliases` are (part of a name, how older checkpoints spell it).
    """
    known = set(expected)
    stored = {_modern(name, known, aliases) for name in stored}
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
        for kind, names in (("missing", sorted(known - stored)), ("unknown", sorted(stored - known)))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{what}: weights {' and '.join(problems)}, expected the {len(known)} that its config.json makes; download "
            "it again, or give the checkpoint that this configuration belongs to"
        )


def _modern(name: str, known: set[str], aliases: Collection[tuple[str, str]]) -> str:
    if name not in known:
        for new, old in aliases:
            if name.replace(old, new) in known:
                return name.replace(old, new)
    return name
