"""Exporting at real size: time and peak memory, and one denoising step from the bundle.

Three random checkpoints: Latte-1's own configuration (1.06 B parameters, 512 x 512 x 16) with a small text encoder; a
small Latte with a T5 encoder of 1 B parameters, which stands for the 4.7 B of T5-v1.1-XXL; and a small Wan with the
UMT5 encoder of the published ones, 5.7 B parameters in bf16. Each is made, exported and run in processes of their own;
peak memory is the kernel's count of the exporting process, file pages included.

    python -m benchmarks.real_size --save
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, finish, table

# maxin-cn/Latte-1: transformer/config.json; the VAE is Stable Diffusion's
LATTE_1 = {
    "heads": 16,
    "head_dim": 72,
    "pairs": 28,
    "frames": 16,
    "sample_size": 64,
    "vae": {"block_out_channels": (128, 256, 512, 512)},
}
T5_1B = {
    "text": {
        "vocab_size": 32128,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_heads": 32,
        "num_layers": 20,
    }
}
GIB = 2**30
SHARD_BYTES = GIB


@dataclass(frozen=True)
class Case:
    """A random checkpoint of a family, of these settings, to be exported by a model's name with these sizes.

    With `encoder` its text encoder is then replaced by a random one of the published configuration, in bf16.
    """

    family: str
    model: str
    settings: dict[str, Any]
    request: dict[str, Any] = field(default_factory=dict)
    encoder: bool = False

    @property
    def runs(self) -> bool:
        """Whether ONNX Runtime runs it on a CPU."""
        return self.request.get("dtype") != "bf16"


CASES = {
    "latte_1": Case("latte", "latte", LATTE_1),
    "t5_1b": Case("latte", "latte", T5_1B),
    "umt5_xxl": Case(
        "wan",
        "wan-1.3b",
        {"text": {"d_model": 4096, "num_layers": 1}},
        {"dtype": "bf16", "height": 16, "width": 32, "frames": 1, "max_batch": 1},
        encoder=True,
    ),
}


def in_process(code: str) -> dict[str, Any]:
    """Run Python code that prints a JSON object, in a fresh process; adds its wall time and peak memory."""
    ending = "\nimport resource, json; print(json.dumps(out | {'peak_bytes': "
    ending += "1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + ending], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def make(folder: Path, case: Case) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    code = f"from pathlib import Path\nfrom zoo import {case.family}\nfrom benchmarks import real_size\n"
    code += f"folder = Path({str(folder)!r})\n{case.family}.write_random(folder, **{case.settings!r})\nout = {{}}\n"
    if case.encoder:
        code += f"real_size.replace_encoder(folder / 'text_encoder', {case.model!r})\n"
    in_process(code)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def replace_encoder(folder: Path, model: str) -> None:
    """Write the text encoder of a published configuration, random, in bf16, one shard at a time."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import UMT5Config, UMT5EncoderModel

    from zoo import PUBLISHED

    config = UMT5Config(**PUBLISHED[model].files["text_encoder/config.json"])
    with init_empty_weights():
        encoder = UMT5EncoderModel(config)
    shutil.rmtree(folder)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    named = [(name, weight) for name, weight in encoder.named_parameters() if name != "encoder.embed_tokens.weight"]
    for name, weight in named:
        # as its makers begin: queries are not divided by the root of their width anywhere else
        scale = weight.shape[-1] ** -0.5 * (config.d_kv**-0.5 if ".q." in name else 1)
        drawn = torch.randn(weight.shape, generator=generator) * scale
        values = torch.ones(weight.shape) if weight.ndim == 1 else drawn
        shard[name] = values.bfloat16()
        if name == named[-1][0] or sum(2 * held.numel() for held in shard.values()) > SHARD_BYTES:
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def export(checkpoint: Path, bundle: Path, case: Case) -> dict[str, Any]:
    """Export it through the same entry point as the command line."""
    return in_process(
        "from pathlib import Path\nfrom foresight.exporter.export import Export, ExportRequest\n"
        f"request, bundle = ExportRequest(**{case.request!r}), Path({str(bundle)!r})\n"
        f"made = Export({case.model!r}, request, {str(checkpoint)!r}, bundle)\n"
        "made = made.run().manifest\n"
        "out = {'blocks': len(made.blocks), 'largest_difference': max(p.max_difference for p in made.parts[:-1])}"
    )


def one_step(bundle: Path) -> dict[str, Any]:
    """Load the bundle and run one denoising step without guidance, VAE included."""
    return in_process(
        "import time, foresight\nstarted = time.perf_counter()\n"
        f"pipeline = foresight.load({str(bundle)!r})\nloaded = time.perf_counter()\n"
        "video = pipeline('a dog in the snow', steps=1, guidance=1, policy=foresight.NoReuse())\n"
        "out = {'load_seconds': round(loaded - started, 1), 'step_seconds': video.trace.denoise_ms / 1e3,\n"
        "       'decode_seconds': video.trace.decode_ms / 1e3, 'frames': video.frames.shape,\n"
        "       'blocks_computed': video.trace.blocks_computed}"
    )


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="others keep what is recorded")
    parser.add_argument("--work", type=Path, help="a folder on a disk with 30 GB free  [default: a temporary one]")
    parser.add_argument("--no-step", action="store_true", help="export only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/real_size.json")
    options = parser.parse_args()
    recorded = json.loads((RESULTS / "real_size.json").read_text(encoding="utf-8"))["cases"]
    results: dict[str, dict[str, Any]] = {}
    for case in options.cases:
        folder = Path(tempfile.mkdtemp(prefix="foresight-real-", dir=options.work))
        try:
            size = make(folder / "checkpoint", CASES[case])
            done = export(folder / "checkpoint", folder / "bundle", CASES[case])
            results[case] = {"checkpoint_bytes": size, "export": done}
            results[case]["over_checkpoint_gib"] = round((done["peak_bytes"] - size) / GIB, 2)
            if CASES[case].runs and not options.no_step:
                results[case]["run"] = one_step(folder / "bundle")
        finally:
            shutil.rmtree(folder)
    cells = [
        (
            case,
            f"{row['checkpoint_bytes'] / GIB:.2f}",
            row["export"]["seconds"],
            f"{row['export']['peak_bytes'] / GIB:.2f}",
            row["export"]["blocks"],
            f"{row['export']['largest_difference']:.1g}",
        )
        for case, row in results.items()
    ]
    print(table(cells, ("case", "checkpoint, GiB", "export, s", "peak, GiB", "blocks", "difference")))
    finish("real_size", {"cases": recorded | results}, options.save)


if __name__ == "__main__":
    main()
