"""Foresight Engines: text-to-video diffusion transformers, compiled block by block.

    import foresight
    pipeline = foresight.load("bundles/model")
    video = pipeline("a red circle moving right", steps=50, seed=0, policy=foresight.Foresight(gamma=0.5))
    video.save("circle.mp4")

Everything here is imported when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.errors import (
        BundleError,
        Cancelled,
        CheckpointError,
        EngineError,
        ExportError,
        ForesightError,
        IntegrityError,
        InvalidRequest,
        OutOfMemory,
        OutputError,
    )
    from .runtime.pipeline import VideoPipeline, load
    from .runtime.policies import FixedSchedule, Forecast, Foresight, NoReuse, Static
    from .runtime.trace import StepTrace, Trace
    from .runtime.video import Video

__version__ = "0.1.0"

_HOMES = {
    "engines.errors": (
        "BundleError",
        "Cancelled",
        "CheckpointError",
        "EngineError",
        "ExportError",
        "ForesightError",
        "IntegrityError",
        "InvalidRequest",
        "OutOfMemory",
        "OutputError",
    ),
    "runtime.pipeline": ("VideoPipeline", "load"),
    "runtime.policies": ("FixedSchedule", "Forecast", "Foresight", "NoReuse", "Static"),
    "runtime.trace": ("StepTrace", "Trace"),
    "runtime.video": ("Video",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "FixedSchedule",
    "Forecast",
    "Foresight",
    "ForesightError",
    "IntegrityError",
    "InvalidRequest",
    "NoReuse",
    "OutOfMemory",
    "OutputError",
    "Static",
    "StepTrace",
    "Trace",
    "Video",
    "VideoPipeline",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
