"""Calls in processes of their own: what they return and raise, and that they end when their caller does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil
import pytest

from foresight.engines.apart import Apart, Crashed
from foresight.engines.arrays import parse_device
from foresight.engines.errors import EngineError, InvalidRequest

TIMEOUT_S = 60
ENDLESS = (re.match, r"(a+)+$", 64 * "a" + "b")  # and lets no other thread of its process run


def test_what_a_call_returns_and_raises_comes_back() -> None:
    apart = Apart()
    assert apart.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(InvalidRequest, match="^device: got 'tpu'"):
        apart.call(parse_device, "tpu")


def test_what_cannot_come_back_is_an_error_too() -> None:
    with pytest.raises(EngineError, match=r"Lock|lock: .*pickle"):
        Apart().call(threading.Lock)
    with pytest.raises(Crashed):
        Apart().call(os.abort)


def test_stop_ends_what_runs_and_lets_nothing_begin() -> None:
    apart, failures = Apart(), list[BaseException]()

    def call() -> None:
        with pytest.raises(Crashed) as raised:
            apart.call(*ENDLESS)
        failures.append(raised.value)

    thread = threading.Thread(target=call)
    thread.start()
    worker = at_work(psutil.Process())
    apart.stop()
    thread.join(TIMEOUT_S)
    assert failures and not worker.is_running()
    with pytest.raises(Crashed):
        apart.call(divmod, 7, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_call_ends_with_its_caller(number: signal.Signals) -> None:
    code = f"import re; from foresight.engines.apart import Apart; Apart().call(re.match, *{ENDLESS[1:]})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as caller:
        worker = at_work(psutil.Process(caller.pid))
        caller.send_signal(number)
        caller.wait(TIMEOUT_S)
    psutil.wait_procs([worker], TIMEOUT_S)
    assert not worker.is_running()


def at_work(caller: psutil.Process) -> psutil.Process:
    """The process that makes a call, once it does."""
    while True:
        for child in caller.children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if any("spawn_main" in argument for argument in child.cmdline()) and child.cpu_times().user > 0.4:
                    return child
