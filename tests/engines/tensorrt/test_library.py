"""Which library a process works with, what it refuses, and that its calls are those of TensorRT 11."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foresight.engines.errors import EngineError
from foresight.engines.tensorrt.library import EDITIONS, find_target, use

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux x86-64 only")

RTX = "tensorrt-rtx"


def test_rtx_plans_are_for_no_gpu_in_particular() -> None:
    assert set(find_target(RTX)) == {"library", "system"}


def test_a_process_works_with_one_library() -> None:
    use(RTX)
    with pytest.raises(EngineError, match="already uses tensorrt-rtx"):
        use("tensorrt")


def python(code: str) -> str:
    """Run code in a fresh process, because a process keeps the library it began with; what it printed."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_library_that_is_missing_is_named_with_its_remedy() -> None:
    code = (
        "import sys; sys.modules['tensorrt'] = None\n"
        "from foresight.engines.tensorrt import library\n"
        "try: library.use('tensorrt')\n"
        "except library.EngineError as error: print(error)"
    )
    assert python(code).startswith("tensorrt: not installed") and EDITIONS["tensorrt"].install in python(code)


def test_a_library_that_is_too_old_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.3.0'")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from foresight.engines.tensorrt import library\n"
        "try: library.use('tensorrt')\n"
        "except library.EngineError as error: print(error)"
    )
    assert python(code).strip() == "tensorrt: got version 10.3.0, expected 10.16 or newer; upgrade it"


def test_importing_what_builds_and_runs_loads_no_library() -> None:
    code = (
        "import sys, foresight.engines.build, foresight.engines.tensorrt.backend\n"
        "print([name for name in sys.modules if name.startswith('tensorrt')])"
    )
    assert python(code).strip() == "[]"


@pytest.mark.parametrize(
    "call",
    ["trt.BuilderFlag.FP16", "trt.Builder(logger).build_engine", "context.set_device_memory_v2(0, 1)", "trt.nothing"],
)
def test_stubs_refuse_what_tensorrt_11_does_not_have(call: str, stubs: Path, tmp_path: Path) -> None:
    head = "import tensorrt as trt\ndef f(logger: trt.ILogger, context: trt.IExecutionContext) -> None:\n    "
    (tmp_path / "wrong.py").write_text(head + call + "\n")
    (tmp_path / "right.py").write_text(head + "context.set_device_memory(0, 1)\n")
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-tensorrt]\nignore_errors = true\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "wrong.py", "right.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(stubs)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Found 1 error in 1 file" in done.stdout and "wrong.py:3" in done.stdout


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tensorrt.pyi, made from the installed library."""
    folder = tmp_path_factory.mktemp("stubs")
    subprocess.run([sys.executable, "-m", "tests.tensorrt_stubs", str(folder)], check=True)
    return folder
