"""What pages say of rules follows from the rows."""

from __future__ import annotations

from typing import Any

from benchmarks.quality_tables import rules_verdict


def rule(name: str, value: str, skipped: float, mean: float, worst: float) -> dict[str, Any]:
    figures = {"skipped_percent": skipped, "pooled_psnr_db": mean, "mean_psnr_db": mean, "worst_psnr_db": worst}
    return {"rule": name, "value": value, "share": 0.4, "constant": 1, **figures}


OWN = [rule("forecast", "extrapolated", 40.2, 60.0, 52.0), rule("schedule", "extrapolated", 40.0, 59.0, 53.0)]


def test_a_rule_is_ahead_where_it_beats_both_policies_in_both_and_skips_no_less() -> None:
    result = {
        "model": "latte",
        "rows": [
            *OWN,
            rule("A", "held", 40.0, 61.0, 54.0),
            rule("B", "held", 40.0, 61.0, 52.5),
            rule("C", "held", 38.0, 70.0, 70.0),
            {**rule("D", "held", 45.0, 70.0, 70.0), "share": None},
        ],
    }
    nothing = {"model": "cogvideox", "rows": [*OWN, rule("A", "held", 40.0, 50.0, 40.0)]}
    assert rules_verdict(result, nothing).splitlines() == [
        "- A, held: 1 of 2 (Latte at 40 %)",
        "- at no share of any model: B, held; C, held",
    ]
