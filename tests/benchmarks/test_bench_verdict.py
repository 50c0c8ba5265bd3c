"""Which points of peers are above follows from the rows."""

from __future__ import annotations

from typing import Any

from benchmarks.bench_verdict import bench_verdict


def contender(name: str, mean: float, worst: float, speedup: float, saved: float, own: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "this project" if own else "as shipped",
        "psnr_db": mean,
        "mean_psnr_db": mean,
        "worst_psnr_db": worst,
        "cpu_speedup": {"median": speedup},
        "block_work_saved": saved,
    }


def test_a_peer_is_above_where_nothing_of_ours_is_as_good_and_as_fast() -> None:
    rows = [
        contender("forecast", 60.0, 50.0, 1.6, 0.4, own=True),
        contender("below", 59.0, 49.0, 1.5, 0.4),
        contender("worst", 59.0, 51.0, 1.5, 0.5),
        contender("faster", 40.0, 30.0, 1.7, 0.3),
        contender("bad", 34.9, 30.0, 3.0, 0.9),
        contender("torch-compile", 90.0, 90.0, 1.2, 0.0),
    ]
    assert bench_verdict({"model": "demo", "rows": rows}).splitlines() == [
        "demo: 3 points of peers have 35 dB or more; above ours:",
        "- `worst` in worst at equal speed-up: 51.0 dB, ours 50.0 dB",
        "- `worst` in mean at equal block work: 59.0 dB, we have none as fast",
        "- `worst` in worst at equal block work: 51.0 dB, we have none as fast",
        "- `faster` in mean at equal speed-up: 40.0 dB, we have none as fast",
        "- `faster` in worst at equal speed-up: 30.0 dB, we have none as fast",
    ]
