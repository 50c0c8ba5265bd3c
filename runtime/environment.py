"""This machine and what it can run, without loading any model."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from typing import Any

from ..engines.onnxruntime import available_cores

LIBRARIES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "msgspec", "av", "pillow", "jinja2",
    "torch", "diffusers", "transformers", "onnx", "onnxscript", "cupy-cuda13x", "tensorrt",
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
            "write mp4": importlib.util.find_spec("av") is not None,
            "write reports": importlib.util.find_spec("jinja2") is not None,
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import onnxruntime

    names = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
    return [names[provider] for provider in onnxruntime.get_available_providers() if provider in names]
