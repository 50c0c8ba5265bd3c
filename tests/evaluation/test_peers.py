"""Peers are switched on in a real pipeline and off again, and what they are adapted by changes nothing by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import EngineError
from foresight.evaluation.bench import Bench, Task, pairs_around
from foresight.evaluation.outcome import Row
from foresight.evaluation.peers import PEERS, Loaded, contenders_of, without_pipeline
from foresight.evaluation.peers.adapters import IN_CONTEXT, IN_ONE_LIST
from foresight.evaluation.peers.base import Adapter
from foresight.evaluation.peers.diffusers_caches import Calls
from foresight.evaluation.peers.pipeline import DiffusersPipeline
from foresight.exporter.export import Export, ExportRequest
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from zoo import FAMILIES, PUBLISHED

STEPS = 8
PROMPT = "a red circle moving right"


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def loaded_of(checkpoint: Path, bundle: Path) -> Loaded:
    manifest = open_bundle(bundle).manifest
    pipeline = DiffusersPipeline(str(checkpoint), manifest, threads=1)
    others = [Task(PROMPT, "", seed, noise(manifest.shape.latents, seed), STEPS, 2.0) for seed in (90, 91)]
    return Loaded(pipeline, STEPS, others)


@pytest.fixture(scope="module")
def two_streams(cogvideox_checkpoint: Path, cogvideox_bundle: Path) -> Loaded:
    return loaded_of(cogvideox_checkpoint, cogvideox_bundle)


@pytest.fixture(scope="module")
def two_lists(checkpoint: Path, bundle: Path) -> Loaded:
    return loaded_of(checkpoint, bundle)


@pytest.fixture(scope="module")
def two_calls(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A pipeline that calls its transformer for each half of guidance, and denoises by flow matching."""
    folder = tmp_path_factory.mktemp("two-calls")
    checkpoint = FAMILIES["wan"].write_random(folder / "checkpoint")
    request = ExportRequest(**PUBLISHED["wan-1.3b"].small_sizes)
    return loaded_of(checkpoint, Export("wan-1.3b", request, str(checkpoint), folder / "bundle").run().path)


def task_of(loaded: Loaded, seed: int = 0) -> Task:
    (other, _) = loaded.others
    return Task(PROMPT, "", seed, noise(other.latents.shape, seed), STEPS, 2.0)


def rows_of(loaded: Loaded, *names: str) -> dict[str, Row]:
    contenders, missing = contenders_of([PEERS[name] for name in ("diffusers", *names)], loaded)
    assert missing == []
    shape = loaded.others[0].latents.shape
    bench = Bench(contenders, pairs_around([PROMPT], 2), lambda seed: noise(shape, seed), STEPS, 2.0)
    outcome = bench.run()
    assert outcome.unavailable == []
    return {row.name: row for row in outcome.rows}


def test_a_forecasting_peer_changes_the_video_and_is_changed_by_an_abort(two_streams: Loaded) -> None:
    rows = rows_of(two_streams, "taylorseer")
    peer, reference = rows["taylorseer:interval=2,order=2"], rows["diffusers"]
    assert peer.kind == reference.kind == "as shipped"
    assert peer.psnr_db is not None and reference.identical == 2
    assert reference.after_abort is not None and reference.after_abort.same
    assert peer.after_abort is not None and peer.after_abort.repeats and not peer.after_abort.same


@pytest.mark.parametrize("model", ["two_lists", pytest.param("two_calls", marks=pytest.mark.slow)])
def test_work_is_counted_in_blocks_that_run_not_in_attention(model: str, request: pytest.FixtureRequest) -> None:
    rows = rows_of(request.getfixturevalue(model), "taylorseer", "pab")
    saved = {name: row.block_work_saved or 0 for name, row in rows.items()}
    assert saved.pop("taylorseer:interval=3,order=2") > saved.pop("taylorseer:interval=2,order=2") > 0
    assert saved == {"diffusers": 0, "pab:skip=2": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (model, name)
        for model in ("two_streams", "two_lists", "two_calls")
        for name in ("first-block-cache", "mag-cache", "pab", "faster-cache", "sea-cache")
        if (model, name) != ("two_calls", "faster-cache")  # which fails there in its own code
    ],
)
def test_every_cache_of_diffusers_runs(name: str, model: str, request: pytest.FixtureRequest) -> None:
    rows = rows_of(request.getfixturevalue(model), name)
    assert all(row.after_abort is not None and row.after_abort.repeats for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["two_streams", "two_lists", "two_calls"])
def test_cache_dit_runs(model: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("cache_dit")
    rows = rows_of(request.getfixturevalue(model), "cache-dit")
    assert all(row.after_abort is not None and row.after_abort.same for row in rows.values())


def test_each_half_of_guidance_has_a_state_and_steps_have_the_noise_of_their_scheduler() -> None:
    timesteps, sigmas = [900, 500, 100], [0.9, 0.5, 0.1, 0.0]
    scheduler = SimpleNamespace(
        timesteps=torch.tensor(timesteps),
        sigmas=torch.tensor(sigmas),
        alphas_cumprod=torch.linspace(1, 0, 1000),
        config=SimpleNamespace(use_flow_sigmas=True),
    )
    calls = Calls(scheduler)
    made = [calls.next(torch.tensor(timestep)) for timestep in (900, 900, 500, 500, 900, 900)]
    assert made == [("call 1", 0), ("call 2", 0), ("call 1", 1), ("call 2", 1), ("call 1", 0), ("call 2", 0)]
    assert [calls.noise(step) for step in range(3)] == pytest.approx(sigmas[:3])
    scheduler.config = SimpleNamespace()
    assert calls.noise(1) == pytest.approx(0.5, abs=1e-3)  # signal and noise have the same size there


@pytest.mark.parametrize("name", ["taylorseer", "pab"])
def test_a_peer_that_is_switched_off_leaves_the_pipeline_as_it_was(two_lists: Loaded, name: str) -> None:
    task = task_of(two_lists)
    before = two_lists.pipeline.make(task).latents.tobytes()
    (contender, *_), _ = contenders_of([PEERS[name]], two_lists)
    with contender.switched() as make:
        during = make(task).latents.tobytes()
    assert during != before
    assert two_lists.pipeline.make(task).latents.tobytes() == before


@pytest.mark.parametrize("adapter", [IN_CONTEXT, IN_ONE_LIST], ids=["context", "one list"])
def test_what_is_adapted_computes_the_same(two_lists: Loaded, adapter: Adapter) -> None:
    task = task_of(two_lists)
    before = two_lists.pipeline.make(task).latents
    with adapter.applied(two_lists.pipeline):
        during = two_lists.pipeline.make(task).latents
    np.testing.assert_allclose(during, before, atol=1e-5)
    assert two_lists.pipeline.make(task).latents.tobytes() == before.tobytes()


def test_only_what_a_pipeline_lacks_is_adapted(two_lists: Loaded, two_streams: Loaded) -> None:
    peers = [PEERS["first-block-cache"], PEERS["pab"]]
    told = {
        model: {contender.name.partition(":")[0]: contender.adapted for contender in contenders_of(peers, loaded)[0]}
        for model, loaded in (("lists", two_lists), ("streams", two_streams))
    }
    assert told["streams"] == {"first-block-cache": "", "pab": ""}
    assert told["lists"] == {"first-block-cache": f"{IN_CONTEXT.told}; {IN_ONE_LIST.told}", "pab": ""}


def test_the_uncached_pipeline_makes_what_the_runtime_makes(two_lists: Loaded, pipeline: VideoPipeline) -> None:
    task = task_of(two_lists)
    theirs = two_lists.pipeline.make(task)
    ours = pipeline(PROMPT, steps=STEPS, guidance=2.0, latents=task.latents, policy=NoReuse())
    assert theirs.frames.shape == ours.frames.shape and theirs.latents.shape == ours.latents.shape
    np.testing.assert_allclose(theirs.latents, ours.latents, atol=1e-3)
    assert theirs.cpu_ms > 0 and theirs.wall_ms > 0


def test_what_is_not_installed_is_named(two_lists: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foresight.evaluation.peers.version_of", lambda name: None if name == "cache-dit" else "1")
    found, missing = contenders_of([PEERS["cache-dit"], PEERS["diffusers"]], two_lists)
    assert [contender.name for contender in found] == ["diffusers"]
    assert [row.reason for row in missing] == ["cache-dit not installed; pip install foresight-engines[peers]"]


def test_a_checkpoint_of_no_pipeline_is_told_in_one_line(open_sora_checkpoint: Path, open_sora_bundle: Path) -> None:
    manifest = open_bundle(open_sora_bundle).manifest
    with pytest.raises(EngineError, match="has no model_index.json") as raised:
        DiffusersPipeline(str(open_sora_checkpoint), manifest, threads=1)
    rows = without_pipeline(list(PEERS.values()), str(raised.value))
    assert {row.name for row in rows} == set(PEERS) and all("\n" not in row.reason for row in rows)
