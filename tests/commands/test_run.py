"""run: the video, what is told of it, and what comes out where."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from weakref import ref

import av
import numpy as np
import pytest
from PIL import Image

from foresight.engines.bundle import open_bundle
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from foresight.runtime.request import VideoRequest
from foresight.runtime.video import Video
from tests.commands.support import Cli, assert_refused, document, process
from tests.support import copy_bundle, edit_manifest, snapshot


def test_run_writes_the_video_it_reports(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    summary = document(foresight_cli("run", "--bundle", bundle, "--steps", 3, "--output", "v.npy", "--json"))
    assert summary["files"] == ["v.npy"]
    assert summary["frames"] == [3, 16, 16, 3]
    assert np.load(tmp_path / "v.npy").shape == (3, 16, 16, 3)


def test_run_says_what_to_try_next(foresight_cli: Cli, demo_bundle: Path, tmp_path: Path) -> None:
    command = ("run", "--bundle", demo_bundle, "--output", "v.gif", "--steps")
    told = foresight_cli(*command, 7, "--report", "page.html").out.splitlines()
    assert told[-1] == (
        "next: --policy forecast (it skips whole steps; foresight tune --steps 7 finds profiles of this bundle)"
    )
    assert "<code>--policy forecast</code>" in (tmp_path / "page.html").read_text()
    tuned = document(foresight_cli(*command, 50, "--json"))["next"]
    assert tuned["setting"].startswith("--profile ") and "% skipped, worst PSNR " in tuned["reason"]
    assert document(foresight_cli(*command, 7, "--policy", "none", "--json"))["next"] is None


def test_run_without_any_output_writes_video_mp4(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    assert foresight_cli("run", "--bundle", bundle, "--steps", 2).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_run_without_a_bundle_takes_the_newest_under_bundles(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    older, newer = (copy_bundle(bundle, tmp_path / "bundles" / name) for name in ("older", "newer"))
    os.utime(older / "manifest.json", (1000, 1000))
    edit_manifest(newer, lambda manifest: manifest["defaults"].update(prompt="a dog in the snow"))
    summary = document(foresight_cli("run", "--steps", 1, "--output", "v.gif", "--json"))
    assert summary["prompt"] == "a dog in the snow"


def test_run_makes_what_the_library_makes(
    foresight_cli: Cli, bundle: Path, pipeline: VideoPipeline, tmp_path: Path
) -> None:
    flags = ["--prompt", "a red circle", "--negative-prompt", "blue", "--steps", 5, "--guidance", 3, "--seed", 4]
    flags += ["--policy", "none", "--save-latents", "l.npy", "--save-frames", "f.npy"]
    assert foresight_cli("run", "--bundle", bundle, *flags).code == 0
    video = pipeline("a red circle", negative_prompt="blue", steps=5, guidance=3, seed=4, policy=NoReuse())
    assert np.load(tmp_path / "l.npy").tobytes() == video.latents.tobytes()
    assert np.load(tmp_path / "f.npy").tobytes() == video.frames.tobytes()


def test_saved_latents_and_frames_have_the_documented_shapes_and_dtypes(
    foresight_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    foresight_cli("run", "--bundle", bundle, "--steps", 1, "--save-latents", "l.npy", "--save-frames", "f.npy")
    latents, frames = np.load(tmp_path / "l.npy"), np.load(tmp_path / "f.npy")
    assert (latents.dtype, latents.shape) == (np.float32, (4, 3, 8, 8))
    assert (frames.dtype, frames.shape) == (np.uint8, (3, 16, 16, 3))
    assert not (tmp_path / "video.mp4").exists()


def test_given_latents_take_the_place_of_the_seed(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "noise.npy", np.random.default_rng(6).standard_normal((4, 3, 8, 8), dtype=np.float32))
    common = ["run", "--bundle", bundle, "--steps", 3]
    foresight_cli(*common, "--seed", 6, "--save-latents", "seed.npy")
    foresight_cli(*common, "--latents", "noise.npy", "--save-latents", "given.npy")
    assert (tmp_path / "seed.npy").read_bytes() == (tmp_path / "given.npy").read_bytes()


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.npy", "folder"])
def test_every_kind_of_output_can_be_read_back(foresight_cli: Cli, bundle: Path, tmp_path: Path, name: str) -> None:
    assert foresight_cli("run", "--bundle", bundle, "--steps", 1, "--output", name).code == 0
    path = tmp_path / name
    if name == "v.mp4":
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    elif name == "v.gif":
        with Image.open(path) as image:
            frames = [(image.seek(index), np.asarray(image.convert("RGB")))[1] for index in range(3)]
    elif name == "v.npy":
        frames = list(np.load(path))
    else:
        frames = [np.asarray(Image.open(file)) for file in sorted(path.iterdir())]
    assert np.stack(frames).shape == (3, 16, 16, 3)


def test_every_flag_of_a_policy_reaches_it(foresight_cli: Cli, bundle: Path) -> None:
    flags = ["--gamma", 1.5, "--warmup", 3, "--reuse-steps", 2, "--interval", 4, "--cache", "residual"]
    arguments = ["run", "--bundle", bundle, "--steps", 4, "--output", "v.npy", "--json", *flags]
    assert document(foresight_cli(*arguments))["policy"] == {
        "name": "foresight",
        "gamma": 1.5,
        "warmup": 3,
        "reuse_steps": 2,
        "interval": 4,
        "cache": "residual",
    }


def test_a_file_of_prompts_makes_a_numbered_video_each(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n  a red circle  \n", encoding="utf-8")
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--prompts", "prompts.txt", "--seed", 3]
    rows = document(foresight_cli(*arguments, "--output", "v.gif", "--json"))
    assert [(row["prompt"], row["seed"], row["files"]) for row in rows] == [
        ("a dog", 3, ["v-000.gif"]),
        ("a red circle", 4, ["v-001.gif"]),
    ]
    assert (tmp_path / "v-000.gif").exists() and (tmp_path / "v-001.gif").exists()


def prompts_whose_second_video_cannot_be_written(folder: Path) -> tuple[Any, ...]:
    """Flags of a run in `folder`."""
    (folder / "prompts.txt").write_text("a dog\na red circle\na cat\n", encoding="utf-8")
    (folder / "v-001.npy").mkdir()
    return ("--steps", 1, "--prompts", "prompts.txt", "--output", "v.npy")


def test_what_was_made_before_an_error_has_been_reported(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    outcome = foresight_cli("run", "--bundle", bundle, *prompts_whose_second_video_cannot_be_written(tmp_path))
    assert outcome.code == 1 and re.fullmatch(r"error: output v-001\.npy: .*\n", outcome.err)
    assert [line for line in outcome.out.splitlines() if line.startswith("v-")] == ["v-000.npy"]


def test_what_was_made_before_an_error_is_in_its_document(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    flags = prompts_whose_second_video_cannot_be_written(tmp_path)
    told = json.loads(foresight_cli("run", "--bundle", bundle, *flags, "--json").out)
    assert told["error"]["exit_code"] == 1
    assert [(row["prompt"], row["files"]) for row in told["finished"]] == [("a dog", ["v-000.npy"])]


@pytest.mark.parametrize("flags", [(), ("--compare",), ("--json",)], ids=str)
def test_no_video_is_kept_while_the_next_one_is_made(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    make = VideoPipeline.generate
    made: list[ref[Any]] = []
    kept: dict[str, int] = {}

    def watched(pipeline: VideoPipeline, request: VideoRequest, **callbacks: Any) -> list[Video]:
        assert isinstance(request.prompt, str)
        kept.setdefault(request.prompt, sum(frames() is not None for frames in made))
        videos = make(pipeline, request, **callbacks)
        made.extend(ref(video.frames) for video in videos)
        return videos

    monkeypatch.setattr(VideoPipeline, "generate", watched)
    (tmp_path / "prompts.txt").write_text("a dog\na red circle\na cat\n", encoding="utf-8")
    arguments = ["--steps", 1, "--prompts", "prompts.txt", "--output", "v.npy", *flags]
    assert foresight_cli("run", "--bundle", bundle, *arguments).code == 0
    assert kept == {"a dog": 0, "a red circle": 0, "a cat": 0}


def test_a_trace_tells_every_step(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    foresight_cli("run", "--bundle", bundle, "--steps", 4, "--trace", "t.json")
    trace = json.loads((tmp_path / "t.json").read_text())
    assert len(trace["steps"]) == 4 and trace["blocks"] == ["block.000", "block.001", "block.002", "block.003"]


def test_comparing_runs_without_reuse_too(foresight_cli: Cli, bundle: Path) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 6, "--output", "v.gif", "--compare", "--json"]
    assert document(foresight_cli(*arguments, "--policy", "none"))["compared"]["identical"] is True
    row = document(foresight_cli(*arguments, "--policy", "static", "--warmup", 2))
    compared = row["compared"]
    assert compared["identical"] is False and compared["psnr_db"] > 0
    assert min(compared["speedups"]) <= compared["speedup"] <= max(compared["speedups"])
    assert compared["ceiling"] == row["blocks_possible"] / row["blocks_computed"]


def test_a_comparison_is_told_with_its_spread_and_its_ceiling(foresight_cli: Cli, bundle: Path) -> None:
    outcome = foresight_cli("run", "--bundle", bundle, "--steps", 6, "--output", "v.gif", "--compare")
    assert re.search(r"x as fast \([\d.]+ to [\d.]+ in \d pairs; by the blocks that ran, about [\d.]+x\)", outcome.out)


def test_run_says_what_it_used(foresight_cli: Cli, bundle: Path) -> None:
    row = document(foresight_cli("run", "--bundle", bundle, "--steps", 1, "--seed", 7, "--output", "v.gif", "--json"))
    assert (row["bundle"], row["model"], row["seed"], row["frames"]) == (str(bundle), "latte", 7, [3, 16, 16, 3])
    outcome = foresight_cli("run", "--bundle", bundle, "--steps", 1, "--seed", 7, "--output", "v.gif")
    assert f"made by {bundle} (latte) of {row['prompt']!r}, seed 7: 3 frames of 16 x 16" in outcome.out


def test_settings_without_effect_are_said(foresight_cli: Cli, bundle: Path) -> None:
    flags = ["run", "--bundle", bundle, "--steps", 3, "--warmup", 200, "--guidance", 1, "--negative-prompt", "blue"]
    outcome = foresight_cli(*flags, "--output", "v.gif")
    assert [line.split(": ")[1] for line in outcome.out.splitlines() if line.startswith("note: ")] == [
        "warmup",
        "negative_prompt",
    ]
    assert len(document(foresight_cli(*flags, "--output", "v.gif", "--json"))["notes"]) == 2


def test_what_the_checkpoint_was_not_trained_on_is_said_with_every_video(
    foresight_cli: Cli, open_sora_bundle: Path
) -> None:
    flags = ["--steps", 1, "--policy", "none", "--output", "v.npy", "--json"]
    outcome = foresight_cli("run", "--bundle", open_sora_bundle, *flags)
    assert document(outcome)["notes"] == list(open_bundle(open_sora_bundle).manifest.cautions) != []


def test_a_prompt_file_of_another_system_makes_the_same_videos(
    foresight_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    rows = []
    for name, content in (("unix", b"a dog\na cat\n"), ("windows", b"\xef\xbb\xbfa dog\r\na cat\r\n")):
        (tmp_path / name).write_bytes(content)
        run = foresight_cli(
            "run", "--bundle", bundle, "--steps", 1, "--prompts", name, "--output", f"{name}.npy", "--json"
        )
        rows.append([(row["prompt"], row["seed"]) for row in document(run)])
    assert rows[0] == rows[1] == [("a dog", 0), ("a cat", 1)]
    assert (tmp_path / "unix-000.npy").read_bytes() == (tmp_path / "windows-000.npy").read_bytes()


@pytest.mark.parametrize("flag", ["--output", "--save-frames", "--save-latents", "--report", "--trace"])
def test_nothing_is_written_into_the_bundle(foresight_cli: Cli, bundle: Path, tmp_path: Path, flag: str) -> None:
    copy = copy_bundle(bundle, tmp_path / "bundle")
    name = {"--output": "x.mp4", "--report": "x.html", "--trace": "x.json"}.get(flag, "x.npy")
    before = snapshot(copy)
    assert_refused(foresight_cli("run", "--bundle", copy, flag, copy / name), 2, "which lies in the bundle")
    assert snapshot(copy) == before


def test_a_report_is_a_page(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    assert foresight_cli("run", "--bundle", bundle, "--steps", 3, "--report", "r.html").code == 0
    assert "<html" in (tmp_path / "r.html").read_text().lower()


def test_the_same_command_twice_writes_the_same_bytes(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for name in ("one.npy", "two.npy"):
        foresight_cli("run", "--bundle", bundle, "--steps", 3, "--save-latents", name)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


def test_an_over_long_prompt_is_cut_and_that_is_said(bundle: Path, tmp_path: Path) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--output", "v.npy", "--json"]
    outcome = process(*arguments, "--prompt", " ".join(["dog"] * 200), cwd=tmp_path)
    assert document(outcome)["truncated"] is True
    assert "has 201 tokens, the model reads 120" in outcome.err


def test_a_prompt_that_fits_is_not_called_truncated(foresight_cli: Cli, bundle: Path) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--output", "v.npy", "--json", "--prompt", "a dog"]
    outcome = foresight_cli(*arguments)
    assert "truncated" not in document(outcome) and outcome.err == ""


def test_a_small_cache_is_reported(foresight_cli: Cli, bundle: Path) -> None:
    buffer = open_bundle(bundle).manifest.cache_bytes(2) / 4  # four blocks
    command = ("run", "--bundle", bundle, "--steps", 8, "--policy", "static", "--warmup", 2, "--json")
    whole = document(foresight_cli(*command))
    small = document(foresight_cli(*command, "--cache-memory", 3 * buffer / 2**20))
    assert (whole["uncached"], small["uncached"]) == ([], ["block.000", "block.001", "block.002"])
    assert small["cache_bytes"] == 3 * buffer < whole["cache_bytes"] == 6 * buffer
    assert small["planned_bytes"] < whole["planned_bytes"]
    assert small["blocks_computed"] == whole["blocks_computed"]  # the last block spares those before it


def test_a_trace_chooses_what_is_cached(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    megabytes = 3 * open_bundle(bundle).manifest.cache_bytes(2) / 4 / 2**20
    command = ("run", "--bundle", bundle, "--steps", 8, "--policy", "static", "--warmup", 2, "--json")
    document(foresight_cli(*command, "--trace", "t.json"))
    trace = json.loads((tmp_path / "t.json").read_text())
    for step in trace["steps"]:  # as if only the second block had been reused
        step["decisions"] = ["computed", "reused", "computed", "computed"]
    (tmp_path / "t.json").write_text(json.dumps(trace))
    chosen = document(foresight_cli(*command, "--cache-memory", megabytes, "--cache-profile", "t.json"))
    assert chosen["uncached"] == ["block.000", "block.002", "block.003"]


def test_what_had_no_room_is_said(foresight_cli: Cli, bundle: Path) -> None:
    megabytes = 2 * open_bundle(bundle).manifest.cache_bytes(2) / 4 / 2**20
    outcome = foresight_cli("run", "--bundle", bundle, "--policy", "static", "--steps", 2, "--cache-memory", megabytes)
    assert "no room to cache, so always run: block.000, block.001, block.002, block.003" in outcome.out


def test_low_memory_makes_the_same_video(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for name, flags in (("a.npy", ()), ("b.npy", ("--low-memory",))):
        document(foresight_cli("run", "--bundle", bundle, "--steps", 3, "--save-latents", name, *flags, "--json"))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
