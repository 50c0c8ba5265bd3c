"""This machine and what it can run, without loading any model."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from .cores import available_cores
from .errors import one_line
from .tensorrt.library import EDITIONS

LIBRARIES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tokenizers", "msgspec", "av", "pillow", "jinja2",
    "torch", "diffusers", "transformers", "onnx", "onnxscript", "cupy-cuda13x", "tensorrt", "tensorrt-rtx-cu13-libs",
    "polygraphy",
)  # fmt: skip

NO_GPU = "none"
RUNS = "runs engines"
ASK = """
import json, sys
from foresight.engines.errors import ForesightError
from foresight.engines.{module} import {function}
try:
    print(json.dumps({function}({argument!r})))
except ForesightError as error:
    sys.exit(str(error))
"""


def describe_environment() -> dict[str, Any]:
    """Machine, library versions (None where not installed), and which commands and devices they allow."""
    gpu, compilers = _gpu(), {name: _probe(name) for name in EDITIONS}
    return {
        "machine": {
            "foresight": _version("foresight-engines"),
            "python": sys.version.split()[0],
            "system": f"{platform.system()} {platform.machine()}",
            "cores": available_cores(),
            "gpu": gpu,
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
        "can": {
            "run on": _devices(gpu, compilers.values()),
            "export": all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers", "onnx")),
            **compilers,
            "write mp4": importlib.util.find_spec("av") is not None,
            "write reports": importlib.util.find_spec("jinja2") is not None,
        },
    }


def _gpu() -> str:
    """The first GPU, or "none" and the reason why."""
    if importlib.util.find_spec("cupy") is None:
        return f"{NO_GPU}: CuPy is not installed; install foresight-engines[cuda]"
    found = _ask("arrays", "gpu_facts", "cuda")
    if isinstance(found, str):
        return f"{NO_GPU}: {found}"
    return f"{found['gpu']}, compute capability {found['compute_capability']}, CUDA {found['cuda']}"


def _probe(backend: str) -> str:
    """What a TensorRT library does here."""
    if not any(importlib.util.find_spec(module) for module in EDITIONS[backend].modules):
        return "not installed"
    found = _ask("tensorrt.library", "probe", backend)
    if isinstance(found, str):
        return found
    return f"{found['version']}; builds engines: {found['builds engines']}; {RUNS}: {found['runs engines']}"


def _ask(module: str, function: str, argument: str) -> dict[str, str] | str:
    """What a function of the engines returns, or why it does not, in a process of its own, which it may take down."""
    command = [sys.executable, "-c", ASK.format(module=module, function=function, argument=argument)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode < 0:
        return f"crashes (signal {-done.returncode}); check the driver"
    if done.returncode:
        return f"fails ({one_line(''.join(done.stderr.strip().splitlines()[-1:]))})"
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(gpu: str, compilers: Iterable[str]) -> list[str]:
    """A GPU needs a backend that runs on it. That ONNX Runtime's provider was compiled in does not make a GPU."""
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    runs = "CUDAExecutionProvider" in providers or any(told.endswith(f"{RUNS}: yes") for told in compilers)
    usable = {"cpu": "CPUExecutionProvider" in providers, "cuda": runs and not gpu.startswith(NO_GPU)}
    return [device for device, works in usable.items() if works]
