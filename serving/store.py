"""Jobs on disk: SQLite for what they are, files for what they made. Both survive whatever happens to the processes."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from ..engines.errors import OutputError
from .spec import Spec
from .worker import Failure, Result

Status: TypeAlias = Literal["queued", "in_progress", "completed", "failed"]
ACTIVE: tuple[Status, ...] = ("queued", "in_progress")
SCHEMA = 1
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    place INTEGER NOT NULL,
    status TEXT NOT NULL,
    expires REAL,
    idempotency_key TEXT,
    record BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS listed ON jobs (owner, place);
"""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One job. Times are Unix seconds; `owner` is who may see it; `place` rises with every job.

    `traceparent` is the span that asked for it, as W3C writes it.
    """

    id: str
    owner: str
    spec: Spec
    created_at: float
    status: Status = "queued"
    place: int = 0
    priority: int = 0
    idempotency_key: str | None = None
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    result: Result | None = None
    failure: Failure | None = None
    traceparent: str | None = None


def new_id() -> str:
    """One that nobody can guess."""
    return f"video_{secrets.token_hex(16)}"


class Store:
    """Thread-safe; one process has it open. Raises OutputError where the disk fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            self._results.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise _output_error(folder, error) from error
        with self._transaction() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(TABLE)
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise OutputError(
                    f"data {folder}: has jobs of schema {version}, expected {SCHEMA}; name another folder, or use the "
                    "version that wrote them"
                )
            database.execute(f"PRAGMA user_version={SCHEMA}")

    def close(self) -> None:
        """Afterwards nothing is read or written."""
        with self._lock:
            self._connection.close()

    def output(self, job: str) -> Path:
        """Where a job's video lies, or will."""
        return self._results / f"{job}.mp4"

    def add(self, record: Record) -> Record:
        """A new job, which gets its place."""
        with self._transaction() as database:
            (last,) = database.execute("SELECT COALESCE(MAX(place), 0) FROM jobs").fetchone()
            placed = msgspec.structs.replace(record, place=last + 1)
            database.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", _row(placed))
            return placed

    def update(self, record: Record) -> None:
        """What has become of it; nothing where it was removed meanwhile."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET status = ?, expires = ?, record = ? WHERE id = ?",
                (record.status, record.expires_at, msgspec.json.encode(record), record.id),
            )

    def get(self, job: str) -> Record | None:
        """The job, if there is one."""
        rows = self._select("SELECT record FROM jobs WHERE id = ?", job)
        return rows[0] if rows else None

    def of_key(self, owner: str, key: str) -> Record | None:
        """The job that was created with that idempotency key."""
        rows = self._select("SELECT record FROM jobs WHERE owner = ? AND idempotency_key = ?", owner, key)
        return rows[0] if rows else None

    def active(self, owner: str | None = None) -> list[Record]:
        """Jobs that wait or run, in the order in which they came; of one owner, or of all (None)."""
        rows = self._select("SELECT record FROM jobs WHERE status IN (?, ?) ORDER BY place", *ACTIVE)
        return [record for record in rows if owner in (None, record.owner)]

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> list[Record]:
        """At most `limit` of an owner's jobs, those behind `after`; none where there is no such job."""
        where, values = ["owner = ?"], [owner]
        if after is not None:
            where.append("place < (SELECT place FROM jobs WHERE id = ? AND owner = ?)")
            values += [after, owner]
        query = f"SELECT record FROM jobs WHERE {' AND '.join(where)} ORDER BY place DESC LIMIT ?"  # noqa: S608 - ours
        if not newest_first:
            query = query.replace("place <", "place >").replace("DESC", "ASC")
        return self._select(query, *values, limit)

    def expired(self, now: float) -> list[Record]:
        """Jobs whose time is over."""
        return self._select("SELECT record FROM jobs WHERE expires <= ?", now)

    def remove(self, job: str) -> None:
        """The job and its video."""
        with suppress(FileNotFoundError):
            self.output(job).unlink()
        with self._transaction() as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def sweep(self) -> None:
        """Remove files that belong to no finished job: what a killed process has left."""
        done = self._select("SELECT record FROM jobs WHERE status = 'completed'")
        known = {self.output(record.id).name for record in done}
        for path in self._results.iterdir():
            if path.name not in known and path.is_file():
                path.unlink(missing_ok=True)

    @property
    def _results(self) -> Path:
        return self.folder / "results"

    def _select(self, query: str, *values: Any) -> list[Record]:
        with self._transaction() as database:
            rows = database.execute(query, values).fetchall()
        return [msgspec.json.decode(row[0], type=Record) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._connection:
                    yield self._connection
            except sqlite3.Error as error:
                raise _output_error(self.folder, error) from error


def _row(record: Record) -> tuple[Any, ...]:
    return (
        record.id,
        record.owner,
        record.place,
        record.status,
        record.expires_at,
        record.idempotency_key,
        msgspec.json.encode(record),
    )


def _output_error(folder: Path, error: Exception) -> OutputError:
    return OutputError(f"data {folder}: {error}; check its permissions and the free space")
