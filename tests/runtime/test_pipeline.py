"""The embedding interface: what a call returns, takes and refuses, and that none of it needs torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foresight
from foresight.engines.bundle import open_bundle
from foresight.engines.errors import EngineError, InvalidRequest
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Static
from foresight.runtime.request import VideoRequest
from tests.support import Json, copy_bundle, edit_manifest, vouch_for, watched_pipeline

SHAPE = (4, 3, 8, 8)


def draw(*shape: int) -> Any:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def test_a_video_has_uint8_frames_and_fp32_latents(pipeline: VideoPipeline) -> None:
    video = pipeline("a red circle", steps=2)
    assert video.frames.shape == (3, 16, 16, 3) and video.frames.dtype == np.uint8
    assert video.latents.shape == SHAPE and video.latents.dtype == np.float32
    assert (video.prompt, video.seed, video.fps) == ("a red circle", 0, pipeline.manifest.defaults.fps)


def test_a_list_of_prompts_gives_a_list_of_videos(pipeline: VideoPipeline) -> None:
    videos = pipeline(["a dog", "a red circle"], steps=2, seed=7)
    assert [(video.prompt, video.seed) for video in videos] == [("a dog", 7), ("a red circle", 8)]


def test_a_list_of_one_gives_a_list(pipeline: VideoPipeline) -> None:
    assert isinstance(pipeline(["a dog"], steps=1), list)


def test_what_is_left_out_is_the_bundles_default(pipeline: VideoPipeline) -> None:
    trace = pipeline("a dog").trace
    defaults = pipeline.manifest.defaults
    assert (trace.steps_requested, trace.guidances) == (defaults.steps, (defaults.guidance,))
    assert trace.policy["name"] == "foresight"


def test_the_seed_decides_the_noise(pipeline: VideoPipeline) -> None:
    one, same, other = (pipeline("a dog", steps=1, seed=seed).latents.tobytes() for seed in (1, 1, 2))
    assert one == same != other


def test_a_batch_takes_a_seed_for_each(pipeline: VideoPipeline) -> None:
    seeds = [video.seed for video in pipeline(["a dog", "a dog"], steps=1, seed=[5, 2])]
    assert seeds == [5, 2]


def test_given_latents_are_the_noise(pipeline: VideoPipeline) -> None:
    noise = np.random.default_rng(9).standard_normal(SHAPE, dtype=np.float32)
    drawn, given = pipeline("a dog", steps=2, seed=9), pipeline("a dog", steps=2, latents=noise)
    assert drawn.latents.tobytes() == given.latents.tobytes()


@pytest.mark.parametrize("kind", ["with a batch axis", "read-only", "Fortran order", "strided"])
def test_latents_may_lie_in_memory_as_they_like(pipeline: VideoPipeline, kind: str) -> None:
    noise = draw(*SHAPE)
    laid: dict[str, Any] = {"with a batch axis": noise[None], "read-only": noise.copy()}
    laid["read-only"].flags.writeable = False
    laid["Fortran order"] = np.asfortranarray(noise)
    laid["strided"] = np.repeat(noise, 2, -1)[..., ::2]
    expected, got = (pipeline("a dog", steps=2, latents=latents) for latents in (noise, laid[kind]))
    assert got.latents.tobytes() == expected.latents.tobytes()


def test_latents_may_be_a_torch_tensor(pipeline: VideoPipeline) -> None:
    import torch

    noise = draw(*SHAPE)
    expected, got = (pipeline("a dog", steps=2, latents=latents) for latents in (noise, torch.from_numpy(noise)))
    assert got.latents.tobytes() == expected.latents.tobytes()


def test_latents_are_left_as_they_are(pipeline: VideoPipeline) -> None:
    noise = draw(*SHAPE)
    before = noise.copy()
    pipeline("a dog", steps=3, latents=noise)
    assert noise.tobytes() == before.tobytes()


def test_frames_decoded_a_few_at_a_time_are_the_same(pipeline: VideoPipeline, bundle: Path, tmp_path: Path) -> None:
    def two_at_a_time(manifest: Json) -> None:
        manifest["decoder"][0]["chunks"] = [2, 1]

    other, _ = watched_pipeline(edit_manifest(copy_bundle(bundle, tmp_path / "copied"), two_at_a_time))
    expected, got = (p("a dog", steps=2).frames for p in (pipeline, other))
    assert got.tobytes() == expected.tobytes()


INVALID: dict[str, dict[str, Any]] = {
    "an endless prompt": {"prompt": ["a dog", "a." * 10**5]},
    "an endless negative prompt": {"negative_prompt": "a." * 10**5, "guidance": 4.0},
    "guidance beyond fp64": {"guidance": 10**400},
    "seeds without end": {"seed": itertools.count()},
    "no prompt": {"prompt": ""},
    "a blank prompt": {"prompt": "  "},
    "no prompts": {"prompt": []},
    "one prompt of several is empty": {"prompt": ["a dog", ""]},
    "a prompt that is no text": {"prompt": [1]},
    "a prompt that is nothing": {"prompt": None},
    "more prompts than a batch": {"prompt": ["a dog"] * 5},
    "no steps": {"steps": 0},
    "101 steps": {"steps": 101},
    "negative steps": {"steps": -1},
    "half a step": {"steps": 2.5},
    "guidance nan": {"guidance": float("nan")},
    "guidance inf": {"guidance": float("inf")},
    "guidance below one": {"guidance": 0.5},
    "guidance beyond fp32": {"guidance": 1e39},
    "guidance that is no number": {"guidance": "high"},
    "a negative seed": {"seed": -1},
    "half a seed": {"seed": 1.5},
    "too few seeds": {"prompt": ["a dog", "a dog"], "seed": [1]},
    "latents of another shape": {"latents": draw(4, 3, 8, 9)},
    "latents for two": {"latents": draw(2, *SHAPE)},
    "latents in double precision": {"latents": draw(*SHAPE).astype(np.float64)},
    "latents of the other byte order": {"latents": draw(*SHAPE).astype(">f4")},
    "latents of text": {"latents": np.full(SHAPE, "x")},
    "latents of objects": {"latents": np.full(SHAPE, None)},
    "latents as lists": {"latents": draw(*SHAPE).tolist()},
    "latents nan": {"latents": np.full(SHAPE, np.nan, np.float32)},
    "latents inf": {"latents": np.full(SHAPE, np.inf, np.float32)},
    "a negative prompt that is no text": {"negative_prompt": 3, "guidance": 4.0},
    "a policy by name": {"policy": "foresight"},
    "a policy's class": {"policy": foresight.NoReuse},
    "a prompt of bytes": {"prompt": b"a dog"},
    "prompts in no order": {"prompt": {"a dog", "a cat"}},
    "an on_step that cannot be called": {"on_step": 3},
    "a cancel token that is none": {"cancel": True},
}


@pytest.mark.parametrize("case", INVALID)
def test_what_makes_no_sense_is_refused_before_anything_runs(bundle: Path, case: str) -> None:
    pipeline, backend = watched_pipeline(bundle)
    ran: list[str] = []
    backend.before = lambda part, tensors: ran.append(part)
    settings: dict[str, Any] = {"prompt": "a dog", "steps": 2} | INVALID[case]
    with pytest.raises(InvalidRequest, match=r"^\w+: got "):
        pipeline(settings.pop("prompt"), **settings)
    assert not ran


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": "2"}, "threads: got '2', expected a whole number"),
        ({"threads": 0}, "threads: got 0"),
        ({"cache_memory": "1"}, "cache_memory: got '1'"),
        ({"cache_memory": 0.5}, "cache_memory: got 0.5"),
        ({"bundle": None}, "bundle: got None, expected the path of a folder"),
    ],
)
def test_a_pipeline_is_not_loaded_with_settings_that_make_no_sense(
    bundle: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        foresight.load(**({"bundle": bundle} | settings))


def test_a_result_that_is_not_finite_is_an_error_that_says_where_it_began(bundle: Path, tmp_path: Path) -> None:
    copied = copy_bundle(bundle, tmp_path / "bundle")
    weights = copied / "block.002.data"
    weights.write_bytes(b"\xff" * weights.stat().st_size)  # NaN
    pipeline = foresight.load(vouch_for(copied, weights.name))
    with pytest.raises(EngineError, match=r"not finite after 4 steps, first seen in step 2, block\.000; lower the"):
        pipeline("a dog", steps=4, policy=foresight.NoReuse())
    with pytest.raises(EngineError, match=r"not finite after 8 steps, first seen in step 4; lower the guidance"):
        pipeline("a dog", steps=8, policy=foresight.Forecast())


def test_a_seed_may_be_a_numpy_integer(pipeline: VideoPipeline) -> None:
    one, other = (pipeline("a dog", steps=1, seed=seed).latents.tobytes() for seed in (3, np.int64(3)))
    assert one == other


def test_over_long_prompts_are_listed(pipeline: VideoPipeline) -> None:
    long = " ".join(["dog"] * 200)
    assert pipeline(["a dog", long], steps=1)[0].trace.truncated_prompts == (long,)


def test_the_cache_of_a_request_is_the_manifests_and_two_buffers(pipeline: VideoPipeline) -> None:
    trace = pipeline("a dog", steps=1, guidance=4, policy=foresight.NoReuse()).trace
    blocks = len(pipeline.manifest.blocks)
    assert trace.cache_bytes == pipeline.manifest.cache_bytes(2) * (blocks + 2) // blocks


def test_a_trace_names_what_it_came_from(pipeline: VideoPipeline, bundle: Path) -> None:
    trace = pipeline("a dog", steps=1, seed=4, guidance=1).trace
    opened = open_bundle(bundle)
    assert (trace.model, trace.bundle) == (opened.manifest.model, opened.id)
    assert trace.blocks == tuple(block.name for block in opened.manifest.blocks)
    assert (trace.prompts, trace.seeds, trace.guidances) == (("a dog",), (4,), (1.0,))
    assert trace.backend == pipeline.backend.describe()


PROGRAM = """
import json, sys
import foresight
imported = [name for name in sys.modules if "." not in name]
video = foresight.load(sys.argv[1])("a red circle", steps=4, policy=foresight.Foresight(gamma=2, warmup=2))
video.save(sys.argv[2])
loaded = [name for name in ("torch", "diffusers", "transformers", "onnx", "accelerate") if name in sys.modules]
heavy = [name for name in ("numpy", "onnxruntime", "torch", "click") if name in imported]
print(json.dumps({"loaded": loaded, "heavy": heavy, "shape": video.frames.shape}))
"""


def test_a_video_is_made_without_torch_and_importing_the_package_loads_nothing(bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(bundle), str(tmp_path / "video.mp4")],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout) == {"loaded": [], "heavy": [], "shape": [3, 16, 16, 3]}


def test_everything_public_can_be_imported() -> None:
    assert all(getattr(foresight, name) is not None for name in foresight.__all__)
    assert sorted(foresight.__all__) == foresight.__all__ == dir(foresight)


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = foresight.torch


def test_a_summary_has_the_totals_and_no_steps(pipeline: VideoPipeline) -> None:
    full, summary = (
        pipeline.generate(VideoRequest("a dog", steps=12, policy=Static(), trace=kind))[0].trace
        for kind in ("full", "summary")
    )
    assert not summary.steps and len(full.steps) == 12
    for name in ("computed", "reused", "dead", "forecast", "possible"):
        assert getattr(summary, f"blocks_{name}") == getattr(full, f"blocks_{name}")
    assert summary.share_skipped == full.share_skipped > 0 and json.dumps(summary.to_dict())
    assert pipeline.check(VideoRequest("a dog", steps=12, policy=Static())).seconds


def test_what_is_recorded_is_named(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match="trace: got 'none', expected full or summary"):
        pipeline.generate(VideoRequest("a dog", trace="none"))  # type: ignore[arg-type]
