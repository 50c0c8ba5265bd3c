"""Exporting at real size: time and peak memory, and one denoising step from the bundle.

Two random checkpoints: Latte-1's own configuration (1.06 B parameters, 512 x 512 x 16) with a small text encoder, and
a small Latte with a T5 encoder of 1 B parameters, which stands for the 4.7 B of T5-v1.1-XXL. Each is made, exported
and run in processes of their own; peak memory is the kernel's count of the exporting process, file pages included.

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
from pathlib import Path
from typing import Any

from benchmarks.common import finish, table

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
CASES: dict[str, dict[str, Any]] = {"latte_1": LATTE_1, "t5_1b": T5_1B}
GIB = 2**30


def in_process(code: str) -> dict[str, Any]:
    """Run Python code that prints a JSON object, in a fresh process; adds its wall time and peak memory."""
    ending = "\nimport resource, json; print(json.dumps(out | {'peak_bytes': "
    ending += "1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + ending], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def make(folder: Path, settings: dict[str, Any]) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    in_process(
        "from pathlib import Path\nfrom zoo import latte\n"
        f"latte.write_random(Path({str(folder)!r}), **{settings!r})\nout = {{}}"
    )
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def export(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Export it through the same entry point as the command line."""
    return in_process(
        "from pathlib import Path\nfrom foresight.exporter.export import Export\n"
        f"made = Export('latte', checkpoint={str(checkpoint)!r}, output=Path({str(bundle)!r})).run().manifest\n"
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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", type=Path, help="a folder on a disk with 20 GB free  [default: a temporary one]")
    parser.add_argument("--no-step", action="store_true", help="export only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/real_size.json")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for case in options.cases:
        folder = Path(tempfile.mkdtemp(prefix="foresight-real-", dir=options.work))
        try:
            size = make(folder / "checkpoint", CASES[case])
            done = export(folder / "checkpoint", folder / "bundle")
            results[case] = {"checkpoint_bytes": size, "export": done}
            results[case]["over_checkpoint_gib"] = round((done["peak_bytes"] - size) / GIB, 2)
            if not options.no_step:
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
    finish("real_size", {"cases": results}, options.save)


if __name__ == "__main__":
    main()
