"""Who asks: API keys, and what is seen of a job by whom."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from ..engines.errors import InvalidRequest

ANYBODY = "anybody"
KEYS = "FORESIGHT_API_KEYS"


def read_keys(file: Path | None) -> tuple[str, ...]:
    """One a line of the file, or several between commas in the environment's `KEYS`. Raises InvalidRequest."""
    text = os.environ.get(KEYS, "")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"api_keys: {file} cannot be read ({error})") from error
    keys = tuple(key.strip() for line in text.splitlines() for key in line.split(",") if key.strip())
    if file is not None and not keys:
        raise InvalidRequest(f"api_keys: got none in {file}, expected one a line")
    return keys


class Keys:
    """The keys of a server. Without any, everybody is the same owner; keys themselves are kept nowhere."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    @property
    def needed(self) -> bool:
        """Whether there are any."""
        return bool(self._hashes)

    def owner(self, authorization: str | None) -> str | None:
        """Who a request with that header is; None for nobody who may ask."""
        if not self._hashes:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip())
        known = [hmac.compare_digest(given, each) for each in self._hashes]  # all of them: it takes equally long
        return given[:32] if scheme.lower() == "bearer" and any(known) else None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
