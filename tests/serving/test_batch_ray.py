"""A batch on a cluster of Ray on this machine: whoever dies, every row is there in the end; see `make test-ray`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving.conftest import wait_for
from tests.support import snapshot

pytestmark = [pytest.mark.ray, pytest.mark.slow]
COUNT = 12
STARTED_S = 120
MAIN = "import sys; from foresight.cli import main; main(sys.argv[1:])"


def command(bundle: Path, folder: Path, output: str, *options: Any) -> list[str]:
    prompts = folder / "rows.jsonl"
    prompts.write_text("".join(f'{{"prompt": "a dog", "steps": 20, "seed": {seed}}}\n' for seed in range(COUNT)))
    arguments = ["batch", prompts, "--bundle", bundle, "--output", folder / output, "--threads", 1, "--json", *options]
    return [sys.executable, "-c", MAIN, *map(str, arguments)]


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A batch at work; it and what it has started are gone afterwards."""
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def makers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers of a batch that have a bundle."""
    return [
        one for one in psutil.Process(process.pid).children(recursive=True) if "MapWorker" in " ".join(one.cmdline())
    ]


def videos(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files there are: one that was made anew is another."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.mp4")}


def test_a_batch_whose_driver_was_killed_goes_on_and_makes_nothing_twice(bundle: Path, tmp_path: Path) -> None:
    on_ray = command(bundle, tmp_path, "ray", "--ray", "local", "--workers", 2)
    with started(on_ray) as process:
        wait_for(lambda: len(videos(tmp_path / "ray")) >= COUNT // 3, STARTED_S)
        workers = makers(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(workers, timeout=STARTED_S)
    before = videos(tmp_path / "ray")
    with started(on_ray) as process:
        document = told(process)
    assert (document["made"], document["there"], document["failed"]) == (COUNT - len(before), len(before), 0)
    assert videos(tmp_path / "ray").items() >= before.items()
    with started(command(bundle, tmp_path, "here")) as process:
        assert told(process)["made"] == COUNT
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "here")


def test_the_row_of_a_worker_that_was_killed_is_made_by_another(bundle: Path, tmp_path: Path) -> None:
    with started(command(bundle, tmp_path, "ray", "--ray", "local", "--workers", 2)) as process:
        wait_for(lambda: videos(tmp_path / "ray"), STARTED_S)
        makers(process)[0].kill()
        document = told(process)
    # the row that it was killed with was made already, or is by another
    assert (document["made"] + document["there"], document["failed"]) == (COUNT, 0) and document["there"] <= 1
    assert len(videos(tmp_path / "ray")) == len(list((tmp_path / "ray").iterdir())) == COUNT


def test_a_cluster_that_is_not_there_is_refused(bundle: Path, tmp_path: Path) -> None:
    with started(command(bundle, tmp_path, "ray", "--ray", "127.0.0.1:1")) as process:
        _, err = process.communicate()
    assert process.returncode == 2 and "ray: got '127.0.0.1:1', where no cluster answers" in err
