"""This machine and what it can run, without loading any model."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from ..engines.errors import one_line
from ..engines.onnxruntime import available_cores
from ..engines.tensorrt import MODULES

LIBRARIES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "msgspec", "av", "pillow", "jinja2",
    "torch", "diffusers", "transformers", "onnx", "onnxscript", "cupy-cuda13x", "tensorrt", "tensorrt-rtx-cu13-libs",
    "polygraphy",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Machine, library versions (None where not installed), and which commands and devices they allow."""
    return {
        "machine": {
            "foresight": _version("foresight-engines"),
            "python": sys.version.split()[0],
            "system": f"{platform.system()} {platform.machine()}",
            "cores": available_cores(),
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
        "can": {
            "run on": _devices(),
            "export": all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers", "onnx")),
            **{name: _probe(name) for name in MODULES},
            "write mp4": importlib.util.find_spec("av") is not None,
            "write reports": importlib.util.find_spec("jinja2") is not None,
        },
    }


def _probe(backend: str) -> str:
    """What a TensorRT library does here, asked in a process of its own, which it may take down."""
    if not any(importlib.util.find_spec(module) for module in MODULES[backend]):
        return "not installed"
    code = f"import json; from foresight.engines import tensorrt; print(json.dumps(tensorrt.probe({backend!r})))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode < 0:
        return f"crashes (signal {-done.returncode}); check the driver"
    if done.returncode:
        return f"fails ({one_line(done.stderr.strip().splitlines()[-1:])})"
    found = json.loads(done.stdout.splitlines()[-1])
    return f"{found['version']}; builds engines: {found['builds engines']}; runs engines: {found['runs engines']}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import onnxruntime

    names = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
    return [names[provider] for provider in onnxruntime.get_available_providers() if provider in names]
