"""Type stubs of TensorRT's Python API, read off the TensorRT-RTX that is installed: it has TensorRT 11's API.

    python -m tests.tensorrt_stubs FOLDER

writes FOLDER/tensorrt.pyi, with which mypy refuses a call that TensorRT 11 does not have. They are made, not
committed: the API's text belongs to NVIDIA.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

MODULE = "tensorrt_rtx_bindings.tensorrt_rtx"


def stubs() -> str:
    """The stubs as one module."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", MODULE, "-o", folder]
        subprocess.run(command, check=True, capture_output=True)
        text = (Path(folder) / f"{MODULE.replace('.', '/')}.pyi").read_text(encoding="utf-8")
    text = re.sub(r"\bin: ", "in_: ", text)  # a keyword as a parameter's name
    text = text.replace(
        "class IHostMemory:", "class IHostMemory:\n    def __buffer__(self, flags: int, /) -> memoryview: ..."
    )
    text = text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")
    lines = [_in_order(line) for line in text.splitlines()]
    return "\n".join([*lines, f'__version__: str = "{metadata.version("tensorrt-rtx-cu13-bindings")}"', ""])


def _in_order(line: str) -> str:
    """No parameter without a default after one with a default: the first ones lose theirs."""
    try:
        ast.parse(f"{line.strip()} ..." if line.lstrip().startswith("def ") else "")
    except SyntaxError:
        return re.sub(r" = [^,)]+", "", line)
    return line


def main() -> None:
    """Write the stubs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tensorrt.pyi").write_text(stubs(), encoding="utf-8")


if __name__ == "__main__":
    main()
