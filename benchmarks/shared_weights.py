"""What `shared_weights` spares: the memory of two processes that serve one bundle, and what a request then takes.

PSS counts a page that several processes share in parts; it is read from /proc once both have served a request.

    python -m benchmarks.shared_weights --bundle bundles/latte-demo --save
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import finish, median, table

CODE = """
import json, re, sys, time
import foresight
pipeline = foresight.load(sys.argv[1], threads=1, shared_weights=sys.argv[2] == "shared")
prompt = pipeline.manifest.defaults.prompt
pipeline(prompt, steps=2)
for line in sys.stdin:
    started = time.perf_counter()
    if line.strip() == "run":
        pipeline(prompt, steps=10, policy=foresight.NoReuse())
    rollup = open("/proc/self/smaps_rollup").read()
    pss = int(re.search(r"^Pss: +(\\d+)", rollup, re.M).group(1))
    print(json.dumps({"ms": 1e3 * (time.perf_counter() - started), "pss_mib": pss / 1024}), flush=True)
"""


def ask(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """One answer of one process."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def pair(bundle: Path, mode: str, rounds: int) -> dict[str, float]:
    """Two processes at a time: the PSS of each, and the time of a request while the other is idle."""
    command = [sys.executable, "-c", CODE, str(bundle), mode]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        runs = [ask(process, "run")["ms"] for _ in range(rounds) for process in processes]
        sizes = [ask(process, "size")["pss_mib"] for process in processes]
    finally:
        for process in processes:
            process.communicate()
    return {"pss_mib": median(sizes), "request_ms": median(runs)}


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/latte-demo"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/shared_weights.json")
    options = parser.parse_args()
    rows = {mode: pair(options.bundle, mode, options.rounds) for mode in ("own", "shared")}
    print(table([(mode, *row.values()) for mode, row in rows.items()], ("weights", "PSS, MiB", "request, ms")))
    finish("shared_weights", rows, options.save)


if __name__ == "__main__":
    main()
