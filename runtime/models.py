"""The pipelines of one runtime by name, which can be exchanged while requests run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..engines.errors import InvalidRequest, quoted
from .pipeline import VideoPipeline


@dataclass(eq=False)
class _Served:
    pipeline: VideoPipeline
    users: int = 0  # requests that are inside


class Models:
    """Thread-safe. A pipeline that is taken out is given back when the last request inside has left it."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}
        self._changed = threading.Condition()

    def names(self) -> list[str]:
        """In the order in which they were put in."""
        with self._changed:
            return list(self._served)

    def get(self, name: str) -> VideoPipeline:
        """The pipeline of that name. Raises InvalidRequest."""
        return self._find(name).pipeline

    @contextmanager
    def lease(self, name: str) -> Iterator[VideoPipeline]:
        """The pipeline of that name, which stays usable inside. Raises InvalidRequest."""
        with self._changed:
            served = self._find(name)
            served.users += 1
        try:
            yield served.pipeline
        finally:
            with self._changed:
                served.users -= 1
                self._changed.notify_all()

    def put(self, name: str, pipeline: VideoPipeline) -> VideoPipeline | None:
        """Serve it from now on; what had the name before is returned when nobody is inside any more."""
        with self._changed:
            before = self._served.get(name)
            self._served[name] = _Served(pipeline)
        return self._left(before)

    def take(self, name: str) -> VideoPipeline | None:
        """Serve it no longer; it is returned when nobody is inside any more."""
        with self._changed:
            before = self._served.pop(name, None)
        return self._left(before)

    def _left(self, served: _Served | None) -> VideoPipeline | None:
        if served is None:
            return None
        with self._changed:
            self._changed.wait_for(lambda: served.users == 0)
        return served.pipeline

    def _find(self, name: str) -> _Served:
        with self._changed:
            if name not in self._served:
                known = ", ".join(self._served) or "none"
                raise InvalidRequest(f"model: got {quoted(name)}, expected one that is loaded: {known}")
            return self._served[name]
