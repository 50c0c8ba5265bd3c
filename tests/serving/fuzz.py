"""What the OpenAPI document allows, and what it does not, sent to a server by schemathesis; see `make fuzz`.

Requests have a valid key, another one's, a wrong one or none; ids are those of jobs that wait, are completed, failed or
deleted, or made up. Every answer has a status, a type and a schema that the document names; none is a server's error,
none takes long, and none has a traceback or a folder in it.

    python -m tests.serving.fuzz --cases 2000
    FORESIGHT_API_KEYS=one,two python -m tests.serving.fuzz --address http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import SkipTest

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from foresight.serving.auth import KEYS
from tests.serving.apart import free_port, wait_until_ready

REPOSITORY = Path(__file__).parents[2]
HANG_S = 10.0
END_S = 120.0  # until a job has ended, however busy the machine is
DEADLINE_S = 2.0  # of the jobs of a server that is started here: of several long ones the last fails
SHORT_JOBS, LONG_JOBS = 4, 5
BODIES, OTHERS = 0.25, 0.1  # shares of an operation, of cases that are allowed and again of those that are not
LEAKS = re.compile(r'Traceback|File "|site-packages|/(?:home|root|tmp|usr|work|Users|private)/')
LONG = {"prompt": "a dog", "num_inference_steps": 100, "policy": "none", "guidance_scale": 4.0}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
ASKED_BY = ("owner", "owner", "none", "owner", "owner", "wrong", "owner", "owner", "other")
ASKED_FOR = ("made up", "waiting", "completed", "failed", "deleted")
RANGES = (None, "bytes=0-99", "bytes=-1", "bytes=999999999-", "bytes=", "lines=0-1", "bytes=0-1,5-9")


class Jobs:
    """Ids of one owner's jobs, by what has become of them."""

    def __init__(self, address: str, key: str) -> None:
        self._http = httpx.Client(
            base_url=f"{address}/v1", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=HANG_S
        )
        self.ids: dict[str, list[str]] = {"waiting": [], "completed": [], "failed": [], "deleted": []}
        for _ in range(SHORT_JOBS):
            self._keep(self._create({"prompt": "a dog", "num_inference_steps": 2}))
        for job in [self._create(LONG) for _ in range(LONG_JOBS)]:
            self._keep(job)
        gone = self._create(LONG)
        self.delete(gone)

    def one(self, what: str) -> str | None:
        """The id of such a job; None where there is none."""
        if what == "waiting":
            for job in list(self.ids[what]):
                if self._status(job) not in ("queued", "in_progress"):
                    self.ids[what].remove(job)
                    self._keep(job)
            if not self.ids[what]:
                self.ids[what].append(self._create({**LONG, "priority": -100}))
        return self.ids[what][-1] if self.ids.get(what) else None

    def keeps(self, job: str) -> bool:
        """Whether it is the last one that is completed or failed: those take time to make."""
        return any(self.ids[what] == [job] for what in ("completed", "failed"))

    def delete(self, job: str, ask: bool = True) -> None:
        """It is deleted, here or where `ask` is False by somebody else."""
        if ask:
            self._http.delete(f"/videos/{job}").raise_for_status()
        for ids in self.ids.values():
            if job in ids:
                ids.remove(job)
        self.ids["deleted"].append(job)

    def _create(self, body: dict[str, Any]) -> str:
        return str(self._http.post("/videos", json=body).raise_for_status().json()["id"])

    def _status(self, job: str) -> str:
        return str(self._http.get(f"/videos/{job}").raise_for_status().json()["status"])

    def _keep(self, job: str) -> None:
        ends = time.monotonic() + END_S
        while (status := self._status(job)) in ("queued", "in_progress"):
            assert time.monotonic() < ends, f"{job} has not ended"
            time.sleep(0.05)
        self.ids[status].append(job)


@dataclass
class Fuzz:
    """One run: its server, whose jobs there are, and what was found. `keys` are those of two owners, or none."""

    address: str
    keys: Sequence[str]
    jobs: Jobs
    statuses: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    wrong: set[str] = field(default_factory=set)

    def run(self, cases: int) -> dict[str, Any]:
        """About that many cases, a half of them bodies; returns what was asked and answered, and what was wrong."""
        headers = {"Authorization": f"Bearer {self.keys[0]}"} if self.keys else {}
        schema = schemathesis.openapi.from_url(f"{self.address}/openapi.json", headers=headers)
        for operation in [found.ok() for found in schema.get_all_operations()]:
            self._by, self._for, self._range = cycle(ASKED_BY), cycle(ASKED_FOR), cycle(RANGES)
            some = settings(
                max_examples=int(cases * (BODIES if operation.body else OTHERS)),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            if not operation.body and "{" not in operation.path:  # by everybody, also where nothing varies
                for _ in ASKED_BY:
                    self._ask(operation.Case())
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                with suppress(Unsatisfiable, SkipTest):  # anything is allowed there
                    some(given(case=operation.as_strategy(generation_mode=mode))(self._ask))()
        return {
            "cases": sum(self.statuses.values()),
            "asked": dict(sorted(self.asked.items())),
            "statuses": dict(sorted(self.statuses.items())),
            "wrong": sorted(self.wrong),
        }

    def _ask(self, case: Any) -> None:
        by, job = next(self._by), None
        if "{video_id}" in case.path:
            what = next(self._for)
            job = self.jobs.one(what)
            if job is None or (case.method == "DELETE" and self.jobs.keeps(job)):
                what, job = "made up", None
            else:
                case.path_parameters = {**case.path_parameters, "video_id": job}
            self.asked[f"id {what}"] += 1
        elif "after" in (case.query or {}) and (job := self.jobs.one(next(self._for))):
            case.query = {**case.query, "after": job}
        self.asked[f"key {by if self.keys else 'not needed'}"] += 1
        headers = self._headers(case, by)
        try:
            answer = case.call(base_url=self.address, headers=headers, timeout=HANG_S)
        except requests.Timeout:
            self.wrong.add(f"{case.method} {case.path}: took more than {HANG_S} s")
            return
        self.statuses[f"{case.method} {case.path} {answer.status_code}"] += 1
        if case.method == "DELETE" and answer.status_code == 200 and job is not None:
            self.jobs.delete(job, ask=False)
        self._judge(case, answer)

    def _headers(self, case: Any, by: str) -> dict[str, str]:
        keys = dict(zip(("owner", "other"), self.keys, strict=False)) | {"wrong": "not-a-key"}
        if case.method == "POST":  # its jobs are not the owner's, who has to have room for more
            by = {"owner": "other", "other": "owner"}.get(by, by)
        headers = {"Authorization": f"Bearer {keys[by]}"} if by in keys else {}
        if case.path.endswith("/content") and (span := next(self._range)):
            headers["Range"] = span
        return headers

    def _judge(self, case: Any, answer: Any) -> None:
        told = "" if answer.headers.get("content-type") == ["video/mp4"] else answer.text
        if found := LEAKS.search(told):
            self.wrong.add(f"{case.method} {case.path} {answer.status_code}: tells {found.group()}")
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as failures:
            for each in failures.exceptions:
                why = " ".join(f"{each.title}: {each.message}".split())[:200]
                self.wrong.add(f"{case.method} {case.path} {answer.status_code}: {why}")


@contextmanager
def server(bundle: Path, keys: Sequence[str]) -> Iterator[str]:
    """The address of a server on a free port, whose folder goes with it. Its bundle is exported where there is none."""
    cli = [sys.executable, str(REPOSITORY / "cli.py")]
    if not bundle.exists():
        subprocess.run([*cli, "export", "--model", "latte-demo", "--output", str(bundle)], check=True)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        port = free_port()
        bounds = {"port": port, "data": f"{folder}/served", "deadline": DEADLINE_S, "jobs-per-key": 8, "threads": 1}
        command = [*cli, "serve", str(bundle), *(f"--{name}={value}" for name, value in bounds.items())]
        environment = {**os.environ, KEYS: ",".join(keys)}
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                wait_until_ready(f"http://127.0.0.1:{port}", process)
                yield f"http://127.0.0.1:{port}"
                assert process.poll() is None, "the server has ended by itself"
            finally:
                process.terminate()
                process.wait()
                log.seek(0)
                lines = log.readlines()
                sys.stderr.writelines(lines[-1:])
        told = [line for line in lines if "Traceback" in line]
        assert not told, f"the server's log has a traceback: {told[0]}"


def main() -> int:
    """Run it, print one JSON document; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help=f"of a server that runs, with the keys that {KEYS} has; else one is started")
    parser.add_argument("--bundle", type=Path, default=REPOSITORY / "bundles" / "latte-demo")
    parser.add_argument("--cases", type=int, default=2000)
    options = parser.parse_args()
    if options.address:
        keys = [key for key in os.environ.get(KEYS, "").split(",") if key]
        found = fuzz(options.address, keys, options.cases)
    else:
        with server(options.bundle, ("one", "two")) as address:
            found = fuzz(address, ("one", "two"), options.cases)
        missing = {f"id {what}" for what in ASKED_FOR} | {f"key {by}" for by in ASKED_BY}
        found["wrong"] += sorted(f"{what}: no case has it" for what in missing - found["asked"].keys())
    print(json.dumps(found, indent=1))  # noqa: T201
    return 1 if found["wrong"] else 0


def fuzz(address: str, keys: Sequence[str], cases: int) -> dict[str, Any]:
    """See `Fuzz.run`."""
    return Fuzz(address, keys, Jobs(address, keys[0] if keys else "")).run(cases)


if __name__ == "__main__":
    sys.exit(main())
