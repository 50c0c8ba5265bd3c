"""What embedding costs: time to import, time until the first step can run, and the peak memory of a whole run.

Each figure is of a fresh process. "Ready" is the time from the start of the interpreter to the return of
`foresight.load`, so it contains imports, verification and the loading of every engine.

    python -m benchmarks.startup --bundle bundles/latte-demo --save
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import finish, median, table

CODE = """
import sys, time, json, resource
started = time.perf_counter()
import foresight
imported = time.perf_counter() - started
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
pipeline = foresight.load(sys.argv[1])
ready = time.time()
video = pipeline(pipeline.manifest.defaults.prompt)
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"import_ms": 1e3 * imported, "ready": ready, "peak_bytes": peak}))
"""


def fresh(bundle: Path) -> dict[str, Any]:
    """One process: import, load, run the sample prompt."""
    started = time.time()
    done = subprocess.run([sys.executable, "-c", CODE, str(bundle)], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return {"import_ms": result["import_ms"], "ready_ms": 1e3 * (result["ready"] - started), **_mib(result)}


def _mib(result: dict[str, Any]) -> dict[str, float]:
    return {"peak_mib": result["peak_bytes"] / 2**20}


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/latte-demo"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/startup.json")
    options = parser.parse_args()
    fresh(options.bundle)
    runs = [fresh(options.bundle) for _ in range(options.rounds)]
    row = {name: median(run[name] for run in runs) for name in runs[0]}
    print(table([tuple(row.values())], tuple(row)))
    finish("startup", row, options.save)


if __name__ == "__main__":
    main()
