"""What requests without reuse put out, recorded for policies that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ..engines.arrays import Array, HostArray
from ..engines.errors import Cancelled
from ..engines.progress import OnProgress, Progress
from ..runtime.admission import CancelToken
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import Context, Decider, NoReuse
from ..runtime.policies.base import Calibration
from ..runtime.request import VideoRequest
from .evaluate import Pair


def calibration_of(
    pipeline: VideoPipeline,
    request: VideoRequest,
    pairs: Sequence[Pair],
    on_progress: OnProgress,
    cancel: CancelToken | None = None,
) -> Calibration:
    """Run all pairs without reuse. The outputs of one request are in memory at a time. Raises what a request raises."""
    products = []
    recorder = Recorder(pipeline.backend.arrays.to_host)
    for done, pair in enumerate(pairs):
        if cancel is not None and cancel.is_set():
            raise Cancelled("request: cancelled between two videos")
        on_progress(Progress("recording", done, len(pairs), "videos"))
        recorded = replace(request, prompt=pair.prompt, seed=pair.seed, policy=recorder)
        pipeline.generate(recorded, cancel=cancel)
        products.append(recorder.decider.products())
    return Calibration(recorder.decider.context.schedule, np.stack(products))


class Recorder(NoReuse):
    """Reuses nothing, and keeps the outputs of the last request that it began."""

    name: ClassVar[str] = "recorder"

    def __init__(self, to_host: Callable[[Array], HostArray]) -> None:
        object.__setattr__(self, "_to_host", to_host)  # settings of policies are frozen

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        object.__setattr__(self, "decider", _Recording(context, vars(self)["_to_host"]))
        return self.decider

    decider: _Recording


class _Recording(Decider):
    def __init__(self, context: Context, to_host: Callable[[Array], HostArray]) -> None:
        super().__init__(context)
        self._to_host = to_host
        self._outputs: list[HostArray] = []

    def see(self, step: int, output: Array) -> None:
        self._outputs.append(np.array(self._to_host(output)).reshape(-1))

    def products(self) -> HostArray:
        """Inner products of all outputs, divided by their size, (steps, steps) fp64."""
        outputs = np.stack(self._outputs).astype(np.float64)
        self._outputs.clear()
        return np.asarray(outputs @ outputs.T / outputs.shape[1])
