"""What requests may ask for, beside what bundles allow."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.errors import InvalidRequest
from ..engines.manifest import Manifest
from .request import VideoRequest


@dataclass(frozen=True)
class RequestLimits:
    """What a Runtime lets in, beside what bundles allow; None is no limit.

    `work` is the most pixels x frames x steps of all prompts of a request.
    """

    steps: int | None = None
    prompts: int | None = None
    characters: int | None = None
    work: int | None = None

    def check(self, request: VideoRequest, manifest: Manifest) -> None:
        """Raises InvalidRequest."""
        shape, defaults = manifest.shape, manifest.defaults
        prompts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
        steps = defaults.steps if request.steps is None else request.steps
        asked = {
            "steps": steps,
            "prompts": len(prompts),
            "characters": max(map(len, prompts), default=0),
            "work": shape.frames * shape.height * shape.width * steps * len(prompts),
        }
        for name, got in asked.items():
            most = getattr(self, name)
            if most is not None and got > most:
                raise InvalidRequest(f"{name}: got {got}, expected at most {most}, the limit here; ask for less")
