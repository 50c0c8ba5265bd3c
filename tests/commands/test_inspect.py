"""inspect: what a bundle holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from foresight.engines.bundle import open_bundle
from foresight.engines.profiles import write_profiles
from tests.commands.support import Cli, document
from tests.support import copy_bundle, profile_of


def test_inspect_shows_the_manifest(foresight_cli: Cli, bundle: Path) -> None:
    shown = document(foresight_cli("inspect", bundle, "--json"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert shown["manifest"] == manifest
    assert shown["bytes"] == sum(record["bytes"] for record in manifest["files"].values())


def test_inspect_lists_every_part_for_people(foresight_cli: Cli, bundle: Path) -> None:
    outcome = foresight_cli("inspect", bundle)
    assert all(part.name in outcome.out for part in open_bundle(bundle).manifest.parts)


def test_inspect_shows_profiles(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    assert "profiles: none" in foresight_cli("inspect", bundle).out.splitlines()
    copied = copy_bundle(bundle, tmp_path / "copied")
    profile = profile_of("fast", settings={"tolerance": 0.25, "warmup": None})
    write_profiles(open_bundle(copied), [profile])
    (shown,) = document(foresight_cli("inspect", copied, "--json"))["profiles"]
    assert shown == msgspec.to_builtins(profile)
    assert (
        "profile fast, 4 steps: forecast:tolerance=0.25; 50.0 % skipped, PSNR 41.0 dB at worst, 42.2 dB pooled "
        "(2 pairs held out)" in foresight_cli("inspect", copied).out.splitlines()
    )


def test_inspect_never_loads_an_engine(bundle: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from foresight.cli import main\n"
        "try: main(['inspect', sys.argv[1], '--json'])\n"
        "finally: print([name for name in ('onnxruntime', 'torch') if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.strip() == "[]"


def test_inspect_plans_the_memory_of_a_request(foresight_cli: Cli, bundle: Path) -> None:
    plans = document(foresight_cli("inspect", bundle, "--json"))["memory_of_one_guided_prompt"]
    assert [plan["low_memory"] for plan in plans] == [False, True]
    assert plans[1]["total"] < plans[0]["total"]
    lines = foresight_cli("inspect", bundle).out.splitlines()
    assert sum(line.startswith("memory of a guided prompt, onnxruntime") for line in lines) == 2
