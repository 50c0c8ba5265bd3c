"""What a server adds to the videos it makes: its overhead under load, and how soon it answers while two requests run.

8 clients make 100 videos by one worker, polling. Overhead is the time in which the worker had nothing to do though
jobs waited: all the time from the first request to the last answer, less that of the requests' phases. Then the same
clients meet a server of which fewer jobs may wait than they want: those it turns away come again when it says.

    python -m benchmarks.serving_load --bundle bundles/latte-demo --save
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.common import finish
from tests.serving.apart import free_port, wait_until_ready

CLIENTS, POLL_SECONDS = 8, 0.2
BODY = {"prompt": "a red circle moving right", "seed": 0}


WAITING, PER_KEY = 4, 6  # of a server that is asked for more
SHORT = {**BODY, "num_inference_steps": 5}
MOST_PAUSE = 0.5  # however much later the server says


@contextmanager
def server(bundle: Path, workers: int, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Its address, and the process that answers."""
    with tempfile.TemporaryDirectory() as data:
        port = free_port()
        command = [sys.executable, "cli.py", "serve", str(bundle), "--port", str(port), "--data", data]
        command += ["--threads", "1", "--workers", str(workers), "--drain", "1", *options]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            address = f"http://127.0.0.1:{port}"
            try:
                wait_until_ready(address)
                yield address, psutil.Process(process.pid)
            finally:
                process.terminate()


def load(bundle: Path, requests: int) -> dict[str, Any]:
    """Overhead of HTTP and queue, as shares of the time that requests take."""
    with server(bundle, 1) as (address, process), httpx.Client(base_url=address, timeout=60) as http:

        def make(_: int) -> float:
            job = http.post("/v1/videos", json=BODY).raise_for_status().json()["id"]
            while (video := http.get(f"/v1/videos/{job}").json())["status"] in ("queued", "in_progress"):
                time.sleep(POLL_SECONDS)
            assert video["status"] == "completed", video["error"]
            return float(video["inference_time_s"])

        make(0)
        cpu, began = sum(process.cpu_times()[:2]), time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as threads:
            seconds = list(threads.map(make, range(requests)))
        wall, cpu = time.monotonic() - began, sum(process.cpu_times()[:2]) - cpu
        jobs = http.get("/v1/videos", params={"limit": 100, "order": "asc"}).json()["data"]
        ordered = [job["completed_at"] for job in jobs] == sorted(job["completed_at"] for job in jobs)
    return {
        "requests": requests,
        "completed": len(seconds),
        "in_order": ordered,
        "generation_s": sum(seconds),
        "wall_s": wall,
        "overhead": wall / sum(seconds) - 1,
        "server_cpu_share": cpu / sum(seconds),
    }


def limits(bundle: Path, requests: int) -> dict[str, Any]:
    """What becomes of clients that want more than may wait: how often they were turned away, and whether all ended."""
    options = ("--waiting", str(WAITING), "--jobs-per-key", str(PER_KEY))
    with server(bundle, 1, *options) as (address, _), httpx.Client(base_url=address, timeout=60) as http:

        def make(_: int) -> tuple[int, int]:
            """How often it was turned away, and how many of all jobs had not ended at most."""
            refused = most = 0
            while (answer := http.post("/v1/videos", json=SHORT)).status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                refused += 1
                time.sleep(min(float(answer.headers["retry-after"]), MOST_PAUSE))
            job = answer.raise_for_status().json()["id"]
            while (video := http.get(f"/v1/videos/{job}").json())["status"] in ("queued", "in_progress"):
                listed = http.get("/v1/videos", params={"limit": 2 * CLIENTS}).json()["data"]
                most = max(most, sum(one["status"] in ("queued", "in_progress") for one in listed))
                time.sleep(POLL_SECONDS)
            assert video["status"] == "completed", video["error"]
            return refused, most

        with ThreadPoolExecutor(CLIENTS) as threads:
            told = list(threads.map(make, range(requests)))
        jobs = http.get("/v1/videos", params={"limit": 100, "order": "asc"}).json()["data"]
    ends = [job["completed_at"] for job in jobs]
    return {
        "completed": len(told),
        "turned_away": sum(refused for refused, _ in told),
        "most_unfinished": max(most for _, most in told),
        "allowed_unfinished": min(WAITING + 1, PER_KEY),
        "in_order": ends == sorted(ends),
    }


def answers(bundle: Path, count: int) -> dict[str, Any]:
    """Milliseconds until a GET is answered while two requests run."""
    with server(bundle, 2) as (address, _), httpx.Client(base_url=address, timeout=60) as http:
        long = {**BODY, "num_inference_steps": 100, "policy": "none"}
        jobs: list[str] = []
        took = []
        for number in range(count):
            if number % 100 == 0:
                for job in jobs:
                    http.delete(f"/v1/videos/{job}")
                jobs = [http.post("/v1/videos", json=long).raise_for_status().json()["id"] for _ in range(2)]
            started = time.perf_counter()
            http.get(f"/v1/videos/{jobs[number % 2]}").raise_for_status()
            took.append(1e3 * (time.perf_counter() - started))
            time.sleep(0.01)
    return {"answers": count, **{f"p{share}_ms": float(np.percentile(took, share)) for share in (50, 95, 99)}}


def main() -> None:
    """Measure all, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/latte-demo"))
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving_load.json")
    options = parser.parse_args()
    result = answers(options.bundle, options.answers) | load(options.bundle, options.requests)
    result["limits"] = limits(options.bundle, options.requests)
    finish("serving_load", result, options.save)


if __name__ == "__main__":
    main()
