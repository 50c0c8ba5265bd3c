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
from zoo import wan


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


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("scheduler/scheduler_config.json", '{"clip_sample": true}', "scheduler DDIMScheduler: "),
        ("tokenizer/tokenizer.json", "{}", "its tokenizer cannot be read"),
    ],
)
def test_a_dry_run_refuses_a_scheduler_or_tokenizer_that_an_export_would(
    foresight_cli: Cli, checkpoint: Path, tmp_path: Path, file: str, content: str, match: str
) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (copied / file).write_text(content)
    refused = foresight_cli("export", "--model", "latte", "--checkpoint", copied, "--output", "x", "--dry-run")
    assert refused.code == 1 and match in refused.err


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


def test_the_decoders_dtype_and_the_flow_shift_reach_it_and_are_told(foresight_cli: Cli, tmp_path: Path) -> None:
    checkpoint = wan.write_random(tmp_path / "wan", layers=1)
    sizes = ["--height", 16, "--width", 16, "--frames", 1, "--dry-run"]
    arguments = ["export", "--model", "wan-1.3b", "--checkpoint", checkpoint, *sizes, "--dtype", "bf16"]
    flags = ["--vae-dtype", "fp32", "--flow-shift", 5]
    plan = document(foresight_cli(*arguments, *flags, "--json"))
    assert (plan["dtype"], plan["vae_dtype"], plan["flow_shift"]["value"]) == ("bf16", "fp32", 5)
    told = foresight_cli(*arguments, *flags).out
    assert "bf16, decoder fp32, opset" in told
    assert "flow shift: 5, as asked for; the checkpoint has 3; --flow-shift sets another" in told
    without = foresight_cli(*arguments).out
    assert "bf16, opset" in without and "flow shift: 3, as the checkpoint has it" in without


def test_a_flow_shift_is_refused_where_the_scheduler_has_none(foresight_cli: Cli, checkpoint: Path) -> None:
    flags = ["--model", "latte", "--checkpoint", checkpoint, "--dry-run"]
    assert_refused(foresight_cli("export", *flags, "--flow-shift", 5), 2, "flow-shift: got 5, but the scheduler of")
    assert_refused(foresight_cli("export", *flags, "--flow-shift", 0), 2, "expected a number above 0")
    assert_refused(foresight_cli("export", *flags, "--vae-dtype", "int8"), 2, "expected fp32, fp16 or bf16")


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
