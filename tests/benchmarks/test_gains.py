"""Settings are chosen on one half of the pairs and reported on the other."""

from __future__ import annotations

from typing import Any

from benchmarks.gains import Gain, at_quality, at_share


def row(setting: str, skipped: float, pooled: float, mean: float, worst: float) -> dict[str, Any]:
    return {
        "setting": setting,
        "skipped_percent": skipped,
        "pooled_psnr_db": pooled,
        "mean_psnr_db": mean,
        "worst_psnr_db": worst,
    }


CONDITION = {
    "tuning": [
        row("foresight N1R2", 30.0, 50.0, 52.0, 45.0),
        row("foresight N2R3", 45.0, 42.0, 44.0, 38.0),
        row("forecast 0.005", 40.0, 60.0, 61.0, 55.0),
        row("forecast 0.01", 48.0, 51.0, 53.0, 45.0),
        row("forecast 0.02", 60.0, 51.0, 53.0, 44.9),
    ],
    "held-out": [
        row("foresight N1R2", 32.0, 49.0, 51.0, 44.0),
        row("foresight N2R3", 46.0, 41.0, 43.0, 36.0),
        row("forecast 0.005", 41.0, 59.0, 60.0, 54.0),
        row("forecast 0.01", 49.0, 50.0, 52.0, 43.0),
        row("forecast 0.02", 61.0, 49.0, 52.0, 44.0),
    ],
}


def test_at_equal_quality_all_three_must_be_kept_where_settings_are_chosen() -> None:
    gain = at_quality(CONDITION, "forecast")
    assert gain == Gain("forecast 0.01", 49.0, 32.0, 1.0, 1.0, -1.0)
    assert gain.times > 1.5 and not gain.keeps_quality and not gain.skips_more


def test_at_an_equal_share_the_most_exact_setting_that_skips_as_much_is_taken() -> None:
    gain = at_share(CONDITION, "forecast")
    assert gain == Gain("forecast 0.01", 49.0, 46.0, 9.0, 9.0, 7.0)
    assert not gain.is_closer
    assert Gain("other", 46.0, 46.0, 9.0, 8.0, 8.0).is_closer
    assert not Gain("other", 45.9, 46.0, 9.0, 9.0, 9.0).is_closer, "it skips less"


def test_a_policy_without_such_a_setting_gains_nothing() -> None:
    assert at_quality(CONDITION, "schedule") is None and at_share(CONDITION, "schedule") is None
