"""export: what is planned, refused and found up to date."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from foresight.engines.bundle import open_bundle
from tests.commands.support import Cli, assert_refused, document
from tests.support import copy_bundle


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


def test_export_refuses_a_backend_that_compiles_nothing_before_it_begins(foresight_cli: Cli, tmp_path: Path) -> None:
    flags = ["--model", "latte-demo", "--backend", "onnxruntime", "--output", tmp_path / "never"]
    assert_refused(foresight_cli("export", *flags), 2, "expected one that compiles")
    assert not (tmp_path / "never").exists()


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


def test_an_export_tells_of_its_profiles(foresight_cli: Cli, checkpoint: Path, bundle: Path, demo_bundle: Path) -> None:
    published = foresight_cli("export", "--model", "latte", "--checkpoint", checkpoint, "--output", bundle)
    assert "profiles: none tuned for this model and these sizes; foresight tune makes some" in published.out
    demo = foresight_cli("export", "--model", "latte-demo", "--output", demo_bundle)
    assert re.search(r"^profile \w+, 50 steps: (forecast|schedule):.* pairs held out\)$", demo.out, re.MULTILINE)


INVALID_EXPORTS: dict[str, tuple[list[str], int, str]] = {
    "unknown model": (["--model", "sora"], 2, "model: got 'sora', expected one of"),
    "no model": ([], 2, "--model"),
    "unknown dtype": (["--model", "latte", "--dtype", "fp8"], 2, "dtype: got 'fp8'"),
    "height that does not fit": (["--model", "latte", "--height", "10"], 2, "height: got 10"),
    "frames that do not fit": (["--model", "latte", "--frames", "2"], 2, "frames: got 2"),
    "negative width": (["--model", "latte", "--width", "-8"], 2, "width: got -8"),
    "no batch": (["--model", "latte", "--max-batch", "0"], 2, "--max-batch: got 0"),
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
