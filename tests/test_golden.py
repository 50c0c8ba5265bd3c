"""What the demos make, byte for byte, while the house is rebuilt: manifests, final latents, frames and traces.

`python -m tests.test_golden` writes tests/golden.json anew. Other processors round differently: on one of another kind
than the record's, latents are only held to its values.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import foresight
from foresight.engines.bundle import open_bundle, verify_files
from foresight.engines.onnxruntime import OnnxRuntimeBackend
from foresight.exporter.export import Export, ExportRequest
from foresight.runtime.memory import MemoryLimits
from foresight.runtime.pipeline import VideoPipeline

RECORD = Path(__file__).parent / "golden.json"
MODELS = ("latte-demo", "cogvideox-demo", "open-sora-demo")
REQUESTS: dict[str, dict[str, Any]] = {
    "output": {"prompt": "a blue square moving up", "seed": 3, "steps": 20},
    "residual": {"prompt": "a red circle moving right", "steps": 14, "policy": foresight.Foresight(cache="residual")},
    "batch": {
        "prompt": ["a green triangle moving left", "a red circle moving right"],
        "steps": 10,
        "policy": foresight.Foresight(gamma=1.0, warmup=3, reuse_steps=2, interval=3),
    },
    "unguided": {"prompt": "a red circle moving right", "steps": 8, "guidance": 1, "policy": foresight.Static()},
    "none": {"prompt": "a red circle moving right", "steps": 4, "policy": foresight.NoReuse()},
}
OF_THE_DAY = (
    "text_ms",
    "denoise_ms",
    "decode_ms",
    "engine_ms",
    "wait_ms",
    "device_bytes",
    "backend",
    "bundle",
    "blocks_forecast",
)


def _sha256(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


def _processor() -> str:
    flags = set(Path("/proc/cpuinfo").read_text().split()) if platform.system() == "Linux" else set()
    kinds = ("avx2", "avx512f", "avx512_vnni", "amx_tile", "avx512_bf16")
    return " ".join([platform.machine(), *(kind for kind in kinds if kind in flags)])


def _manifest(bundle: Path) -> str:
    """Less what depends on the day and the processor: versions, and how far graphs are from eager."""
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes())
    del manifest["generator"]

    def without_differences(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_differences(item) for name, item in value.items() if name != "max_difference"}
        return [without_differences(item) for item in value] if isinstance(value, list) else value

    return _sha256(json.dumps(without_differences(manifest), sort_keys=True).encode())


def _made(bundle: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    opened = open_bundle(bundle)
    verify_files(opened)
    for fixed in (False, True):
        pipeline = VideoPipeline(opened, OnnxRuntimeBackend(threads=1), MemoryLimits(fixed_slots=fixed))
        for name, request in REQUESTS.items():
            answer = pipeline(**request)
            videos = answer if isinstance(answer, list) else [answer]
            trace = videos[0].trace.to_dict()
            for step in trace["steps"]:
                del step["milliseconds"]
            for field in OF_THE_DAY:
                trace.pop(field)
            latents = np.stack([video.latents for video in videos])
            made[f"{name}{' fixed' if fixed else ''}"] = {
                "latents": _sha256(latents.tobytes()),
                "frames": _sha256(b"".join(video.frames.tobytes() for video in videos)),
                "trace": _sha256(json.dumps(trace, sort_keys=True).encode()),
                "decisions": _sha256(json.dumps([step["decisions"] for step in trace["steps"]]).encode()),
                "values": np.round(latents.reshape(-1)[:: max(1, latents.size // 40)], 4).tolist(),
            }
    small = foresight.load(bundle, threads=1, cache_memory=pipeline.memory().cache // 2)
    video = small("a red circle moving right", steps=8)
    assert isinstance(video, foresight.Video)
    made["half"] = {"latents": _sha256(video.latents.tobytes()), "uncached": list(video.trace.uncached)}
    return made


@pytest.mark.parametrize("model", MODELS)
def test_the_demos_make_what_they_made(bundles: Path, model: str) -> None:
    record = json.loads(RECORD.read_text())
    bundle = Export(model, ExportRequest(), None, bundles / f"golden-{model}").run().path
    expected, made = record[model]["made"], _made(bundle)
    assert _manifest(bundle) == record[model]["manifest"]
    if record["processor"] == _processor():
        assert made == expected
    for name, request in expected.items():
        if "values" in request:
            assert made[name]["decisions"] == request["decisions"]
            np.testing.assert_allclose(made[name]["values"], request["values"], atol=2e-3)


if __name__ == "__main__":
    written: dict[str, Any] = {"processor": _processor()}
    for name in MODELS:
        folder = Path("bundles") / name
        Export(name, ExportRequest(), None, folder).run()
        written[name] = {"manifest": _manifest(folder), "made": _made(folder)}
    RECORD.write_text(json.dumps(written) + "\n")
