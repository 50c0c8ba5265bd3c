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
        outputs, turns = recorder.taken()
        products.append(outputs @ outputs.T / outputs.shape[1])
    _, *later = turns
    return Calibration(turns[0].schedule, np.stack(products), tuple(context.before for context in later))


class Recorder(NoReuse):
    """Reuses nothing, and keeps the outputs of one request until they are taken."""

    name: ClassVar[str] = "recorder"

    def __init__(self, to_host: Callable[[Array], HostArray]) -> None:
        object.__setattr__(self, "_to_host", to_host)  # settings of policies are frozen
        object.__setattr__(self, "_turns", [])
        object.__setattr__(self, "_outputs", [])

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Recording(context, self)

    def keep(self, context: Context, step: int, output: Array) -> None:
        """The output of a step of a turn; only turns with steps have any."""
        if step == 0:
            self._turns.append(context)
        self._outputs.append(np.array(self._to_host(output)).reshape(-1))

    def taken(self) -> tuple[HostArray, list[Context]]:
        """The outputs of all steps, (steps, numbers) fp64, and of each turn that had some its context."""
        taken = np.stack(self._outputs).astype(np.float64), list(self._turns)
        self._outputs.clear()
        self._turns.clear()
        return taken

    _to_host: Callable[[Array], HostArray]
    _turns: list[Context]
    _outputs: list[HostArray]


class _Recording(Decider):
    def __init__(self, context: Context, recorder: Recorder) -> None:
        super().__init__(context)
        self._recorder = recorder

    def see(self, step: int, output: Array) -> None:
        self._recorder.keep(self.context, step, output)
