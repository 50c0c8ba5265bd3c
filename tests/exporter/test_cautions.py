"""Sizes that a checkpoint was not trained on can be exported, but not without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.bundle import open_bundle
from foresight.exporter.export import Export, ExportRequest
from tests.support import Outcome
from zoo import open_sora

TRAINED: dict[str, dict[str, Any]] = {
    "latte-demo": {},
    "cogvideox-demo": {"frames": 9, "height": 32, "width": 32},
    "open-sora-demo": {"frames": 17},
    "wan-demo": {"frames": 9, "height": 32, "width": 32},
}


@pytest.mark.parametrize("model", TRAINED)
def test_sizes_that_the_checkpoint_was_trained_on_need_no_caution(model: str) -> None:
    assert Export(model, ExportRequest(**TRAINED[model])).plan().cautions == ()


@pytest.mark.parametrize(
    ("model", "sizes", "named"),
    [
        ("latte-demo", {"height": 64}, ["height: 64, the checkpoint was trained on 32"]),
        ("cogvideox-demo", {"frames": 17}, ["frames: 17, the checkpoint was trained on 9"]),
        ("open-sora-demo", {"frames": 34}, ["frames: 34, the checkpoint was trained on 17"]),
        ("open-sora-demo", {"height": 64, "width": 48}, ["height: 64, ", "width: 48, "]),
        ("wan-demo", {"frames": 17}, ["frames: 17, the checkpoint was trained on 9"]),
    ],
)
def test_others_are_named_beside_what_it_was_trained_on(model: str, sizes: dict[str, Any], named: list[str]) -> None:
    cautions = Export(model, ExportRequest(**sizes)).plan().cautions
    assert len(cautions) == len(named)
    assert all(caution.startswith(start) for caution, start in zip(cautions, named, strict=True))


def test_open_sora_trained_on_many_sizes_warns_of_none_of_its_tables(tmp_path: Path) -> None:
    checkpoint = open_sora.write_random(tmp_path / "many", input_size=None)

    def cautions(**sizes: Any) -> tuple[str, ...]:
        return Export("open-sora", ExportRequest(**sizes), str(checkpoint)).plan().cautions

    assert cautions(resolution="144p", aspect="1:1", duration="2s") == ()
    between = cautions(height=200, width=200, frames=34)
    assert [caution.split(" is in no table")[0] for caution in between] == [
        "resolution: 200 x 200",
        "duration: 34 frames",
    ]


def test_the_bundle_keeps_them_and_commands_tell(
    open_sora_bundle: Path, open_sora_checkpoint: Path, foresight_cli: Callable[..., Outcome]
) -> None:
    kept = open_bundle(open_sora_bundle).manifest.cautions
    assert kept
    planned = foresight_cli(
        "export", "--model", "open-sora", "--checkpoint", open_sora_checkpoint, "--frames", 34, "--dry-run"
    )
    for outcome in (planned, foresight_cli("inspect", open_sora_bundle)):
        assert [line.removeprefix("caution: ") for line in outcome.out.splitlines() if "caution" in line] == [*kept]
