"""The model families: a module each, named as in the registry's rows, which is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ...engines.errors import CheckpointError, ForesightError, InvalidRequest
from ..checkpoint import Checkpoint
from .base import ExportRequest, Split


def split_checkpoint(family: str, checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """How a checkpoint of that family falls into parts. Raises CheckpointError, InvalidRequest."""
    split: Callable[[Checkpoint, ExportRequest], Split] = import_module(f".{family}", __package__).split
    try:
        made = split(checkpoint, request)
    except ForesightError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # in the libraries' hands
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: its configuration makes no {family} model ({reason}); download it again"
        ) from error
    if request.flow_shift is not None and made.flow_shift is None:
        raise InvalidRequest(
            f"flow_shift: got {request.flow_shift:g}, but the scheduler of {checkpoint.name} has none; leave it out"
        )
    return made
