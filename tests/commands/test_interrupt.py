"""Ctrl-C at any time: one line, exit code 130."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import Outcome

# Sends SIGINT to itself as soon as a module is imported; then what the importing library makes of a KeyboardInterrupt.
HOOK = """
import signal, sys, atexit, time

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and self in sys.meta_path:
            sys.meta_path.remove(self)
            {action}

sys.meta_path.insert(0, Hook())
"""
MADE = {
    "itself": "signal.raise_signal(signal.SIGINT)",
    "an ImportError": """
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("C code failed")""",
    "a RuntimeError": """
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise RuntimeError("C code failed") from error""",
    "a SystemExit": """
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise SystemExit(3)""",
    "nothing": """
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass""",
    "two": """
            atexit.register(signal.raise_signal, signal.SIGINT)
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)""",
}


def interrupted(code: str, *arguments: str) -> Outcome:
    program = f"{code}\nfrom foresight.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("made", MADE)
def test_ctrl_c_during_an_import_is_one_line_whatever_the_library_makes_of_it(made: str, single_bundle: Path) -> None:
    hook = HOOK.format(module="numpy", action=MADE[made])
    done = interrupted(hook, "run", "--bundle", str(single_bundle), "--steps", "1", "--output", "never/x.npy")
    assert done == Outcome(130, "", "error: interrupted\n")


@pytest.mark.parametrize("module", ["click", "torch"])
def test_ctrl_c_at_the_first_import_and_while_torch_is_imported(module: str) -> None:
    hook = HOOK.format(module=module, action=MADE["itself"])
    assert interrupted(hook, "export", "--model", "latte") == Outcome(130, "", "error: interrupted\n")


def test_ctrl_c_as_the_interpreter_ends_is_one_line_too() -> None:
    code = "import atexit, signal, sys\natexit.register(signal.raise_signal, signal.SIGINT)"
    done = interrupted(code, "--version")
    assert (done.code, done.err) == (130, "error: interrupted\n")


def test_ctrl_c_that_was_asked_to_be_ignored_is_ignored(single_bundle: Path) -> None:
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    hook = HOOK.format(module="numpy", action=MADE["itself"])
    assert interrupted(code + hook, "inspect", str(single_bundle)).code == 0


def test_the_handlers_of_a_process_that_calls_main_are_as_they_were() -> None:
    from foresight.cli import main

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_c_is_seen_by_other_threads_while_the_main_one_is_inside_a_library() -> None:
    """Handlers run in the main thread, between two of its instructions: never inside one call of C code."""
    code = """
import hashlib, os, signal, threading, time
from foresight.commands.interrupt import Interrupts

interrupts = Interrupts()
interrupts.install()

def watch():
    time.sleep(0.3)  # until the main thread is inside
    os.kill(os.getpid(), signal.SIGINT)
    while not interrupts.is_set():
        pass
    os.write(1, b"seen, and no handler was called" if interrupts.came is None else b"too late")
    os._exit(0)

watching = threading.Thread(target=watch)
try:
    watching.start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
except KeyboardInterrupt:
    watching.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("seen, and no handler was called", "")
