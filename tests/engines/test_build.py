"""Engines of whole bundles: built, found again, resumed, refused; with TensorRT-RTX, which needs no GPU to build."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from foresight.engines.backend import choose_backend
from foresight.engines.build import affordable_jobs, build_engines
from foresight.engines.bundle import Bundle, open_bundle, verify_files
from foresight.engines.compiled import (
    INDEX,
    Compiled,
    compiled_folder,
    find_compiled,
    fingerprint,
    list_compiled,
    open_compiled,
    verify_compiled,
)
from foresight.engines.errors import BundleError, EngineError, IntegrityError, InvalidRequest
from foresight.engines.tensorrt.compiler import BuildSettings
from foresight.engines.tensorrt.library import find_target
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.registry import REGISTRY
from foresight.runtime.memory import plan_memory
from tests.support import copy_bundle, edit_manifest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux x86-64 only")

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def built(single_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small bundle with all its engines; tests that change it copy it first."""
    bundle = open_bundle(copy_bundle(single_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    build_engines(bundle, RTX)
    return bundle


@pytest.fixture
def copy(built: Bundle, tmp_path: Path) -> tuple[Bundle, Compiled]:
    """A copy of `built` that a test may damage, and its engines."""
    bundle = open_bundle(copy_bundle(built.path, tmp_path / "copy"))
    return bundle, find_compiled(bundle, RTX, find_target(RTX))


def edit_index(compiled: Compiled, **fields: object) -> None:
    path = compiled.folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# attention of one head over a frame at a time, for which the library has no kernel, at 384 channels neither
TAKEN_APART = {"wan-demo": {"vae_decoder", "vae_decoder_next"}}


@pytest.mark.rtx
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("model", [name for name, row in REGISTRY.items() if row.comes_with_a_clone])
def test_every_graph_of_the_demos_builds_with_attention_fused(model: str, dtype: Any, tmp_path: Path) -> None:
    bundle = Export(model, ExportRequest(dtype=dtype), output=tmp_path / "bundle").run()
    compiled = build_engines(bundle, RTX, jobs=2)
    assert set(compiled.index.parts) == {part.name for part in bundle.manifest.parts}
    for name, part in compiled.index.parts.items():
        assert len(compiled.read_plan(name)) == part.record.bytes > 1000
    assert set(compiled.taken_apart) == TAKEN_APART.get(model, set())
    blocks = {block.name for block in bundle.manifest.blocks}
    assert blocks <= {name for name, part in compiled.index.parts.items() if part.fused_attention}
    verify_files(bundle)  # engines leave the bundle what it was


def test_engines_that_are_there_are_not_built_again(copy: tuple[Bundle, Compiled]) -> None:
    bundle, compiled = copy
    before = {path.name: path.stat().st_mtime_ns for path in compiled.folder.iterdir()}
    build_engines(bundle, RTX)
    assert {path.name: path.stat().st_mtime_ns for path in compiled.folder.iterdir()} == before


def test_other_settings_are_other_engines(copy: tuple[Bundle, Compiled]) -> None:
    bundle, _ = copy
    assert build_engines(bundle, RTX, settings=BuildSettings(level=0)).index.settings["level"] == "0"


def test_for_half_a_guided_batch_the_transformer_takes_half_the_rows(copy: tuple[Bundle, Compiled]) -> None:
    bundle, whole = copy
    manifest, settings = bundle.manifest, BuildSettings(split_guidance=True)
    most = manifest.shape.max_batch
    for part in manifest.parts:
        in_steps = part in (manifest.prologue, *manifest.blocks, manifest.epilogue)
        assert settings.ranges(manifest, part)["batch"] == (1, most if in_steps else 2 * most)
        assert BuildSettings().ranges(manifest, part) == manifest.ranges
    split = build_engines(bundle, RTX, settings=settings)
    assert (split.split_guidance, whole.split_guidance) == (True, False)
    assert split.folder == whole.folder  # they take each other's place
    assert find_compiled(bundle, RTX, find_target(RTX)).split_guidance


def test_an_interrupted_build_goes_on_where_it_stopped(copy: tuple[Bundle, Compiled]) -> None:
    bundle, _ = copy

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, RTX, settings=BuildSettings(level=1), progress=interrupt)
    found = []
    build_engines(bundle, RTX, settings=BuildSettings(level=1), progress=lambda done, *_: found.append(done))
    assert found[0] >= 3 and found[-1] == len(bundle.manifest.parts)
    assert not list(bundle.path.rglob("*.partial"))


def seconds_of(process: psutil.Process) -> float:
    """What it has computed for; 0 where it has just ended."""
    try:
        return float(process.cpu_times().user)
    except psutil.NoSuchProcess:
        return 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_command_that_is_ended_leaves_no_process(
    copy: tuple[Bundle, Compiled], number: signal.Signals, code: int
) -> None:
    bundle, compiled = copy
    shutil.rmtree(compiled.folder)
    command = [sys.executable, "-m", "foresight.cli", "build", str(bundle.path), "--backend", RTX]
    command += ["--jobs", "2", "--level", "5"]  # which takes long enough to be seen at work
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as build:
        workers: list[psutil.Process] = []
        while not any(seconds_of(worker) > 0.1 for worker in workers):  # one is at work
            assert build.poll() is None
            workers = psutil.Process(build.pid).children(recursive=True)
        build.send_signal(number)
        _, told = build.communicate(timeout=60)
    assert build.returncode == code
    assert told.strip().endswith("error: terminated" if number == signal.SIGTERM else "") and "Traceback" not in told
    psutil.wait_procs(workers, 60)
    assert not any(worker.is_running() for worker in workers)


def test_a_plan_that_was_damaged_before_resuming_is_built_again(copy: tuple[Bundle, Compiled]) -> None:
    bundle, compiled = copy
    partial = compiled.folder.rename(compiled.folder.with_name(compiled.folder.name + ".partial"))
    (partial / "epilogue.plan").write_bytes(b"damaged")
    verify_compiled(build_engines(bundle, RTX))


def test_a_crash_of_the_library_is_an_error(copy: tuple[Bundle, Compiled]) -> None:
    bundle, _ = copy

    def kill(done: int, total: int, name: str) -> None:
        for child in psutil.Process().children(recursive=True):
            if any("spawn_main" in argument for argument in child.cmdline()):  # but not Python's resource tracker
                child.kill()

    with pytest.raises(EngineError, match=r"tensorrt-rtx crashed while building .*\.onnx"):
        build_engines(bundle, RTX, settings=BuildSettings(level=2), jobs=2, progress=kill)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.write_bytes(bytes([plan.read_bytes()[0] ^ 1]) + plan.read_bytes()[1:]),
        lambda plan: os.truncate(plan, 100),
        lambda plan: plan.write_bytes(plan.read_bytes() + b"\0"),
        lambda plan: plan.unlink(),
        lambda plan: plan.rename(plan.with_suffix(".moved")).touch() or plan.symlink_to(plan.with_suffix(".moved")),
    ],
    ids=["a changed byte", "cut short", "a byte more", "missing", "a link"],
)
def test_a_plan_that_its_index_does_not_vouch_for_is_never_handed_on(
    copy: tuple[Bundle, Compiled], change: Callable[[Path], object]
) -> None:
    bundle, compiled = copy
    change(compiled.folder / "block.000.plan")
    with pytest.raises(IntegrityError, match=r"block\.000\.plan .*build .* --backend tensorrt-rtx"):
        compiled.read_plan("block.000")
    with pytest.raises(IntegrityError):
        verify_compiled(compiled)
    assert build_engines(bundle, RTX).read_plan("block.000")  # and the remedy works


def test_a_part_without_a_plan_is_named(copy: tuple[Bundle, Compiled]) -> None:
    with pytest.raises(BundleError, match=r"hold no plan of block\.999; build them with"):
        copy[1].read_plan("block.999")
    parts = json.loads((copy[1].folder / INDEX).read_text())["parts"]
    edit_index(copy[1], parts={name: part for name, part in parts.items() if name != "block.001"})
    with pytest.raises(BundleError, match=r"hold no plan of block\.001; build them with"):
        plan_memory(copy[0].manifest, compiled=open_compiled(copy[1].folder))


def test_plans_in_the_folder_of_another_target_are_refused(copy: tuple[Bundle, Compiled]) -> None:
    edit_index(copy[1], target={"library": "tensorrt-rtx 9.9"})
    with pytest.raises(IntegrityError, match=r"are for tensorrt-rtx 9\.9, expected in a folder tensorrt-rtx-"):
        verify_compiled(open_compiled(copy[1].folder))


def test_a_file_that_the_index_does_not_name_is_refused(copy: tuple[Bundle, Compiled]) -> None:
    (copy[1].folder / "more.plan").touch()
    with pytest.raises(IntegrityError, match=r"more\.plan is not in engines\.json; remove it"):
        verify_compiled(copy[1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"schema": 1}', "cannot be read"),
    ],
)
def test_a_broken_index_is_refused(copy: tuple[Bundle, Compiled], content: bytes, reason: str) -> None:
    bundle, compiled = copy
    (compiled.folder / INDEX).write_bytes(content)
    for attempt in (lambda: list_compiled(bundle), lambda: find_compiled(bundle, RTX, find_target(RTX))):
        with pytest.raises(IntegrityError, match=rf"engines\.json {reason}"):
            attempt()
    verify_compiled(build_engines(bundle, RTX))


def test_an_index_of_another_schema_is_refused(copy: tuple[Bundle, Compiled]) -> None:
    edit_index(copy[1], schema=1)
    with pytest.raises(IntegrityError, match=r"got schema 1, expected 2; build them with: .* build "):
        open_compiled(copy[1].folder)


def test_an_index_cannot_name_files_elsewhere(copy: tuple[Bundle, Compiled]) -> None:
    _, compiled = copy
    parts = json.loads((compiled.folder / INDEX).read_text())["parts"]
    parts["block.000"]["file"] = "../../../block.000.plan"
    edit_index(compiled, parts=parts)
    with pytest.raises(IntegrityError, match="is not plain"):
        open_compiled(compiled.folder)


def test_engines_of_another_bundle_are_refused(copy: tuple[Bundle, Compiled]) -> None:
    bundle, _ = copy
    edit_manifest(bundle.path, lambda manifest: manifest["defaults"].update(fps=9))
    with pytest.raises(BundleError, match=r"built from another bundle .*build them with"):
        find_compiled(open_bundle(bundle.path), RTX, find_target(RTX))


def test_engines_for_another_target_are_named_beside_what_is_needed(built: Bundle) -> None:
    with pytest.raises(BundleError, match=r"got tensorrt-rtx 1\..*, expected tensorrt-rtx 9\.9, .*; build them with"):
        find_compiled(built, RTX, {"library": "tensorrt-rtx 9.9", "system": "Linux x86_64"})


def test_a_bundle_without_engines_says_how_to_build_them(single_bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=rf"got none for tensorrt-rtx, .*build {single_bundle} --backend tensorrt-rtx"
    ):
        find_compiled(open_bundle(single_bundle), RTX, find_target(RTX))


def test_a_fingerprint_changes_with_every_fact_and_not_with_their_order() -> None:
    facts = {"library": "tensorrt 11.4", "gpu": "A", "cuda": "13.0"}
    assert fingerprint(facts) == fingerprint(dict(reversed(facts.items())))
    assert len({fingerprint(facts | {name: "other"}) for name in facts} | {fingerprint(facts)}) == 4


def test_a_bundle_that_was_altered_is_not_built(copy: tuple[Bundle, Compiled]) -> None:
    bundle, _ = copy
    with bundle.file("block.000.data").open("r+b") as file:
        file.write(b"\1\2\3\4")
    with pytest.raises(IntegrityError, match=r"block\.000\.data was altered"):
        build_engines(bundle, RTX)


def test_backends_that_compile_nothing_and_odd_numbers_are_refused(built: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="backend: got 'onnxruntime', expected one that compiles: tensorrt, "):
        build_engines(built, "onnxruntime")
    with pytest.raises(InvalidRequest, match="jobs: got 0, expected 1 or more"):
        build_engines(built, RTX, jobs=0)
    for device, expected in (("nonsense", "cpu, cuda or cuda:N"), ("cpu", "cuda or cuda:N")):
        with pytest.raises(InvalidRequest, match=f"device: got '?{device}'?, expected {expected}"):
            build_engines(built, RTX, device)


@pytest.mark.parametrize(
    ("free", "expected"), [(None, 8), (100 << 30, 8), (3 * (700 << 20), 3), (3 * (700 << 20) - 1, 2), (0, 1)]
)
def test_no_more_is_built_side_by_side_than_memory_allows(
    free: int | None, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert affordable_jobs(8, [1 << 20, 100 << 20], free) == expected
    assert (f"memory is free for {expected}" in caplog.text) == (expected < 8)


def test_engines_alone_do_not_make_a_gpu(built: Bundle) -> None:
    assert [choose_backend(built, device) for device in (None, "cuda:7", "cpu")] == ["onnxruntime"] * 3
    with pytest.raises(InvalidRequest, match="device: got 'tpu'"):
        choose_backend(built, "tpu")


def test_the_folder_of_a_target_is_beside_the_graphs(built: Bundle) -> None:
    folder = compiled_folder(built, RTX, find_target(RTX))
    assert folder.parent == built.path / "engines" and folder.name.startswith("tensorrt-rtx-")
