"""Compile every graph of a bundle for this machine.

Each plan is built in a process of its own, one at a time unless asked otherwise, so a build needs the memory of one
part and a crash of the library is an error like any other. None of these processes outlives the build, however that
ends. Everything goes into `<folder>.partial`, whose index says what is done, and is renamed at the end: an interrupted
build goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import msgspec

from .apart import Apart, Crashed
from .arrays import Arrays
from .bundle import Bundle, verify_files
from .compiled import (
    INDEX,
    INDEX_SCHEMA,
    TIMING_CACHE,
    Compiled,
    CompiledPart,
    Index,
    compiled_folder,
    open_compiled,
    verify_compiled,
)
from .errors import BundleError, EngineError, IntegrityError, InvalidRequest
from .files import empty_folder, file_record, is_as_recorded, resumable, write_atomically, write_document
from .manifest import part_files
from .progress import OnPart
from .registry import check_compiler
from .tensorrt.compiler import BuildSettings, Plan, ShapeRanges, build_plan, shape_ranges
from .tensorrt.library import EDITIONS, find_target

log = logging.getLogger("foresight")

# What a build takes of the host's memory, rounded up: TensorRT-RTX 1.7 took 250 MiB, and 3.6 bytes for one of weights.
LIBRARY_BYTES = 300 << 20
BYTES_PER_WEIGHT = 4


def build_engines(
    bundle: Bundle,
    backend: str,
    device: str = "cuda",
    settings: BuildSettings | None = None,
    jobs: int = 1,
    progress: OnPart = lambda done, total, name: None,
) -> Compiled:
    """Build the plans of `bundle` for `device`, or find that they are there already.

    `jobs` plans are built side by side, fewer where memory is short. `progress` is told the parts done, their number
    and the one that was done last. Raises InvalidRequest, IntegrityError, EngineError with the library's reason, and
    OutputError; what was built until then is kept.
    """
    check_compiler(backend)
    if jobs < 1:
        raise InvalidRequest(f"jobs: got {jobs}, expected 1 or more")
    settings = settings or BuildSettings()
    verify_files(bundle)
    target = find_target(backend, device)
    folder = compiled_folder(bundle, backend, target)
    index = Index(
        schema=INDEX_SCHEMA, bundle=bundle.id, backend=backend, target=target, settings=settings.describe(), parts={}
    )
    present = _present(folder, index, bundle)
    if present is not None:
        log.info("engines %s are up to date", folder)
        return present
    with resumable(folder, f"engines {folder}", again="build") as partial:
        index = _resume(partial, index)
        total = len(bundle.manifest.parts)
        progress(len(index.parts), total, "")
        for name, part in _build_missing(bundle, partial, index, settings, jobs, device):
            index.parts[name] = part
            write_document(partial / INDEX, index)
            progress(len(index.parts), total, name)
    return open_compiled(folder)


def _build_missing(
    bundle: Bundle, partial: Path, index: Index, settings: BuildSettings, jobs: int, device: str
) -> Iterator[tuple[str, CompiledPart]]:
    """Build what the index lacks, in the order in which workers finish."""
    missing = [part for part in bundle.manifest.parts if not _is_done(partial, index, part.name)]
    weights = [bundle.manifest.files[part_files(part)[1]].bytes for part in missing]
    jobs = affordable_jobs(jobs, weights, Arrays().free_bytes())
    # TensorRT-RTX asks a GPU about a cache that it is given, and builds without one. Builds side by side would write
    # over what the others found out.
    cache = partial / TIMING_CACHE if EDITIONS[index.backend].needs_gpu and jobs == 1 else None
    apart = Apart()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(
                build_apart,
                index.backend,
                bundle.file(part.graph),
                shape_ranges(part, settings.ranges(bundle.manifest, part)),
                settings,
                cache,
                device,
                apart,
            ): part.name
            for part in missing
        }
        try:
            for future in as_completed(futures):
                yield futures[future], _write_plan(partial / f"{futures[future]}.plan", future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            apart.stop()


def affordable_jobs(jobs: int, weights: Sequence[int], free: int | None) -> int:
    """How many of `jobs` builds there is memory for side by side, at least one; `weights` are the parts' bytes."""
    if free is None or not weights:
        return jobs
    fits = max(1, free // (LIBRARY_BYTES + BYTES_PER_WEIGHT * max(weights)))
    if fits < jobs:
        log.warning("jobs: got %d, but memory is free for %d; building %d at a time", jobs, fits, fits)
    return min(jobs, fits)


def _write_plan(path: Path, plan: Plan) -> CompiledPart:
    write_atomically(path, plan.data)
    return CompiledPart(
        file=path.name,
        record=file_record(path),
        scratch_bytes=plan.scratch_bytes,
        fused_attention=plan.fused_attention,
        build_seconds=plan.seconds,
    )


def build_apart(
    backend: str,
    graph: Path,
    shapes: ShapeRanges,
    settings: BuildSettings,
    timing_cache: Path | None = None,
    device: str = "cuda",
    apart: Apart | None = None,
) -> Plan:
    """`build_plan` in a process of its own. Raises EngineError, also where the library crashes."""
    try:
        return (apart or Apart()).call(build_plan, backend, graph, shapes, settings, timing_cache, device)
    except Crashed as error:
        raise EngineError(
            f"{graph.stem}: {backend} crashed while building {graph.name}; see whether memory was short"
        ) from error


def _present(folder: Path, wanted: Index, bundle: Bundle) -> Compiled | None:
    """What was built before, where it is whole and was built in the same way."""
    try:
        compiled = open_compiled(folder)
        if _same_build(compiled.index, wanted) and all(
            part.name in compiled.index.parts for part in bundle.manifest.parts
        ):
            verify_compiled(compiled)
            return compiled
    except (BundleError, IntegrityError):
        pass
    return None


def _resume(partial: Path, wanted: Index) -> Index:
    try:
        index = open_compiled(partial).index
        if _same_build(index, wanted):
            log.info("going on with %s: %d plans are done", partial, len(index.parts))
            return index
    except IntegrityError:
        pass
    empty_folder(partial)
    return wanted


def _same_build(one: Index, other: Index) -> bool:
    return msgspec.structs.replace(one, parts={}) == msgspec.structs.replace(other, parts={})


def _is_done(partial: Path, index: Index, name: str) -> bool:
    part = index.parts.get(name)
    return part is not None and is_as_recorded(partial / part.file, part.record)
