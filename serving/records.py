"""Jobs on disk, and in memory for as long as the disk does not take them: nobody waits for a job that has ended."""

from __future__ import annotations

import logging
from pathlib import Path

from ..engines.errors import OutputError
from .store import Record, Store

log = logging.getLogger("foresight.serving")


class Records(Store):
    """A Store whose updates are never lost while the process lives."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._unsaved: dict[str, Record] = {}

    def update(self, record: Record) -> None:
        """See Store.update; what the disk does not take is held, for `tidy`."""
        try:
            super().update(record)
            self._unsaved.pop(record.id, None)
        except OutputError:
            self._unsaved[record.id] = record
            log.exception("a job could not be written down", extra={"id": record.id})

    def tidy(self, now: float) -> None:
        """Write down what could not be before, and remove jobs whose time is over; `now` in Unix seconds."""
        try:
            for record in list(self._unsaved.values()):
                self.update(record)
            for record in self.expired(now):
                self.remove(record.id)
        except (OSError, OutputError):
            log.exception("jobs could not be tidied up")

    def get(self, job: str) -> Record | None:
        """See Store.get."""
        return self._unsaved.get(job) or super().get(job)

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> list[Record]:
        """See Store.page."""
        found = super().page(owner, after, limit, newest_first)
        return [self._unsaved.get(record.id, record) for record in found]

    def remove(self, job: str) -> None:
        """See Store.remove."""
        self._unsaved.pop(job, None)
        super().remove(job)
