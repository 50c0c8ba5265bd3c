"""Tables and sentences of the pages about quality: what is gained, and rules that were tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import table
from benchmarks.gains import DECIBELS, TIMES, Gain, at_quality, at_share
from benchmarks.halves import HELD_OUT, TUNING
from foresight.exporter.registry import REGISTRY
from foresight.runtime.policies import Forecast
from zoo import FAMILIES

# of the demo models, by the names of their records, and of those for which policies were compared
DEMOS = {row.family: FAMILIES[row.family].title for row in REGISTRY.values() if row.comes_with_a_clone}
TITLES = {row.family: DEMOS[row.family] for row in REGISTRY.values() if row.tuned is not None}
POLICIES = ("forecast", "schedule")
PROFILE = "balanced"
SETTING = f"forecast {Forecast().tolerance}"  # as it comes
FIGURES = ("pooled_psnr_db", "mean_psnr_db", "worst_psnr_db")

Result = Mapping[str, Any]


def side_by_side(*results: Result) -> str:
    """The paper's method as it comes, `forecast` as it comes, and a tuned profile; what was measured held out.

    The first half of the results are those of `benchmarks.forecast_quality`, the other of `benchmarks.tuned`.
    """
    half = len(results) // 2
    rows = []
    for title, quality, tuning in zip(TITLES.values(), results[:half], results[half:], strict=True):
        of = {row["setting"]: row for row in _default(quality)[HELD_OUT]}
        for flags, row in (("none: `foresight`", of["foresight N1R2"]), (f"`--policy {POLICIES[0]}`", of[SETTING])):
            rows.append((title, flags, f"{row['skipped_percent']:.1f} %", *(row[name] for name in FIGURES)))
        (profile,) = (one for one in tuning["profiles"] if one["name"] == PROFILE and one["steps"] == _steps(quality))
        held_out = profile["held_out"]
        figures = (f"{held_out[name]:.1f}" for name in ("psnr_db", "mean_psnr_db", "worst_psnr_db"))
        rows.append((title, f"`--profile {PROFILE}`", f"{100 * held_out['share_skipped']:.1f} %", *figures))
    return table(rows, ("demo model", "flags", "block calls skipped", "PSNR pooled, dB", "mean", "worst video"))


def _steps(result: Result) -> int:
    return int(_default(result)["steps"])


def _default(result: Result) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(iter(result["conditions"].values()))
    return found


def gains_at_quality(*results: Result) -> str:
    """At the quality of N1R2, how much more is skipped."""
    rows = []
    for title, condition, of, policy in _cases(results):
        gain = at_quality(of, policy)
        told = ("none keeps it", "", "", "", "", "", "") if gain is None else _at_quality(gain)
        rows.append((title, condition, f"`{policy}`", *told))
    header = ("demo model", "condition", "policy", "setting", "N1R2 skips", "it skips", "times", "pooled, dB", "mean")
    return f"{_pairs(results)}{table(rows, (*header, 'worst'))}"


def gains_at_share(*results: Result) -> str:
    """At the share of N2R3, how much closer videos are."""
    rows = []
    for title, condition, of, policy in _cases(results):
        gain = at_share(of, policy)
        told = ("none skips as much", "", "", "", "", "") if gain is None else _at_share(gain)
        rows.append((title, condition, f"`{policy}`", *told))
    header = ("demo model", "condition", "policy", "setting", "N2R3 skips", "it skips", "pooled, dB", "mean", "worst")
    return table(rows, header)


def gains_verdict(*results: Result) -> str:
    """In how many cases the goals are reached, and where not."""
    cases = [(f"{title}, {condition}", of) for title, condition, of, policy in _cases(results) if policy == POLICIES[0]]
    more = {name: [gain for policy in POLICIES if (gain := at_quality(of, policy))] for name, of in cases}
    closer = {name: [gain for policy in POLICIES if (gain := at_share(of, policy))] for name, of in cases}
    missed_more = [name for name, gains in more.items() if not any(gain.skips_more for gain in gains)]
    missed_closer = [name for name, gains in closer.items() if not any(gain.is_closer for gain in gains)]
    reached = len(cases) - len(missed_more), len(cases) - len(missed_closer)
    return (
        f"By `forecast` or by `schedule`, of {len(cases)} conditions\n\n"
        f"- {reached[0]} have {TIMES:g} times N1R2's share at no less than its pooled, mean and worst PSNR; not:\n"
        f"  {_listed(missed_more)};\n"
        f"- {reached[1]} have {DECIBELS:g} dB more than N2R3 in mean and worst at no less than its share; not:\n"
        f"  {_listed(missed_closer)}."
    )


def _listed(missed: Sequence[str]) -> str:
    return "; ".join(missed) or "none"


def _cases(results: Sequence[Result]) -> list[tuple[str, str, Mapping[str, Any], str]]:
    return [
        (title, name, condition, policy)
        for title, result in zip(TITLES.values(), results, strict=True)
        for name, condition in result["conditions"].items()
        for policy in POLICIES
    ]


def _at_quality(gain: Gain) -> tuple[str, ...]:
    reached = f"**{gain.times:.2f}**" if gain.skips_more else f"{gain.times:.2f}"
    differences = (f"{value:+.1f}" for value in (gain.pooled_db, gain.mean_db, gain.worst_db))
    return _value(gain), f"{gain.of_percent:.1f} %", f"{gain.skipped_percent:.1f} %", reached, *differences


def _at_share(gain: Gain) -> tuple[str, ...]:
    mark = "**" if gain.is_closer else ""
    differences = (f"{gain.pooled_db:+.1f}", f"{mark}{gain.mean_db:+.1f}{mark}", f"{mark}{gain.worst_db:+.1f}{mark}")
    return _value(gain), f"{gain.of_percent:.1f} %", f"{gain.skipped_percent:.1f} %", *differences


def _value(gain: Gain) -> str:
    policy, _, value = gain.setting.partition(" ")
    return f"tolerance {value}" if policy == POLICIES[0] else f"{value} steps run"


def _pairs(results: Sequence[Result]) -> str:
    pairs = results[0]["pairs"]
    return f"{pairs[TUNING]} pairs to choose by, {pairs[HELD_OUT]} others to report.\n\n"


def steadiness(result: Result) -> str:
    """What becomes of a video whose noise is a little off."""
    rows = [
        (TITLES[row["model"]], row["median_psnr_db"], *row["worst_psnr_db"], "{}, seed {}".format(*row["worst"]))
        for row in result["rows"]
    ]
    return table(rows, ("demo model", "median, dB", "worst", "second", "third", "the worst"))


def rules(*results: Result) -> str:
    """Every rule on every demo model, a column a share."""
    shares = sorted({row["share"] for result in results for row in result["rows"] if row["share"] is not None})
    rows = []
    for result in results:
        title = TITLES[result["model"]]
        at: dict[tuple[str, str], dict[float, str]] = {}
        for row in result["rows"]:
            # what has a share of its own stands where that is nearest
            share = row["share"] or min(shares, key=lambda share: abs(100 * share - row["skipped_percent"]))
            name = row["rule"] if row["share"] else f"{row['rule']}, {row['constant']}"
            at.setdefault((name, row["value"]), {})[share] = _rule(row)
        rows += [(title, *key, *(cells.get(share, "") for share in shares)) for key, cells in at.items()]
    held_out = results[0]["pairs"][HELD_OUT]
    head = f"{held_out} pairs held out; skipped: pooled / mean / worst PSNR, dB.\n\n"
    return head + table(rows, ("demo model", "rule", "what is skipped", *(f"{100 * share:.0f} %" for share in shares)))


def _rule(row: Mapping[str, Any]) -> str:
    return f"{row['skipped_percent']:.1f} %: {' / '.join(f'{row[name]:.1f}' for name in FIGURES)}"


def rules_verdict(*results: Result) -> str:
    """Which rules are ahead of both policies, in mean and in worst, at how many of the shares and models."""
    wins: dict[str, list[str]] = {}
    compared: dict[str, int] = {}
    for result in results:
        title = TITLES[result["model"]]
        own = [row for row in result["rows"] if row["rule"] in POLICIES]
        for row in result["rows"]:
            rivals = [other for other in own if other["share"] == row["share"]]
            if row["rule"] in POLICIES or not rivals:
                continue
            name = f"{row['rule']}, {row['value']}"
            compared[name] = compared.get(name, 0) + 1
            if _is_ahead(row, rivals):
                wins.setdefault(name, []).append(f"{title} at {100 * row['share']:.0f} %")
    lines = [f"- {name}: {len(where)} of {compared[name]} ({', '.join(where)})" for name, where in wins.items()]
    none = "; ".join(name for name in compared if name not in wins)
    return "\n".join([*lines, f"- at no share of any model: {none or 'none'}"])


def _is_ahead(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> bool:
    """In mean and worst of all rivals, and skipping no less than any, but for rounding."""
    return all(
        row["skipped_percent"] >= rival["skipped_percent"] - 0.5
        and row["mean_psnr_db"] > rival["mean_psnr_db"]
        and row["worst_psnr_db"] > rival["worst_psnr_db"]
        for rival in rivals
    )
