"""What several test modules share: tiny checkpoints, edited bundles, faults around real engines, plain references."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from foresight.engines.arrays import Array, Arrays
from foresight.engines.backend import Backend, Engine, create_backend
from foresight.engines.build import build_apart, build_engines
from foresight.engines.bundle import MANIFEST, Bundle, open_bundle
from foresight.engines.compiled import Compiled
from foresight.engines.errors import EngineError
from foresight.engines.files import file_record
from foresight.engines.interrupt import WATCH
from foresight.engines.manifest import HeldOut, Part, PolicyProfile
from foresight.engines.onnxruntime import OnnxRuntimeBackend
from foresight.engines.openvino import OpenVinoBackend
from foresight.engines.reference import ReferenceBackend
from foresight.engines.registry import COMPILERS
from foresight.engines.tensorrt.backend import TensorRTBackend
from foresight.engines.tensorrt.compiler import BuildSettings, shape_ranges
from foresight.runtime.caches import Layout, find_mode
from foresight.runtime.memory import MemoryLimits
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Context
from foresight.runtime.sampler import Schedule

Floats = npt.NDArray[np.float32]
Json = dict[str, Any]

BACKEND = os.environ.get("FORESIGHT_TEST_BACKEND", "onnxruntime")
DEVICE = os.environ.get("FORESIGHT_TEST_DEVICE")


def tiny_latte(folder: Path, **sizes: Any) -> Path:
    """A random checkpoint whose blocks change the stream enough for a mistake in one of them to show."""
    from zoo import latte  # which needs torch, and workers of a server import this file

    return latte.write_random(folder, gates=8, **sizes)


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def copy_bundle(bundle: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, target))


def read_manifest(folder: Path) -> Json:
    """The manifest as plain JSON."""
    return json.loads((folder / MANIFEST).read_text())  # type: ignore[no-any-return]


def edit_manifest(folder: Path, change: Callable[[Json], object]) -> Path:
    """Apply `change` to the manifest's JSON in place."""
    manifest = read_manifest(folder)
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def profile_of(name: str, *, steps: int = 4, policy: str = "forecast", settings: Json | None = None) -> PolicyProfile:
    """A profile that was never measured."""
    held_out = HeldOut(pairs=2, worst_psnr_db=41.0, mean_psnr_db=43.5, psnr_db=42.25, share_skipped=0.5, speedup=1.75)
    return PolicyProfile(
        name=name,
        steps=steps,
        policy=policy,
        settings={"tolerance": 0.25} if settings is None else settings,
        goal="worst PSNR of 40 dB or more",
        guidance=2.0,
        held_out=held_out,
    )


def vouch_for(folder: Path, *names: str) -> Path:
    """Let the manifest hold the hashes of these files as they are now, as someone who forges a bundle would."""

    def change(manifest: Json) -> None:
        for name in names:
            record = file_record(folder / name)
            manifest["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}

    return edit_manifest(folder, change)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(eq=False)
class WatchedEngine:
    """A real engine that tells `before` what it is about to run; what that raises, the engine raises."""

    engine: Engine
    part: Part
    before: Callable[[str, Mapping[str, Array]], object]

    def run(self, tensors: Mapping[str, Array]) -> None:
        self.before(self.part.name, tensors)
        self.engine.run(tensors)


@dataclass
class BackendInFront:
    """Stands in front of a real backend; those who derive from it say what is different about loading."""

    backend: Backend
    name: str = field(init=False)
    arrays: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.arrays = self.backend.name, self.backend.arrays

    def compiled(self, bundle: Bundle) -> Compiled | None:
        return self.backend.compiled(bundle)

    def trim(self) -> None:
        self.backend.trim()

    def describe(self) -> dict[str, str]:
        return self.backend.describe()


@dataclass
class WatchedBackend(BackendInFront):
    """A real backend whose engines are watched; `before` may be exchanged at any time."""

    before: Callable[[str, Mapping[str, Array]], object] = lambda part, tensors: None
    alive: WeakSet[WatchedEngine] = field(default_factory=WeakSet)  # the engines that are still there

    def load(self, bundle: Bundle, part: Part) -> WatchedEngine:
        engine = WatchedEngine(self.backend.load(bundle, part), part, self._tell)
        self.alive.add(engine)
        return engine

    def _tell(self, name: str, tensors: Mapping[str, Array]) -> None:
        self.before(name, tensors)  # looked up now: it may have been exchanged since the engine was loaded


def watched_pipeline(bundle: Path, **settings: Any) -> tuple[VideoPipeline, WatchedBackend]:
    """A pipeline on a watched backend."""
    backend = WatchedBackend(backend_under_test(bundle))
    return VideoPipeline(open_bundle(bundle), backend, MemoryLimits(**settings)), backend


def load_pipeline(bundle: Path, **settings: Any) -> VideoPipeline:
    """A pipeline on the backend under test; settings are those of MemoryLimits, and `on_progress`."""
    on_progress = settings.pop("on_progress", None)
    limits = MemoryLimits(**settings)
    return VideoPipeline(open_bundle(bundle), backend_under_test(bundle), limits, on_progress=on_progress)


def layout_of(mode: str = "output", fixed: bool = False) -> Layout:
    """How the caches of a mode are laid out."""
    return Layout(find_mode(mode), fixed)


def context_of(steps: int, blocks: int, prompts: int = 1) -> Context:
    """What a policy learns of a request of that many steps on a model of that many blocks."""
    timesteps, nothing = np.linspace(999, 0, steps), np.zeros(steps)
    schedule = Schedule(timesteps, nothing, nothing, nothing[:, None], nothing[:, None], nothing, 1.0)
    return Context(schedule, ("block",) * blocks, prompts)


def backend_under_test(bundle: Path | None = None) -> Backend:
    """The backend under test: ONNX Runtime on the CPU, unless the environment says otherwise, as tests.gpu does.

    What it needs of `bundle` is built.
    """
    if bundle is not None and BACKEND in COMPILERS:
        build_engines(open_bundle(bundle), BACKEND, DEVICE or "cuda")
    return create_backend(BACKEND, DEVICE)


def load_graph(backend: Backend, graph: Path, part: Part) -> Engine:
    """The engine of a graph that lies in no bundle; where it has to be compiled, for sizes of 1 to 8."""
    if isinstance(backend, (OnnxRuntimeBackend, OpenVinoBackend, ReferenceBackend)):
        return backend.load_graph(graph, part)
    assert isinstance(backend, TensorRTBackend)
    dims = {dim for spec in part.inputs for dim in spec.shape if isinstance(dim, str)}
    shapes = shape_ranges(part, dict.fromkeys(("batch", *dims), (1, 8)))
    return backend.load_plan(build_apart(backend.name, graph, shapes, BuildSettings()).data, part)


def fail_at(call: int, wanted: Callable[[str], bool] = lambda part: True) -> Callable[[str, Mapping[str, Array]], None]:
    """A `before` that raises at the `call`-th run (from 0) of a part that is `wanted`."""
    seen = iter(range(1 << 30))

    def before(part: str, tensors: Mapping[str, Array]) -> None:
        if wanted(part) and next(seen) == call:
            raise EngineError(f"{part}: injected fault")

    return before


class CancelAt:
    """A cancel token that is set from its `looks`-th look (from 0) on; `looked` counts how often it was asked.

    Only looks of the request's own thread count: those of its watch come as the clock wills.
    """

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.looked = 0

    def is_set(self) -> bool:
        if threading.current_thread().name == WATCH:
            return self.looked > self.looks
        self.looked += 1
        return self.looked > self.looks


def is_block(part: str) -> bool:
    """Whether a part is one of the blocks."""
    return part.startswith("block.")


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON document, the document's own first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from json_paths(item, (*path, key))
