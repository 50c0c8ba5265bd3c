"""A bundle exists whole or not at all; an export that was stopped anywhere goes on from there to the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from foresight.engines.bundle import MANIFEST, open_bundle, verify_files
from foresight.engines.errors import InvalidRequest, OutputError
from foresight.exporter import export as export_module
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.registry import REGISTRY
from foresight.runtime.profiles import policy_of
from tests.support import copy_bundle, edit_manifest, snapshot
from zoo import FAMILIES

PARTS = [
    "text_encoder",
    "condition",
    "prologue",
    "block.000",
    "block.001",
    "block.002",
    "block.003",
    "epilogue",
    "vae_decoder",
]


class Stopped(BaseException):
    """Stands for whatever may end a process: it is no Exception, so nothing handles it by accident."""


def stop_at(part: str) -> Any:
    """A progress callback that stops the export before it does a part."""

    def progress(done: int, total: int, name: str) -> None:
        if name == part:
            raise Stopped

    return progress


def begins_anew(export: Export) -> bool:
    """Whether running this export would do any work."""
    try:
        export.run(stop_at(PARTS[0]))
    except Stopped:
        return True
    return False


@dataclass(frozen=True)
class Stage:
    """The partial bundle after one interruption: identity and time of every file, and whether the bundle was there."""

    before: str
    files: dict[str, tuple[int, int]]
    bundle_exists: bool


@dataclass(frozen=True)
class History:
    """An export of the main checkpoint that was interrupted before every part but the first, and finished at last."""

    stages: list[Stage]
    bundle: Path
    neighbours: list[str]


@pytest.fixture(scope="module")
def history(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("resumed")
    output = folder / "bundle"
    partial = folder / "bundle.partial"

    def identities() -> dict[str, tuple[int, int]]:
        stats = {path.name: path.stat() for path in partial.iterdir() if path.suffix in (".onnx", ".data")}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    stages = []
    for before in PARTS[1:]:
        with pytest.raises(Stopped):
            Export("latte", ExportRequest(), str(checkpoint), output).run(stop_at(before))
        stages.append(Stage(before, identities(), output.exists()))
    Export("latte", ExportRequest(), str(checkpoint), output).run()
    return History(stages, output, sorted(path.name for path in folder.iterdir()))


@pytest.mark.parametrize("index", range(len(PARTS) - 1))
def test_an_interrupted_export_has_done_the_parts_before(history: History, index: int) -> None:
    done = {name.rpartition(".")[0] for name in history.stages[index].files}
    assert done == set(PARTS[: index + 1])


@pytest.mark.parametrize("index", range(1, len(PARTS) - 1))
def test_a_resumed_export_leaves_finished_parts_alone(history: History, index: int) -> None:
    earlier, later = history.stages[index - 1].files, history.stages[index].files
    assert {name: later[name] for name in earlier} == earlier


def test_an_interrupted_export_leaves_nothing_under_the_bundles_name(history: History) -> None:
    assert not any(stage.bundle_exists for stage in history.stages)


def test_a_finished_export_leaves_nothing_else(history: History) -> None:
    assert history.neighbours == ["bundle"]


def test_a_bundle_that_was_interrupted_everywhere_has_the_bytes_of_one_that_never_was(
    history: History, bundle: Path
) -> None:
    resumed, whole = snapshot(history.bundle), snapshot(bundle)
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if resumed[name] != whole[name]] == []


@pytest.fixture
def nearly_done(bundle: Path, checkpoint: Path, tmp_path: Path) -> Export:
    """An export whose partial bundle lacks only what comes after the parts."""
    export = Export("latte", ExportRequest(), str(checkpoint), tmp_path / "bundle")
    partial = copy_bundle(bundle, tmp_path / "bundle.partial")
    manifest = json.loads((partial / MANIFEST).read_text())
    parts = msgspec.to_builtins(open_bundle(bundle).manifest.parts)
    state = {"key": export.key, "parts": {part["name"]: part for part in parts}, "files": manifest["files"]}
    for name in (MANIFEST, "tokenizer.json", "sampler.npz"):
        (partial / name).unlink()
    for name in ("tokenizer.json", "sampler.npz"):
        del state["files"][name]
    (partial / "state.json").write_text(json.dumps(state))
    return export


def exported_again(export: Export) -> list[str]:
    """The parts that the export writes, by real inodes."""
    partial = export.output.with_name("bundle.partial")
    before = {path.name: path.stat().st_ino for path in partial.glob("*.onnx")}
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.onnx")}
    export.run()
    after = {path.name: path.stat() for path in export.output.glob("*.onnx")}
    return sorted(
        name.removesuffix(".onnx")
        for name, stat in after.items()
        if before.get(name) != stat.st_ino or times.get(name) != stat.st_mtime_ns
    )


def test_when_all_parts_are_done_none_is_done_again(nearly_done: Export) -> None:
    assert exported_again(nearly_done) == []


def test_a_damaged_part_of_a_partial_bundle_is_done_again(nearly_done: Export, bundle: Path) -> None:
    os.truncate(nearly_done.output.with_name("bundle.partial") / "condition.data", 100)
    assert exported_again(nearly_done) == ["condition"]
    assert snapshot(nearly_done.output) == snapshot(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": "other", "parts": {}, "files": {}}', b"\xff", b"[]"])
def test_a_partial_bundle_of_something_else_is_begun_anew(nearly_done: Export, content: bytes) -> None:
    partial = nearly_done.output.with_name("bundle.partial")
    (partial / "state.json").write_bytes(content)
    (partial / "stray").write_text("")
    assert begins_anew(nearly_done)
    assert not (partial / "stray").exists()


# A bundle that is there already


@pytest.fixture
def present(bundle: Path, checkpoint: Path, tmp_path: Path) -> Export:
    """An export whose bundle is there already."""
    copy_bundle(bundle, tmp_path / "bundle")
    return Export("latte", ExportRequest(), str(checkpoint), tmp_path / "bundle")


def test_a_bundle_that_is_up_to_date_is_left_alone(present: Export) -> None:
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in present.output.iterdir()}
    opened = present.run(stop_at(PARTS[0]))
    assert opened.path == present.output
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in present.output.iterdir()} == before


def test_a_damaged_bundle_is_made_again(present: Export) -> None:
    os.truncate(present.output / "prologue.data", 100)
    assert begins_anew(present)


def test_another_request_makes_another_bundle(present: Export, checkpoint: Path) -> None:
    assert begins_anew(Export("latte", ExportRequest(max_batch=2), str(checkpoint), present.output))


def test_another_opset_makes_another_bundle(present: Export, checkpoint: Path) -> None:
    assert begins_anew(Export("latte", ExportRequest(), str(checkpoint), present.output, opset=22))


def test_a_changed_checkpoint_makes_another_bundle(present: Export, checkpoint: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    file = changed / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] += 1
    save_file(weights, file)
    assert begins_anew(Export("latte", ExportRequest(), str(changed), present.output))


def test_the_older_bundle_stands_until_the_new_one_is_whole(present: Export, checkpoint: Path) -> None:
    before = snapshot(present.output)
    assert begins_anew(Export("latte", ExportRequest(max_batch=2), str(checkpoint), present.output))
    assert snapshot(present.output) == before


def test_a_new_bundle_takes_the_place_of_an_older_one(nearly_done: Export, bundle: Path) -> None:
    older = copy_bundle(bundle, nearly_done.output)
    edit_manifest(older, lambda manifest: manifest["generator"].update(export_key="of an older version"))
    nearly_done.run()
    assert snapshot(nearly_done.output) == snapshot(bundle)
    assert [path.name for path in nearly_done.output.parent.iterdir()] == ["bundle"]


# Disks


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Lets the sampler table hit the end of the disk when half of it is written."""
    write = export_module.write_table  # type: ignore[attr-defined]

    def write_half(scheduler: Any, path: Path) -> None:
        write(scheduler, path, max_steps=2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "write_table", write_half)
        yield "No space left on device"


def test_a_full_disk_is_an_output_error_that_says_what_to_do(nearly_done: Export, full_disk: str) -> None:
    with pytest.raises(OutputError, match=rf"export to .*: {full_disk}; free some space and export again") as caught:
        nearly_done.run()
    assert caught.value.exit_code == 1
    assert not nearly_done.output.exists()


def test_after_a_full_disk_the_export_goes_on(
    nearly_done: Export, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module.write_table  # type: ignore[attr-defined]
    failures = iter([True])

    def fail_once(scheduler: Any, path: Path) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(scheduler, path)

    monkeypatch.setattr(export_module, "write_table", fail_once)
    with pytest.raises(OutputError):
        nearly_done.run()
    assert exported_again(nearly_done) == []
    assert snapshot(nearly_done.output) == snapshot(bundle)


def test_a_last_rename_that_failed_does_not_cost_the_parts(
    nearly_done: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, failures = os.rename, iter([True])

    def fail_once(source: Any, target: Any) -> None:
        if next(failures, False):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OutputError, match="Permission denied"):
        nearly_done.run()
    assert exported_again(nearly_done) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = ["foresight", "export", "--model", "latte", "--checkpoint", sys.argv[1], "--output", sys.argv[2]]
from foresight.cli import main
main()
"""


def test_a_file_beyond_what_the_system_allows_fails_in_one_line(single_checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(single_checkpoint), str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1
    assert len(lines) == 1 and "File too large" in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("place", ["file/bundle", "file/deep/bundle"])
def test_a_place_that_cannot_be_written_is_an_output_error(checkpoint: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="check the path and its permissions"):
        Export("latte", ExportRequest(), str(checkpoint), tmp_path / place).run()


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_an_output_without_a_name_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OutputError, InvalidRequest)):
        Export("latte", ExportRequest(), str(checkpoint), Path(output)).run(stop_at(PARTS[0]))


def test_a_file_where_the_bundle_should_go_is_not_lost(nearly_done: Export) -> None:
    nearly_done.output.write_text("important")
    with contextlib.suppress(OutputError, InvalidRequest):
        nearly_done.run()
    assert nearly_done.output.is_file() and nearly_done.output.read_text() == "important"


def test_a_folder_that_is_no_bundle_is_not_lost(nearly_done: Export) -> None:
    nearly_done.output.mkdir()
    (nearly_done.output / "thesis.tex").write_text("years of work")
    with contextlib.suppress(OutputError, InvalidRequest):
        nearly_done.run()
    assert (nearly_done.output / "thesis.tex").read_text() == "years of work"


# The plan


def test_planning_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    Export("latte", ExportRequest(), str(checkpoint), tmp_path / "deep" / "bundle").plan()
    assert not list(tmp_path.iterdir())


def test_a_plan_tells_what_the_bundle_will_be(checkpoint: Path, bundle: Path) -> None:
    plan = Export("latte", ExportRequest(), str(checkpoint), bundle).plan()
    manifest = open_bundle(bundle).manifest
    assert list(plan.parts) == [part.name for part in manifest.parts]
    assert plan.blocks == len(manifest.blocks)
    assert plan.kinds == len({block.kind for block in manifest.blocks})
    assert plan.cache_bytes == manifest.cache_bytes(2)
    assert plan.shape == {"height": 16, "width": 16, "frames": 3, "max_batch": 4}
    data = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".data"))
    assert 0 < plan.bundle_bytes == sum(plan.parts.values()) <= data  # in the files, weights begin at whole pages


def test_progress_is_told_every_part_in_order(present: Export, nearly_done: Export) -> None:
    shutil.rmtree(present.output)
    told: list[tuple[int, int, str]] = []
    nearly_done.run(lambda done, total, name: told.append((done, total, name)))
    assert told == [(index, len(PARTS), name) for index, name in enumerate([*PARTS, "done"])]


def test_the_manifest_names_source_and_tools(bundle: Path, checkpoint: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.source.checkpoint == checkpoint.name
    assert {"torch", "diffusers", "transformers", "onnx"} <= set(manifest.generator)


@pytest.mark.parametrize("name", ["wide_bundle", "half_bundle", "single_bundle"])
def test_every_exported_bundle_is_intact(name: str, request: pytest.FixtureRequest) -> None:
    verify_files(open_bundle(request.getfixturevalue(name)))


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=f"model: got 'sora', expected one of {', '.join(REGISTRY)}"):
        Export("sora")


# Profiles

TUNED = [name for name, row in REGISTRY.items() if row.tuned is not None]


@pytest.mark.parametrize("name", TUNED)
def test_a_demo_model_has_the_profiles_that_were_tuned_for_it(name: str) -> None:
    row = REGISTRY[name]
    profiles = Export(name).profiles
    assert profiles and profiles == row.profiles()
    for profile in profiles:
        assert (
            profile.steps in (row.defaults.steps, row.defaults.steps // 2) and profile.guidance == row.defaults.guidance
        )
        assert policy_of(profile).name == profile.policy


def test_the_profiles_of_a_demo_model_stand_in_its_bundle(demo_bundle: Path) -> None:
    opened = open_bundle(demo_bundle)
    assert opened.manifest.profiles == REGISTRY[opened.manifest.model].profiles() != ()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_of_every_family_may_have_another_dtype(family: str, examples: Callable[[str], Path]) -> None:
    example = FAMILIES[family].example
    request = ExportRequest(dtype="fp16", vae_dtype="fp32", **example.sizes)
    split = Export(example.model, request, str(examples(family))).split
    decoder = {plan.name for stage in split.decoder for plan in stage.parts}
    for plan in split.parts:
        found = {parameter.dtype for parameter in plan.module.parameters()}
        assert found == {torch.float32} if plan.name in decoder else torch.float16 in found, plan.name


def test_a_dtype_of_the_decoder_makes_another_bundle_and_none_the_one_it_always_was(checkpoint: Path) -> None:
    keys = [
        Export("latte", ExportRequest(**asked), str(checkpoint)).key
        for asked in ({}, {"vae_dtype": None}, {"vae_dtype": "fp16"})
    ]
    assert keys[0] == keys[1] != keys[2]


def test_other_sizes_types_and_checkpoints_have_no_profiles(checkpoint: Path) -> None:
    name = TUNED[0]
    assert Export(name, ExportRequest(max_batch=2)).profiles
    assert not Export(name, ExportRequest(dtype="fp16")).profiles
    assert not Export(name, ExportRequest(width=16)).profiles
    assert not Export(name, checkpoint=str(checkpoint)).profiles


def test_none_are_known_for_published_models_or_where_the_record_is_not(tmp_path: Path) -> None:
    assert not any(row.profiles() for name, row in REGISTRY.items() if name not in TUNED)
    assert replace(REGISTRY[TUNED[0]], tuned=tmp_path / "nowhere.json").profiles() == ()
