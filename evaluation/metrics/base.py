"""What a metric is: one number about some videos, by itself or held against the same requests without reuse."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from ...engines.arrays import HostArray
from ...engines.errors import InvalidRequest, one_line


@dataclass(frozen=True)
class Judged:
    """A video, and the same request without reuse: both (frames, height, width, 3) uint8, which are only read."""

    frames: HostArray
    reference: HostArray
    prompt: str


Measure: TypeAlias = Callable[[Iterable[Judged]], float]


@dataclass(frozen=True)
class Metric:
    """A row of the registry.

    `load` makes what measures, and may take long: networks are loaded there, and kept. `compares` is False for what
    judges a video by itself, and then is told of the reference too; `of_set` is True for what tells nothing of a single
    video, but how all of them are distributed. `modules` are imported by it, and come with the extra `extra`; without
    one they are the package's own. `digits` are shown behind the point.
    """

    name: str
    label: str
    more_is_better: bool
    load: Callable[[], Measure]
    digits: int = 4
    compares: bool = True
    of_set: bool = False
    modules: tuple[str, ...] = ()
    extra: str | None = None

    def shown(self, value: float) -> str:
        """A value in words, with the digits that tell something."""
        return f"{value:.{self.digits}f}"

    def check(self) -> None:
        """Raises InvalidRequest where a library is missing."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise InvalidRequest(
                    f"metrics: {self.name} needs {module}, which cannot be imported ({one_line(error)}); "
                    f'pip install "foresight-engines[{self.extra}]", or leave {self.name} out'
                ) from error


@contextmanager
def weights_of(metric: str) -> Iterator[None]:
    """Turns what a library raises where its weights cannot be had into InvalidRequest."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidRequest(
            f"metrics: the weights of {metric} cannot be loaded ({one_line(error)}); put them where its library looks "
            f"for them, or leave {metric} out"
        ) from error


@dataclass(frozen=True)
class LoadedMetric:
    """A metric that is ready to measure."""

    metric: Metric
    measure: Measure
