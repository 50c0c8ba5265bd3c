"""What a request is made with: what a pipeline's requests share, and the prompts that are decided on together."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.backend import Backend
from ..engines.manifest import Manifest
from .admission import MemoryReservations
from .memory import MemoryLimits
from .parts import Check, check_finite, pass_all
from .request import CheckedRequest
from .residency import Residency
from .text import Tokenizer
from .trace import Trace


@dataclass(frozen=True)
class Loaded:
    """What the requests of a pipeline share; none of them changes it.

    With `only_finite`, values that no video can be made of are refused wherever they come up.
    """

    manifest: Manifest
    backend: Backend
    residency: Residency
    tokenizer: Tokenizer
    limits: MemoryLimits
    reservations: MemoryReservations
    only_finite: bool

    @property
    def check(self) -> Check:
        """Judges what every part but the blocks made."""
        return check_finite if self.only_finite else pass_all


@dataclass(frozen=True)
class Batch:
    """Prompts that are decided on together: which blocks have room in the cache, and the record of what is done."""

    request: CheckedRequest
    cached: tuple[bool, ...]
    trace: Trace
