"""A model repository for Triton: for every bundle a configuration, a model of the Python backend, and the bundle."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..engines.bundle import COMPILED, FROM_HUBS, UNFINISHED, Bundle, open_bundle, verify_files
from ..engines.errors import InvalidRequest, OutputError, quoted
from ..engines.files import PARTIAL
from ..engines.progress import Counter, OnProgress
from ..engines.registry import DEFAULT, REGISTRY
from ..runtime.profiles import check_profiles
from ..runtime.whole import write_whole
from .batch import NAME
from .settings import WorkerSettings
from .triton import BUNDLE, INPUTS, OUTPUTS, ModelSettings

VERSION = "1"
NEEDED = ("prompt",)  # the other inputs are optional
MODEL = '''"""Loaded by Triton's Python backend, whose Python needs foresight-engines[video]."""

from foresight.serving.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Triton:
    """How a host is to run the bundles: the most requests that wait, and a request's most steps.

    `signed_by` are files of public keys, where the host has them.
    """

    worker: WorkerSettings
    waiting: int = 16
    max_steps: int = 100
    signed_by: tuple[Path, ...] = ()


@dataclass(frozen=True)
class WrittenModel:
    """A model of the repository: its folder, its bundle's id, and the kind of its instances."""

    name: str
    path: Path
    bundle: str
    kind: str


def write_repository(folder: Path, triton: Triton, on_progress: OnProgress | None = None) -> list[WrittenModel]:
    """Write DIR/NAME/config.pbtxt, DIR/NAME/1/model.py and DIR/NAME/1/bundle of all, or nothing.

    Every bundle is verified in its new place. Raises InvalidRequest, BundleError, IntegrityError, OutputError.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"triton: {folder} is there and not empty, expected a new folder; choose another one")
    bundles = {}
    for name, path in triton.worker.bundles.items():
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"bundles: got the name {quoted(name)}, expected up to 100 of A-Z, a-z, 0-9, '.', '_' "
                                 f"and '-', a letter or digit first: NAME={path}")  # fmt: skip
        bundles[name] = open_bundle(path, triton.worker.signed_by)
    written = [
        WrittenModel(name, folder / name, bundle.id, instances_of(bundle, triton.worker)[0])
        for name, bundle in bundles.items()
    ]

    def write(temporary: Path) -> None:
        for name, bundle in bundles.items():
            version = temporary / name / VERSION
            version.mkdir(parents=True)
            (version / "model.py").write_text(MODEL, encoding="utf-8")
            _copy(bundle, version / BUNDLE, on_progress)
            copied = open_bundle(version / BUNDLE, triton.worker.signed_by)
            check_profiles(copied)
            verify_files(copied, on_progress)
            (temporary / name / "config.pbtxt").write_text(config_of(name, copied, triton), encoding="utf-8")

    write_whole(folder, write)
    return written


def instances_of(bundle: Bundle, worker: WorkerSettings) -> tuple[str, str]:
    """The kind of a model's instances, and the device: of GPUs that of a single one, else one instance on each.

    Where none was asked for, GPUs if the backend, or what the bundle has engines for, is for them.
    """
    device = worker.device
    if device is None:
        compiled = [entry for entry in (bundle.path / COMPILED).glob("*") if entry.suffix != PARTIAL]
        device = "cuda" if worker.backend is None and compiled else REGISTRY[worker.backend or DEFAULT].device
    return ("KIND_GPU" if device.partition(":")[0] == "cuda" else "KIND_CPU"), device


def config_of(name: str, bundle: Bundle, triton: Triton) -> str:
    """The text of a model's config.pbtxt."""
    worker = triton.worker
    kind, device = instances_of(bundle, worker)
    gpus = f" gpus: [ {device.partition(':')[2]} ]" if ":" in device else ""
    settings = ModelSettings(
        backend=worker.backend,
        device=device if kind == "KIND_CPU" else None,  # of a GPU, Triton says which
        threads=worker.threads,
        low_memory=worker.low_memory,
        cache_memory=worker.cache_memory,
        cuda_graphs=worker.cuda_graphs,
        split_guidance=worker.split_guidance,
        signed_by=os.pathsep.join(str(file.absolute()) for file in triton.signed_by) or None,
        waiting=triton.waiting,
        max_steps=triton.max_steps,
    )
    lines = [f"name: {_text(name)}", 'backend: "python"', "max_batch_size: 0"]
    lines += ["model_transaction_policy { decoupled: true }"]
    for tensor, kind_of in INPUTS.items():
        optional = "" if tensor in NEEDED else " optional: true"
        lines.append(f"input {{ name: {_text(tensor)} data_type: {kind_of} dims: [ 1 ]{optional} }}")
    lines += [f"output {{ name: {_text(name)} data_type: {kind_of} dims: [ 1 ] }}" for name, kind_of in OUTPUTS.items()]
    lines.append(f"instance_group {{ count: 1 kind: {kind}{gpus} }}")
    for setting, value in msgspec.to_builtins(settings).items():
        lines.append(f"parameters {{ key: {_text(setting)} value {{ string_value: {_text(value)} }} }}")
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    """Between quotes, as protobuf's text format has it, which escapes as JSON does."""
    return json.dumps(str(value).lower() if isinstance(value, bool) else str(value), ensure_ascii=False)


def _copy(bundle: Bundle, target: Path, on_progress: OnProgress | None) -> None:
    counter = Counter("copying", sum(path.is_file() for path in bundle.path.rglob("*")), "files", on_progress)

    def copy(source: str, to: str) -> None:
        shutil.copyfile(source, to)  # with the permissions of a new file: another user reads it
        counter.advance()

    others = shutil.ignore_patterns(*FROM_HUBS, UNFINISHED, f"*{PARTIAL}")
    shutil.copytree(bundle.path, target, ignore=others, copy_function=copy)
