"""What the demos make, byte for byte: manifests, final latents, frames, and what every step decided and measured.

A change that means to change none of it has this test to show it by; one that means to writes tests/golden.json anew
with `python -m tests.test_golden` and says so. Other processors round differently, and other libraries write other
graphs: there latents are held to the record's values alone, and steps to its decisions.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import foresight
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.registry import REGISTRY

RECORD = Path(__file__).parent / "golden.json"
DEMOS = [name for name, model in REGISTRY.items() if model.comes_with_a_clone]
PROMPT = "a red circle moving right"
REQUESTS: dict[str, dict[str, Any]] = {
    "none": {"prompt": PROMPT, "steps": 4, "policy": foresight.NoReuse()},
    "output": {"prompt": "a blue square moving up", "seed": 3, "steps": 20},
    "residual": {"prompt": PROMPT, "steps": 14, "policy": foresight.Foresight(cache="residual")},
    "forecast": {"prompt": PROMPT, "steps": 16, "policy": foresight.Forecast()},
    "batch": {
        "prompt": ["a green triangle moving left", PROMPT],
        "steps": 10,
        "policy": foresight.Foresight(gamma=1.0, warmup=3, reuse_steps=2, interval=3),
    },
    "unguided": {"prompt": PROMPT, "steps": 8, "guidance": 1, "policy": foresight.Static()},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", DEMOS)
def test_the_demos_make_what_they_made(bundles: Path, model: str) -> None:
    record = json.loads(RECORD.read_text())
    bundle = Export(model, ExportRequest(), None, bundles / f"golden-{model}").run().path
    expected, found = record["models"][model], _made(bundle)
    if record["processor"] == _processor():
        assert found["requests"] == expected["requests"]
        if found["generator"] == expected["generator"]:
            assert found["manifest"] == expected["manifest"]
    for name, request in expected["requests"].items():
        assert found["requests"][name]["decisions"] == request["decisions"], name
        np.testing.assert_allclose(found["requests"][name]["values"], request["values"], atol=2e-3, err_msg=name)


def _made(bundle: Path) -> dict[str, Any]:
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes())
    generator = manifest.pop("generator")
    del generator["export_key"]
    del manifest["profiles"]  # which are tuned anew without another bundle
    with foresight.load(bundle, threads=1) as pipeline:
        requests = {name: _request(pipeline, **request) for name, request in REQUESTS.items()}
        half = pipeline.memory().cache // 2
    with foresight.load(bundle, threads=1, cache_memory=half) as pipeline:
        requests["half the room"] = _request(pipeline, prompt=PROMPT, steps=8)
    with foresight.load(bundle, threads=1, split_guidance=True) as pipeline:
        requests["split guidance"] = _request(pipeline, prompt=PROMPT, steps=8)
    return {
        "generator": generator,
        "manifest": _sha256(_document(_without(manifest, "max_difference"))),
        "requests": requests,
    }


def _request(pipeline: foresight.VideoPipeline, **request: Any) -> dict[str, Any]:
    answer = pipeline(**request)
    videos = answer if isinstance(answer, list) else [answer]
    latents = np.stack([video.latents for video in videos])
    steps = _without(videos[0].trace.to_dict()["steps"], "milliseconds")
    decisions = ["".join(decision[0] for decision in step["decisions"]) for step in steps]
    return {
        "latents": _sha256(latents.tobytes()),
        "frames": _sha256(*(video.frames.tobytes() for video in videos)),
        "steps": _sha256(_document(steps)),
        "decisions": _sha256(_document(decisions)),
        "values": [round(float(value), 4) for value in latents.reshape(-1)[:: latents.size // 8]],
    }


def _without(value: Any, name: str) -> Any:
    """A document without the fields of that name."""
    if isinstance(value, dict):
        return {key: _without(item, name) for key, item in value.items() if key != name}
    return [_without(item, name) for item in value] if isinstance(value, list) else value


def _document(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _processor() -> str:
    """What decides how sums are rounded."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if platform.system() == "Linux" else set()
    kinds = ("avx2", "avx512f", "avx512_vnni", "amx_tile", "avx512_bf16")
    return " ".join([platform.machine(), *(kind for kind in kinds if kind in flags)])


def _write(models: Iterable[str], bundle: Callable[[str], Path]) -> None:
    written = {"processor": _processor(), "models": {name: _made(bundle(name)) for name in models}}
    RECORD.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    _write(DEMOS, lambda name: Export(name, ExportRequest(), None, Path("bundles") / name).run().path)
