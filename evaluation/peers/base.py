"""What a peer is: how it is switched on in a pipeline of diffusers, and what has to be done to that pipeline first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..bench import Task
from .pipeline import DiffusersPipeline

Settings = Mapping[str, Any]
Switch = Callable[["Loaded", Settings], AbstractContextManager[object]]


@dataclass(frozen=True)
class Loaded:
    """What a peer is given: the pipeline, and requests of no pair that it may measure before anything is timed.

    `kept` is for what it measured.
    """

    pipeline: DiffusersPipeline
    steps: int
    others: Sequence[Task]
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """Something that a peer needs and its makers do not ship for every pipeline.

    `needed` tells of a pipeline whether it lacks it; `applied` adds it while the block runs; `told` is what that is.
    """

    told: str
    needed: Callable[[DiffusersPipeline], bool]
    applied: Callable[[DiffusersPipeline], AbstractContextManager[object]]


@dataclass(frozen=True)
class Peer:
    """A row of the registry. `switch` has it on, in each of its `variants`, while the block runs.

    `needs` are distributions that have to be installed, `adapters` what it needs of the pipeline. What is `optional`
    takes long, and runs only when it is asked for.
    """

    name: str
    needs: tuple[str, ...]
    switch: Switch
    variants: tuple[Settings, ...] = ({},)
    adapters: tuple[Adapter, ...] = ()
    optional: bool = False
