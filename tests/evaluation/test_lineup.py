"""Who takes part in a benchmark, and why others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import InvalidRequest
from foresight.engines.profiles import write_profiles
from foresight.evaluation.evaluate import Pair, ladder
from foresight.evaluation.lineup import BenchRequest, names, noise_of, run_bench
from foresight.evaluation.peers import PEERS
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import POLICIES, NoReuse, Static
from foresight.runtime.policies.notation import text_of
from foresight.runtime.request import VideoRequest
from tests.support import copy_bundle, load_pipeline, profile_of

PAIRS = [Pair("a dog", 0)]


def document_of(pipeline: VideoPipeline, checkpoint: Path | None, *only: str) -> dict[str, Any]:
    place = None if checkpoint is None else str(checkpoint)
    return run_bench(pipeline, BenchRequest(PAIRS, place, steps=3, only=only))


def test_policies_take_part_in_the_settings_that_an_evaluation_tries(pipeline: VideoPipeline) -> None:
    document = document_of(pipeline, None, *POLICIES)
    tried, notes = ladder(pipeline, VideoRequest("a dog", steps=3))
    assert [row["name"] for row in document["rows"]] == [NoReuse.name, *map(text_of, tried)]
    assert document["notes"] == notes


def test_a_policy_alone_is_held_against_no_reuse_and_needs_no_peers(pipeline: VideoPipeline) -> None:
    document = document_of(pipeline, None, Static.name)
    assert document["rows"][0]["name"] == NoReuse.name
    assert {row["reference"] for row in document["rows"]} == {NoReuse.name}
    assert document["unavailable"] == [] and document["agreements"] == []
    assert document["threads"] == int(pipeline.backend.describe()["threads"])


def test_profiles_and_policies_of_ones_own_take_part_once(bundle: Path, tmp_path: Path) -> None:
    copied = copy_bundle(bundle, tmp_path / "copied")
    profiles = [profile_of("fast", policy="static", settings={"warmup": 2}, steps=steps) for steps in (3, 4)]
    write_profiles(open_bundle(copied), [*profiles, profile_of("other", policy="static", settings={}, steps=4)])
    own = Static(warmup=2), Static(warmup=3)
    document = run_bench(load_pipeline(copied), BenchRequest(PAIRS, None, steps=3, only=(Static.name,), own=own))
    assert [row["name"] for row in document["rows"]] == ["none", "static", "static:warmup=2", "static:warmup=3"]


def test_a_policy_spares_the_blocks_that_it_skips(pipeline: VideoPipeline) -> None:
    request = BenchRequest(PAIRS, None, steps=4, only=(Static.name,), own=(Static(warmup=2),))
    saved = {row["name"]: row["block_work_saved"] for row in run_bench(pipeline, request)["rows"]}
    assert saved == {"none": 0, "static": pytest.approx(0.25), "static:warmup=2": pytest.approx(0.25)}


def test_a_peer_brings_its_reference_along(pipeline: VideoPipeline, checkpoint: Path) -> None:
    document = document_of(pipeline, checkpoint, "pab")
    assert [row["name"] for row in document["rows"]] == ["none", "diffusers", "pab:skip=2"]
    (agreement,) = document["agreements"]
    assert agreement["worst_psnr_db"] is None or agreement["worst_psnr_db"] > 50
    assert {"torch", "diffusers"} <= document["machine"]["versions"].keys()


def test_what_takes_long_is_asked_for(pipeline: VideoPipeline) -> None:
    optional = {peer.name for peer in PEERS.values() if peer.optional}
    run = {row["name"] for row in run_bench(pipeline, BenchRequest(PAIRS, None, steps=2))["unavailable"]}
    assert optional and run == set(PEERS) - optional


def test_without_a_checkpoint_every_peer_is_listed_with_the_reason(pipeline: VideoPipeline) -> None:
    document = document_of(pipeline, None, Static.name, "pab")
    reasons = {row["name"]: row["reason"] for row in document["unavailable"]}
    told = f"checkpoint: only its name is known, {pipeline.manifest.source.checkpoint}; name where it lies"
    assert reasons == {"diffusers": told, "pab": told}


def test_names_that_are_not_known_are_refused_with_those_that_are(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match=r"only: got 'x', expected some of diffusers, .*, static"):
        document_of(pipeline, None, "x")
    assert {"pab", "none", "forecast"} <= set(names())


def test_a_bundle_that_peers_do_not_compute_like_is_refused(half_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="bundle: got fp16 on cpu, expected fp32 on cpu"):
        document_of(load_pipeline(half_bundle), None)


def test_noise_is_that_of_a_request_with_the_seed(pipeline: VideoPipeline) -> None:
    given = pipeline("a dog", steps=2, latents=noise_of(pipeline, 5), policy=NoReuse())
    drawn = pipeline("a dog", steps=2, seed=5, policy=NoReuse())
    assert given.latents.tobytes() == drawn.latents.tobytes()
