"""The command line: results on stdout, everything else on stderr, one line an error, and the right exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from weakref import ref

import av
import numpy as np
import pytest
from PIL import Image

from foresight.engines.bundle import open_bundle
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from tests.support import Outcome, copy_bundle, edit_manifest, snapshot

Cli = Callable[..., Outcome]
REPOSITORY = Path(__file__).parents[1]


def assert_refused(outcome: Outcome, code: int, message: str = "") -> None:
    """One line on stderr that begins with `error:`, nothing on stdout, and the exit code."""
    lines = outcome.err.splitlines()
    assert outcome.code == code, outcome
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert re.search(message, lines[0]), lines[0]
    assert outcome.out == ""


def document(outcome: Outcome) -> Any:
    """The one JSON document on stdout."""
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def process(*arguments: Any, cwd: Path, limit: int | None = None, stdout: int | IO[bytes] = subprocess.PIPE) -> Outcome:
    """A command line in a process of its own; no file of it may grow beyond `limit` bytes."""
    program = "import sys; from foresight.cli import main; main(sys.argv[1:])"
    if limit is not None:
        program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {program}"
    command = [sys.executable, "-c", program, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd, check=False)
    return Outcome(done.returncode, done.stdout or "", done.stderr)


# run


def test_run_writes_the_video_it_reports(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    summary = document(foresight_cli("run", "--bundle", bundle, "--steps", 3, "--output", "v.npy", "--json"))
    assert summary["files"] == ["v.npy"]
    assert summary["frames"] == [3, 16, 16, 3]
    assert np.load(tmp_path / "v.npy").shape == (3, 16, 16, 3)


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
    make = VideoPipeline.__call__
    made: list[ref[Any]] = []
    kept: dict[str, int] = {}

    def watched(pipeline: VideoPipeline, prompt: str, **request: Any) -> Any:
        kept.setdefault(prompt, sum(frames() is not None for frames in made))
        video = make(pipeline, prompt, **request)
        made.append(ref(video.frames))
        return video

    monkeypatch.setattr(VideoPipeline, "__call__", watched)
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
    assert re.search(
        r"x as fast \([\d.]+ to [\d.]+ in \d pairs; at most [\d.]+x, by the blocks that ran\)", outcome.out
    )


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


def test_an_export_that_is_up_to_date_says_so_and_is_the_newest(
    foresight_cli: Cli, wide_checkpoint: Path, wide_bundle: Path, bundle: Path, tmp_path: Path
) -> None:
    older, _ = (copy_bundle(one, tmp_path / "bundles" / name) for one, name in ((wide_bundle, "wide"), (bundle, "b")))
    for path in (older, older / "manifest.json"):
        os.utime(path, (1000, 1000))
    again = foresight_cli(
        "export", "--model", "latte", "--checkpoint", wide_checkpoint, "--width", 16, "--max-batch", 1,
        "--output", older,
    )  # fmt: skip
    assert f"{older}: is up to date" in again.out
    row = document(foresight_cli("run", "--steps", 1, "--output", "v.npy", "--json"))
    assert row["bundle"] == "bundles/wide"


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


INVALID: dict[str, tuple[list[str], str]] = {
    "101 steps": (["--steps", "101"], "steps: got 101, expected 1 to 100"),
    "no steps": (["--steps", "0"], "steps: got 0"),
    "negative steps": (["--steps", "-3"], "steps: got -3"),
    "half a step": (["--steps", "2.5"], "2.5"),
    "empty prompt": (["--prompt", ""], "prompt"),
    "blank prompt": (["--prompt", "  "], "prompt"),
    "prompt and prompts": (["--prompt", "a", "--prompts", "p.txt"], "prompt: got --prompt and --prompts"),
    "prompts missing": (["--prompts", "missing.txt"], "prompts missing.txt"),
    "guidance nan": (["--guidance", "nan"], "guidance: got nan"),
    "guidance inf": (["--guidance", "inf"], "guidance: got inf"),
    "guidance 0": (["--guidance", "0"], "guidance: got 0.0"),
    "guidance beyond fp32": (["--guidance", "1e39"], "guidance: got 1e"),
    "negative seed": (["--seed", "-1"], "seed: got -1"),
    "seed that is no number": (["--seed", "x"], "seed"),
    "R = N": (["--reuse-steps", "2", "--interval", "2"], "interval: got 2"),
    "R < N": (["--reuse-steps", "2", "--interval", "1"], "interval: got 1"),
    "R below the default N": (["--interval", "1"], "interval: got 1"),
    "gamma 0": (["--gamma", "0"], "gamma: got 0"),
    "gamma nan": (["--gamma", "nan"], "gamma: got nan"),
    "gamma 3": (["--gamma", "3"], "gamma: got 3"),
    "warmup 1": (["--warmup", "1"], "warmup: got 1"),
    "unknown policy": (["--policy", "teacache"], "policy: got 'teacache', expected one of"),
    "gamma of static": (["--policy", "static", "--gamma", "1"], "gamma: policy static has no such setting"),
    "gamma of none": (["--policy", "none", "--gamma", "1"], "gamma: policy none has no such setting"),
    "unknown cache": (["--cache", "input"], "cache: got 'input'"),
    "unknown cache of none": (["--policy", "none", "--cache", "input"], "cache: got 'input'"),
    "unknown backend": (["--backend", "abacus"], "backend: got 'abacus'"),
    "unknown device": (["--device", "tpu"], "device: got 'tpu'"),
    "no threads": (["--threads", "0"], "threads: got 0"),
    "unknown suffix": (["--output", "v.avi"], "output: got 'v.avi'"),
    "frames of another suffix": (["--save-frames", "f.txt"], "frames: got 'f.txt'"),
    "latents missing": (["--latents", "missing.npy"], "latents missing.npy"),
    "unknown flag": (["--speed", "2"], "--speed"),
    "stray argument": (["stray"], "stray"),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_request_that_makes_no_sense_is_refused(foresight_cli: Cli, bundle: Path, tmp_path: Path, case: str) -> None:
    flags, message = INVALID[case]
    assert_refused(foresight_cli("run", "--bundle", bundle, *flags), 2, re.escape(message))
    assert not list(tmp_path.iterdir())


LATENTS: dict[str, Any] = {
    "another shape": np.zeros((4, 3, 8, 9), np.float32),
    "another precision": np.zeros((4, 3, 8, 8)),
    "another byte order": np.zeros((4, 3, 8, 8), ">f4"),
    "text": np.full((4, 3, 8, 8), "x"),
    "objects": np.full((4, 3, 8, 8), None),
    "not finite": np.full((4, 3, 8, 8), np.nan, np.float32),
    "an empty file": b"",
    "no array": b"nothing of the kind",
    "a broken zip": b"PK\x03\x04broken",
}


@pytest.mark.parametrize("case", LATENTS)
def test_latents_that_do_not_fit_are_refused(foresight_cli: Cli, bundle: Path, tmp_path: Path, case: str) -> None:
    content = LATENTS[case]
    if isinstance(content, bytes):
        (tmp_path / "noise.npy").write_bytes(content)
    else:
        np.save(tmp_path / "noise.npy", content, allow_pickle=True)
    assert_refused(foresight_cli("run", "--bundle", bundle, "--latents", "noise.npy"), 2, "latents")
    assert [path.name for path in tmp_path.iterdir()] == ["noise.npy"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\n"])
def test_a_file_without_prompts_is_refused(foresight_cli: Cli, bundle: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert_refused(foresight_cli("run", "--bundle", bundle, "--prompts", "p.txt"), 2, "prompts p.txt")


def test_a_prompt_in_no_encoding_is_refused(foresight_cli: Cli, bundle: Path) -> None:
    assert_refused(foresight_cli("run", "--bundle", bundle, "--prompt", "caf\udce9"), 2, "prompt")


def test_cuda_where_there_is_none_fails_in_one_line(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") is None:
        assert_refused(foresight_cli("run", "--bundle", bundle, "--device", "cuda"), 1, "cuda")
        assert not list(tmp_path.iterdir())


# Memory


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
    outcome = foresight_cli("run", "--bundle", bundle, "--steps", 2, "--cache-memory", megabytes)
    assert "no room to cache, so always run: block.000, block.001, block.002, block.003" in outcome.out


def test_low_memory_makes_the_same_video(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    for name, flags in (("a.npy", ()), ("b.npy", ("--low-memory",))):
        document(foresight_cli("run", "--bundle", bundle, "--steps", 3, "--save-latents", name, *flags, "--json"))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--cache-memory", 0), 2, "cache_memory: got 0"),
        (("--cache-memory", -1), 2, "cache_memory: got -1"),
        (("--cache-memory", "nan"), 2, "cache_memory: got nan"),
        (("--cache-memory", 1e-3), 2, r"cache_memory: got 0\.00\d* MiB, expected at least 0\.\d*[1-9]"),
        (("--cache-memory", 1, "--cache-profile", "nowhere.json"), 2, "trace nowhere.json: cannot be read"),
        (("--cuda-graphs",), 2, "cuda_graphs: got onnxruntime, expected tensorrt"),
        (("--backend", "tensorrt", "--device", "cpu"), 2, "device: got cpu, expected cuda"),
        (("--backend", "reference", "--device", "cuda"), 2, "device"),
    ],
    ids=str,
)
def test_odd_flags_of_memory_and_device_are_refused(
    foresight_cli: Cli, bundle: Path, flags: tuple[Any, ...], code: int, message: str
) -> None:
    assert_refused(foresight_cli("run", "--bundle", bundle, "--steps", 2, *flags), code, message)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_backend_where_there_is_no_gpu_fails_in_one_line(foresight_cli: Cli, bundle: Path, backend: str) -> None:
    if shutil.which("nvidia-smi") is None:
        assert_refused(foresight_cli("run", "--bundle", bundle, "--backend", backend), 1, "device cuda")


def test_inspect_plans_the_memory_of_a_request(foresight_cli: Cli, bundle: Path) -> None:
    plans = document(foresight_cli("inspect", bundle, "--json"))["memory_of_one_guided_prompt"]
    assert [plan["low_memory"] for plan in plans] == [False, True]
    assert plans[1]["total"] < plans[0]["total"]
    lines = foresight_cli("inspect", bundle).out.splitlines()
    assert sum(line.startswith("memory of a guided prompt, onnxruntime") for line in lines) == 2


# compare


def test_compare_lists_the_parts_worst_first(foresight_cli: Cli, bundle: Path) -> None:
    summary = document(foresight_cli("compare", bundle, "--steps", 1, "--json"))
    rows = summary["differences"]
    assert {row["part"] for row in rows} == {part.name for part in open_bundle(bundle).manifest.parts}
    shares = [row["relative"] / row["tolerance"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert summary["beyond_tolerance"] == [] and all(row["within"] for row in rows)


def test_compare_fails_where_a_part_is_beyond_the_tolerance(foresight_cli: Cli, bundle: Path) -> None:
    outcome = foresight_cli("compare", bundle, "--part", "block.001", "--steps", 1, "--tolerance", 1e-12, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["beyond_tolerance"] == ["block.001"]
    assert outcome.err.startswith("error: compare: block.001 on onnxruntime differ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--part", "block.999"), "parts: got 'block.999'"),
        (("--backend", "abacus"), "backend: got 'abacus'"),
        (("--tolerance", -1), "tolerance: got -1"),
        (("--steps", 0), "steps: got 0"),
    ],
    ids=str,
)
def test_compare_refuses_odd_flags(foresight_cli: Cli, bundle: Path, flags: tuple[Any, ...], message: str) -> None:
    assert_refused(foresight_cli("compare", bundle, *flags), 2, message)


# Bundles


def damaged(bundle: Path, target: Path, how: str) -> Path:
    if how == "missing":
        return target
    if how == "half-written":
        target = target.with_name("bundle.partial")
        target.mkdir()
        (target / "state.json").write_text("{}")
        return target
    copy_bundle(bundle, target)
    if how == "newer schema":
        edit_manifest(target, lambda manifest: manifest.update(schema=99))
    elif how == "no manifest":
        (target / "manifest.json").unlink()
    elif how == "a changed byte":
        content = bytearray((target / "block.001.data").read_bytes())
        content[1000] ^= 1
        (target / "block.001.data").write_bytes(content)
    elif how == "a lost file":
        (target / "sampler.npz").unlink()
    elif how == "a stray file":
        (target / "stray").write_text("")
    elif how == "a manifest that is none":
        (target / "manifest.json").write_text("{}")
    return target


DAMAGES = {
    "missing": 3,
    "half-written": 3,
    "no manifest": 3,
    "newer schema": 3,
    "a changed byte": 4,
    "a lost file": 4,
    "a stray file": 4,
    "a manifest that is none": 4,
}


@pytest.mark.parametrize(("how", "code"), DAMAGES.items())
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_bundle_that_is_not_whole_is_refused(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, command: str, how: str, code: int
) -> None:
    folder = damaged(bundle, tmp_path / "bundle", how)
    before = snapshot(tmp_path)
    assert_refused(foresight_cli(command, *(["--bundle", folder] if command == "run" else [folder])), code)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
def test_without_any_bundle_it_says_how_to_make_one(foresight_cli: Cli, command: str) -> None:
    assert_refused(foresight_cli(command), 3, "no bundle under bundles/: make one with: .*export --model NAME")


def test_verify_vouches_for_a_whole_bundle(foresight_cli: Cli, bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert document(foresight_cli("verify", bundle, "--json")) == {
        "bundle": str(bundle),
        "id": opened.id,
        "files": len(opened.manifest.files),
        "engines": [],
        "intact": True,
    }


def test_inspect_shows_the_manifest(foresight_cli: Cli, bundle: Path) -> None:
    shown = document(foresight_cli("inspect", bundle, "--json"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert shown["manifest"] == manifest
    assert shown["bytes"] == sum(record["bytes"] for record in manifest["files"].values())


def test_inspect_lists_every_part_for_people(foresight_cli: Cli, bundle: Path) -> None:
    outcome = foresight_cli("inspect", bundle)
    assert all(part.name in outcome.out for part in open_bundle(bundle).manifest.parts)


def test_inspect_never_loads_an_engine(bundle: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from foresight.cli import main\n"
        "try: main(['inspect', sys.argv[1], '--json'])\n"
        "finally: print([name for name in ('onnxruntime', 'torch') if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.strip() == "[]"


def test_env_tells_machine_and_libraries(foresight_cli: Cli) -> None:
    found = document(foresight_cli("env", "--json"))
    assert found["machine"]["cores"] >= 1 and "cpu" in found["can"]["run on"]
    assert found["libraries"]["onnxruntime"]


def test_env_asks_tensorrt_what_it_can_do_here(foresight_cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    told = document(foresight_cli("env", "--json"))["can"]["tensorrt-rtx"]
    assert re.fullmatch(r"\d+\.\d+\S*; builds engines: yes; runs engines: (yes|no, .+)", told)


def test_env_survives_a_library_that_crashes(
    foresight_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As TensorRT does where the driver is broken."""
    (tmp_path / "tensorrt.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    told = document(foresight_cli("env", "--json"))["can"]["tensorrt"]
    assert told == "crashes (signal 11); check the driver"


# build


def test_an_export_for_a_library_that_is_missing_is_refused_before_it_begins(
    foresight_cli: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    refused = foresight_cli("export", "--model", "latte", "--checkpoint", checkpoint, "--backend", "tensorrt")
    assert refused.code == 1 and refused.err.startswith("error: tensorrt: ")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_an_export_would(foresight_cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    refused = foresight_cli(
        "export", "--checkpoint", checkpoint, "--model", "latte", "--output", "notes.md", "--dry-run"
    )
    assert refused.code == 1 and "something that is no bundle is there" in refused.err


def test_build_compiles_and_inspect_and_verify_know_of_it(foresight_cli: Cli, single_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    bundle = copy_bundle(single_bundle, Path("bundle"))
    parts = len(open_bundle(bundle).manifest.parts)
    built = document(foresight_cli("build", bundle, "--backend", "tensorrt-rtx", "--level", 0, "--json"))
    assert len(built["parts"]) == parts and built["scratch_bytes"] > 0 and built["settings"]["level"] == "0"
    assert document(foresight_cli("inspect", bundle, "--json"))["engines"] == [built]
    assert document(foresight_cli("verify", bundle, "--json"))["engines"] == [built["folder"]]
    plan = Path(built["folder"]) / "prologue.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert_refused(foresight_cli("verify", bundle), 4, "prologue.plan was altered")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--backend", "onnxruntime"], 2, "got 'onnxruntime', expected one that compiles"),
        (["--backend", "tensorrt-rtx", "--level", 9], 2, "level: got 9, expected 0 to 5"),
        (["--backend", "tensorrt-rtx", "--workspace", 0], 2, "workspace: got 0 bytes"),
        (["--backend", "tensorrt-rtx", "--jobs", 0], 2, "jobs: got 0, expected 1 or more"),
        ([], 2, "Missing option '--backend'"),
    ],
)
def test_build_refuses_odd_flags(
    foresight_cli: Cli, single_bundle: Path, flags: list[Any], code: int, message: str
) -> None:
    assert_refused(foresight_cli("build", single_bundle, *flags), code, message)
    assert not (single_bundle / "engines").exists()


def test_build_without_the_library_says_how_to_install_it(foresight_cli: Cli, single_bundle: Path) -> None:
    code = "import sys; sys.modules['tensorrt'] = None; from foresight.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "build", str(single_bundle), "--backend", "tensorrt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), 1, "tensorrt: not installed .*pip install")


def test_export_refuses_a_backend_that_compiles_nothing_before_it_begins(foresight_cli: Cli, tmp_path: Path) -> None:
    flags = ["--model", "latte-demo", "--backend", "onnxruntime", "--output", tmp_path / "never"]
    assert_refused(foresight_cli("export", *flags), 2, "expected one that compiles")
    assert not (tmp_path / "never").exists()


# export


def test_a_dry_run_tells_the_plan_and_writes_nothing(foresight_cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    plan = document(foresight_cli("export", "--model", "latte", "--checkpoint", checkpoint, "--dry-run", "--json"))
    assert (plan["blocks"], plan["kinds"], plan["dtype"], plan["opset"]) == (4, 3, "fp32", 23)
    assert plan["output"] == "bundles/latte"
    assert not list(tmp_path.iterdir())


def test_every_flag_of_an_export_reaches_it(foresight_cli: Cli, checkpoint: Path) -> None:
    flags = ["--dtype", "fp16", "--height", 32, "--width", 24, "--frames", 1, "--max-batch", 2, "--opset", 20]
    arguments = ["export", "--model", "latte", "--checkpoint", checkpoint, "--output", "x", "--dry-run", "--json"]
    plan = document(foresight_cli(*arguments, *flags))
    assert plan["shape"] == {"height": 32, "width": 24, "frames": 1, "max_batch": 2}
    assert (plan["dtype"], plan["opset"], plan["output"]) == ("fp16", 20, "x")


def test_exporting_again_finds_the_bundle_up_to_date(foresight_cli: Cli, checkpoint: Path, bundle: Path) -> None:
    arguments = ["export", "--model", "latte", "--checkpoint", checkpoint, "--output", bundle, "--json"]
    summary = document(foresight_cli(*arguments))
    assert (summary["id"], summary["blocks"]) == (open_bundle(bundle).id, 4)


INVALID_EXPORTS: dict[str, tuple[list[str], int, str]] = {
    "unknown model": (["--model", "sora"], 2, "model: got 'sora', expected one of"),
    "no model": ([], 2, "--model"),
    "unknown dtype": (["--model", "latte", "--dtype", "fp8"], 2, "dtype: got 'fp8'"),
    "height that does not fit": (["--model", "latte", "--height", "10"], 2, "height: got 10"),
    "frames that do not fit": (["--model", "latte", "--frames", "2"], 2, "frames: got 2"),
    "negative width": (["--model", "latte", "--width", "-8"], 2, "width: got -8"),
    "no batch": (["--model", "latte", "--max-batch", "0"], 2, "max_batch: got 0"),
    "old opset": (["--model", "latte", "--opset", "11"], 2, "opset"),
    "unwritable": (["--model", "latte", "--output", "file/bundle"], 1, "check the path"),
    "output without a name": (["--model", "latte", "--output", "."], 2, "output"),
}


@pytest.mark.parametrize("case", INVALID_EXPORTS)
def test_an_export_that_makes_no_sense_is_refused(
    foresight_cli: Cli, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    flags, code, message = INVALID_EXPORTS[case]
    (tmp_path / "file").write_text("")
    assert_refused(foresight_cli("export", "--checkpoint", checkpoint, *flags), code, re.escape(message))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_of_another_model_is_refused(foresight_cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "CogVideoXPipeline"}))
    outcome = foresight_cli("export", "--model", "latte", "--checkpoint", other)
    assert_refused(outcome, 1, "is a CogVideoXPipeline, expected a LattePipeline")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_checkpoint_that_is_not_there_is_refused(foresight_cli: Cli) -> None:
    assert_refused(foresight_cli("export", "--model", "latte", "--checkpoint", "./nowhere"), 1, "checkpoint ./nowhere")


# Outputs that cannot be written


@pytest.mark.parametrize("flag", ["--output", "--save-frames", "--save-latents", "--trace", "--report"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flag: str
) -> None:
    (tmp_path / "file").write_text("")
    suffix = {"--output": ".mp4", "--trace": ".json", "--report": ".html"}.get(flag, ".npy")
    assert_refused(foresight_cli("run", "--bundle", bundle, flag, f"file/x{suffix}"), 1, "writable|check the path")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("flags", "module"),
    [
        ((), "av"),
        (("--output", "v.gif"), "PIL.Image"),
        (("--output", "folder"), "PIL.Image"),
        (("--output", "v.npy", "--report", "r.html"), "jinja2"),
    ],
    ids=str,
)
def test_a_library_that_an_output_needs_is_missed_before_the_work(
    foresight_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], module: str
) -> None:
    """Even before the bundle is looked for."""
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(foresight_cli("run", "--bundle", "nowhere", *flags), 1, 'is not installed .*pip install "foresight')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.npy", "folder"])
def test_a_full_disk_fails_in_one_line_and_leaves_no_half_file(bundle: Path, tmp_path: Path, name: str) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--output", name]
    assert_refused(process(*arguments, cwd=tmp_path, limit=100), 1, f"output {name}: File too large")
    assert not list(tmp_path.iterdir())


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@needs_full
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=str)
def test_a_stdout_that_takes_nothing_fails_in_one_line_after_the_work(
    bundle: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--output", "v.npy", *flags]
    with Path("/dev/full").open("wb") as full:
        assert_refused(process(*arguments, cwd=tmp_path, stdout=full), 1, "error: stdout: No space left on device; ")
    assert (tmp_path / "v.npy").is_file()


@needs_full
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--help"), 1, "stdout"),
        (("--version",), 1, "stdout"),
        (("verify", "nowhere", "--json"), 3, "bundle nowhere"),
    ],
    ids=str,
)
def test_help_and_errors_that_stdout_does_not_take_end_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    with Path("/dev/full").open("wb") as full:
        assert_refused(process(*arguments, cwd=tmp_path, stdout=full), code, f"error: {message}")


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=str)
def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(
    bundle: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outcome = process("inspect", bundle, *flags, cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (outcome.code, outcome.err) == (1, "")


def test_an_error_after_the_reader_has_left_is_still_one_line(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert_refused(process("verify", "nowhere", "--json", cwd=tmp_path, stdout=writer), 3, "bundle nowhere")
    os.close(writer)


# The command line itself


def test_an_error_with_json_is_one_document_too(foresight_cli: Cli, tmp_path: Path) -> None:
    outcome = foresight_cli("verify", tmp_path / "nowhere", "--json")
    error = json.loads(outcome.out)["error"]
    assert outcome.code == error["exit_code"] == 3
    assert error["type"] == "BundleError" and error["message"] in outcome.err


def test_a_usage_error_with_json_is_one_document_too(foresight_cli: Cli) -> None:
    outcome = foresight_cli("run", "--steps", "many", "--json")
    assert outcome.code == json.loads(outcome.out)["error"]["exit_code"] == 2


def test_a_traceback_only_with_debug(foresight_cli: Cli, tmp_path: Path) -> None:
    assert "Traceback" not in foresight_cli("verify", tmp_path / "nowhere").err
    debugged = foresight_cli("verify", tmp_path / "nowhere", "--debug")
    assert "Traceback" in debugged.err and debugged.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("command", [[], ["export"], ["run"], ["build"], ["compare"], ["inspect"], ["verify"], ["env"]])
def test_help_is_given_on_stdout(foresight_cli: Cli, command: list[str]) -> None:
    outcome = foresight_cli(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "") and "Usage: foresight" in outcome.out


def test_version_is_told(foresight_cli: Cli) -> None:
    import foresight

    assert foresight.__version__ in foresight_cli("--version").out


def test_an_unknown_command_is_a_usage_error(foresight_cli: Cli) -> None:
    assert_refused(foresight_cli("fly"), 2, "fly")


def test_no_command_at_all_shows_the_help(foresight_cli: Cli) -> None:
    outcome = foresight_cli()
    assert outcome.code in (0, 2)
    assert "\n" in (outcome.out + outcome.err).strip(), "the help is more than one line"


def test_the_script_runs_from_a_clone(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "cli.py"), "verify", str(bundle), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["intact"] is True
