"""Every error that Foresight raises on purpose.

    ForesightError                  exit code 1: the command failed
    ├── InvalidRequest              2: an argument is out of range or contradicts another (also a ValueError)
    ├── BundleError                 3: a bundle or engine is missing, or not for this machine or version
    ├── IntegrityError              4: a bundle's files are not the ones its manifest vouches for
    ├── CheckpointError             1: a checkpoint cannot be exported
    ├── ExportError                 1: a graph could not be exported, or differs from the module it came from
    ├── EngineError                 1: an engine could not be loaded or failed while running
    │   └── OutOfMemory             1: the device has no room for it now; fewer or smaller requests may fit
    ├── OutputError                 1: a result could not be written
    ├── QueueFull                   1: too many requests wait already; try again later
    └── Cancelled                   1: a request was ended: by its caller, its deadline, or a close

Each message is one line: the thing, what was got, what was expected, what to do. Errors of onnxruntime, safetensors
and the other libraries are turned into these where they are called, with the original as `__cause__`.
"""

from __future__ import annotations

import reprlib

QUOTED = 40  # characters of what users sent that a message may repeat


class ForesightError(Exception):
    """Root of the tree; `exit_code` is what the command line exits with."""

    exit_code = 1


class InvalidRequest(ForesightError, ValueError):
    """An argument of a call cannot be honoured."""

    exit_code = 2


class BundleError(ForesightError):
    """A bundle or one of its engines is missing, or was made for something else."""

    exit_code = 3


class IntegrityError(ForesightError):
    """A bundle's content is not what its manifest says, or is not allowed in a bundle."""

    exit_code = 4


class CheckpointError(ForesightError):
    """A checkpoint is missing, incomplete, or of a kind that cannot be exported."""


class ExportError(ForesightError):
    """A part of a model could not be turned into a graph that computes the same."""


class EngineError(ForesightError):
    """An engine could not be loaded, or failed while running."""


class OutOfMemory(EngineError):
    """The device has no room for it now. The pipeline stays usable, and fewer or smaller requests may fit."""


class OutputError(ForesightError):
    """A video, page or array could not be written."""


class QueueFull(ForesightError):
    """Too many requests wait already. `retry_after` is the seconds after which one is expected to be done, if known."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(ForesightError):
    """The request was cancelled before it was done; its buffers are free again.

    `reason` says by whom: "caller", by its token; "deadline", by its own; "closed", with its pipeline; "exit", with the
    interpreter.
    """

    def __init__(self, message: str, reason: str = "caller") -> None:
        super().__init__(message)
        self.reason = reason


def one_line(reason: object) -> str:
    """What a library gave as its reason, without line breaks."""
    return " ".join(str(reason).split())


def quoted(value: object) -> str:
    """What a caller passed, in one line for a message: as Python writes it, of at most `QUOTED` characters and `…`."""
    if isinstance(value, (str, bytes)):
        text = repr(value[: QUOTED + 1])
        return text if len(value) <= QUOTED and len(text) <= QUOTED + 2 else f"{text[: QUOTED + 1]}…"
    try:
        text = one_line(_SHORT.repr(value))
    except Exception:  # noqa: BLE001 - of any type's own __repr__
        text = f"a {type(value).__name__}"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


_SHORT = reprlib.Repr()  # looks at the first few items of what is long
