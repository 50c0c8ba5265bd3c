"""A server in a process of its own, for what takes longer than a test."""

from __future__ import annotations

import logging
import socket
import subprocess
import time
from pathlib import Path

import httpx
import uvicorn

from foresight.serving.api import create_app
from foresight.serving.pool import Main
from foresight.serving.service import VideoService
from foresight.serving.settings import ServerSettings, WorkerSettings

READY_S = 120.0


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def serving(bundle: Path, data: Path, port: int, main: Main) -> None:
    """Serve a bundle, by workers of that kind, until SIGTERM."""
    logging.disable(logging.ERROR)
    settings = ServerSettings(WorkerSettings({"demo": bundle}, threads=1), data, drain=1)
    uvicorn.run(create_app(VideoService(settings, main)), port=port, log_config=None)


def wait_until_ready(address: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Returns as soon as the server, which is that process, makes videos."""
    ends = time.monotonic() + READY_S
    while True:
        try:
            if httpx.get(f"{address}/health/ready").status_code == 200:
                return
        except httpx.TransportError:  # it does not listen yet
            pass
        assert process is None or process.poll() is None, f"{address} has ended before it was ready"
        assert time.monotonic() < ends, f"{address} has not become ready"
        time.sleep(0.1)
