"""This package's policies as contenders of a benchmark."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

from ..engines.errors import Cancelled
from ..engines.progress import Progress
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import NoReuse, Policy
from ..runtime.trace import Trace
from .bench import Aborted, Contender, Made, Task

REFERENCE = NoReuse()


@dataclass
class Stopwatch:
    """Processor and wall time from `start` to `stop`, in ms."""

    cpu_ms: float = 0.0
    wall_ms: float = 0.0
    _began: tuple[float, float] | None = field(default=None, init=False)

    @property
    def running(self) -> bool:
        """Whether it was started."""
        return self._began is not None

    def start(self) -> None:
        """Begin, or begin anew."""
        self._began = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """End."""
        assert self._began is not None, "it is started first"
        cpu, wall = self._began
        self.cpu_ms, self.wall_ms = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def policies_as_contenders(
    pipeline: VideoPipeline, policies: Iterable[Policy], named: Callable[[Policy], str]
) -> list[Contender]:
    """Each policy, held against the request without reuse, which comes first."""
    reference = named(REFERENCE)
    listed = [REFERENCE, *(policy for policy in policies if policy != REFERENCE)]
    return [
        Contender(named(policy), reference, lambda make=_Maker(pipeline, policy): nullcontext(make), own=True)  # type: ignore[misc]
        for policy in listed
    ]


@dataclass(frozen=True)
class _Maker:
    pipeline: VideoPipeline
    policy: Policy

    def __call__(self, task: Task, stop_after: int | None = None) -> Made:
        """Time runs from the first block, once the prologue of the first step is done, to the end of the last step."""
        watch, cancel = Stopwatch(), threading.Event()

        def on_progress(progress: Progress) -> None:
            if progress.unit == "steps" and not watch.running:
                watch.start()

        def on_step(done: int, steps: int, trace: Trace) -> None:
            if done == steps:
                watch.stop()
            if done == stop_after:
                cancel.set()

        try:
            video = self.pipeline(
                task.prompt,
                negative_prompt=task.negative_prompt,
                steps=task.steps,
                guidance=task.guidance,
                seed=task.seed,
                policy=self.policy,
                latents=task.latents,
                on_step=on_step,
                on_progress=on_progress,
                cancel=cancel,
            )
        except Cancelled as error:
            raise Aborted from error
        return Made(video.frames, video.latents, watch.cpu_ms, watch.wall_ms, video.trace.blocks_computed)
