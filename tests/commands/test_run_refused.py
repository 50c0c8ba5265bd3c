"""run: requests that make no sense are one line, and nothing is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands.support import Cli, assert_refused

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
    "warmup 0": (["--warmup", "0"], "warmup: got 0"),
    "warmup 1 of foresight": (["--policy", "foresight", "--warmup", "1"], "warmup: got 1"),
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


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--cache-memory", 0), 2, "--cache-memory: got 0"),
        (("--cache-memory", -1), 2, "--cache-memory: got -1"),
        (("--cache-memory", "nan"), 2, "--cache-memory: got nan"),
        (("--cache-memory", 1e-3), 2, r"--cache-memory: got 0\.00\d* MiB, expected at least 0\.\d*[1-9]"),
        (("--cache-memory", 1, "--cache-profile", "nowhere.json"), 2, "trace nowhere.json: cannot be read"),
        (("--cuda-graphs",), 2, "--cuda-graphs: got onnxruntime, expected tensorrt"),
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "fast", "--policy", "static"], "profile: got --profile and --policy, expected one of them"),
        (["--profile", "fast", "--gamma", "1", "--warmup", "2"], "got --profile and --warmup, --gamma, expected"),
        (["--profile", "fast", "--steps", "4"], "profile: got 'fast' for 4 steps, and the bundle has none"),
    ],
)
def test_a_profile_that_is_none_is_refused(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    assert_refused(foresight_cli("run", "--bundle", bundle, *flags), 2, re.escape(message))
    assert not list(tmp_path.iterdir())
