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
        QueueFull,
    )
    from .engines.progress import Progress
    from .runtime.device import Runtime
    from .runtime.embeddings import PromptEmbeddings
    from .runtime.estimate import Estimate
    from .runtime.jobs import Job
    from .runtime.limits import RequestLimits
    from .runtime.memory import MemoryPlan
    from .runtime.pipeline import VideoPipeline, load
    from .runtime.policies import FixedSchedule, Forecast, Foresight, NoReuse, Policy, Static
    from .runtime.request import VideoRequest
    from .runtime.stream import Frames, Step
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
        "QueueFull",
    ),
    "engines.progress": ("Progress",),
    "runtime.device": ("Runtime",),
    "runtime.embeddings": ("PromptEmbeddings",),
    "runtime.estimate": ("Estimate",),
    "runtime.jobs": ("Job",),
    "runtime.limits": ("RequestLimits",),
    "runtime.memory": ("MemoryPlan",),
    "runtime.pipeline": (
        "VideoPipeline",
        "load",
    ),
    "runtime.policies": (
        "FixedSchedule",
        "Forecast",
        "Foresight",
        "NoReuse",
        "Policy",
        "Static",
    ),
    "runtime.request": ("VideoRequest",),
    "runtime.stream": (
        "Frames",
        "Step",
    ),
    "runtime.trace": (
        "StepTrace",
        "Trace",
    ),
    "runtime.video": ("Video",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "Estimate",
    "ExportError",
    "FixedSchedule",
    "Forecast",
    "Foresight",
    "ForesightError",
    "Frames",
    "IntegrityError",
    "InvalidRequest",
    "Job",
    "MemoryPlan",
    "NoReuse",
    "OutOfMemory",
    "OutputError",
    "Policy",
    "Progress",
    "PromptEmbeddings",
    "QueueFull",
    "RequestLimits",
    "Runtime",
    "Static",
    "Step",
    "StepTrace",
    "Trace",
    "Video",
    "VideoPipeline",
    "VideoRequest",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
