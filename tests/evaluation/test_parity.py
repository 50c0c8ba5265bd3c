"""Comparing two backends: every part, on inputs that a video really has, and what is wrong shows where it is."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polygraphy.logger import G_LOGGER

from foresight.engines.arrays import Array
from foresight.engines.backend import Engine
from foresight.engines.bundle import Bundle, open_bundle
from foresight.engines.errors import EngineError, InvalidRequest
from foresight.engines.manifest import Part
from foresight.engines.onnxruntime import OnnxRuntimeBackend
from foresight.engines.reference import ReferenceBackend
from foresight.evaluation.parity import TOLERANCES, Difference, compare_backends
from foresight.exporter.export import Export, ExportRequest
from tests.support import BackendInFront, WatchedBackend, copy_bundle, fail_at

ALTERED = "block.002"


@dataclass
class Altered(BackendInFront):
    """A real backend that loads from another bundle, or whose engines' outputs are altered."""

    bundle: Bundle | None = None
    after: Callable[[Part, Mapping[str, Array]], object] = lambda part, tensors: None

    def load(self, bundle: Bundle, part: Part) -> Engine:
        return AlteredEngine(self.backend.load(self.bundle or bundle, part), part, self.after)


@dataclass
class AlteredEngine:
    engine: Engine
    part: Part
    after: Callable[[Part, Mapping[str, Array]], object]

    def run(self, tensors: Mapping[str, Array]) -> None:
        self.engine.run(tensors)
        self.after(self.part, tensors)


def compare(bundle: Path, second: Any = None, first: Any = None, **settings: Any) -> list[Difference]:
    return compare_backends(
        open_bundle(bundle), first or OnnxRuntimeBackend(), second or ReferenceBackend(), **settings
    )


def put(value: float, *parts: str) -> Callable[[Part, Mapping[str, Array]], None]:
    """Write `value` over one number of the first output of these parts."""

    def after(part: Part, tensors: Mapping[str, Array]) -> None:
        if part.name in parts:
            tensors[part.outputs[0].name].flat[3] = value

    return after


@pytest.fixture(scope="module")
def differences(bundle: Path) -> list[Difference]:
    return compare(bundle)


def test_every_part_is_compared_once(differences: list[Difference], bundle: Path) -> None:
    parts = open_bundle(bundle).manifest.parts
    assert {(found.part, found.kind) for found in differences} == {(part.name, part.kind) for part in parts}
    assert len(differences) == len(parts)


def test_two_right_backends_are_within_tolerance(differences: list[Difference]) -> None:
    assert all(found.within for found in differences)
    assert any(found.max_abs > 0 for found in differences)


def test_the_worst_comes_first(differences: list[Difference]) -> None:
    severity = [found.relative / found.tolerance for found in differences]
    assert severity == sorted(severity, reverse=True)


def test_the_numbers_fit_together(differences: list[Difference], bundle: Path) -> None:
    parts = {part.name: part for part in open_bundle(bundle).manifest.parts}
    for found in differences:
        assert found.output in {spec.name for spec in parts[found.part].outputs}
        assert 0 <= found.mean_abs <= found.max_abs <= found.scale
        assert found.relative == found.max_abs / found.scale
        assert found.within == (found.relative <= found.tolerance)
    assert {found.scale for found in differences if found.output == "frames"} <= {255.0}
    assert {found.tolerance for found in differences if found.output != "frames"} == {TOLERANCES["fp32"]}


def test_what_onnx_runtime_optimises_is_within_tolerance(bundle: Path) -> None:
    assert all(found.within for found in compare(bundle, OnnxRuntimeBackend(optimize=False)))


def test_16_bits_are_within_their_tolerance_and_not_within_that_of_32(half_bundle: Path) -> None:
    differences = compare(half_bundle)
    assert all(found.within for found in differences)
    assert not all(found.within for found in compare(half_bundle, tolerance=TOLERANCES["fp32"]))


@pytest.mark.slow
def test_bf16_is_compared_too(single_checkpoint: Path, bundles: Path) -> None:
    request = ExportRequest(dtype="bf16", max_batch=1)
    bundle = Export("latte", request, str(single_checkpoint), bundles / "single-bf16").run()
    second = Altered(ReferenceBackend(), after=put(1e4, "block.001"))
    found = compare_backends(bundle, ReferenceBackend(), second)
    assert [(f.part, f.within) for f in found if f.relative > 0] == [("block.001", False)]


def test_other_weights_on_one_side_show_where_they_are(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(bundle, tmp_path / "copy")
    data = copy / f"{ALTERED}.data"
    (np.fromfile(data, np.float32) * np.float32(1.01)).tofile(data)
    worst, *others = compare(bundle, Altered(OnnxRuntimeBackend(), open_bundle(copy)))
    assert worst.part == ALTERED and not worst.within
    assert all(found.within for found in others)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True], ids=["on one side", "on both sides"])
def test_what_is_not_finite_is_never_within(bundle: Path, value: float, both: bool) -> None:
    broken, whole = (Altered(OnnxRuntimeBackend(), after=put(v, "epilogue")) for v in (value, 0.0))
    (found,) = compare(bundle, broken, broken if both else whole, parts=["epilogue"])
    assert not found.within
    assert found.max_abs == found.mean_abs == found.relative == math.inf and math.isfinite(found.scale)


def test_where_values_cease_to_be_finite_comes_first(bundle: Path) -> None:
    broken = Altered(OnnxRuntimeBackend(), after=put(math.nan, ALTERED))
    differences = compare(bundle, first=broken)
    names = [part.name for part in open_bundle(bundle).manifest.parts]
    index = names.index(ALTERED)
    after = [found.part for found in differences if found.relative == math.inf]
    assert after[: len(names) - index - 1] == names[index:-1]  # the step in which it happened
    assert set(after) == set(names) - {"text_encoder", "condition"}  # and the one after that, and the frames


def test_an_output_of_zeros_equals_itself_and_nothing_else(bundle: Path) -> None:
    def zero(part: Part, tensors: Mapping[str, Array]) -> None:
        tensors[part.outputs[0].name][:] = 0

    same = compare(bundle, Altered(OnnxRuntimeBackend(), after=zero), Altered(OnnxRuntimeBackend(), after=zero))
    assert all(found.within for found in same)
    other = compare(bundle, Altered(OnnxRuntimeBackend(), after=zero), OnnxRuntimeBackend())
    assert {found.relative for found in other if found.scale == 0} == {math.inf}
    assert not any(found.within for found in other)


def test_steps_are_compared_in_the_last_one_and_the_second_backend_runs_every_part_once(bundle: Path) -> None:
    seen: list[tuple[str, str, float]] = []

    def tell(side: str) -> Callable[[str, Mapping[str, Array]], None]:
        return lambda part, tensors: seen.append((side, part, float(tensors.get("timestep", np.zeros(1))[0])))

    sides = {side: WatchedBackend(OnnxRuntimeBackend(), tell(side)) for side in ("first", "second")}
    compare(bundle, sides["second"], sides["first"], steps=4)
    parts = [part.name for part in open_bundle(bundle).manifest.parts]
    assert Counter(part for side, part, _ in seen if side == "second") == Counter(parts)
    timesteps = [time for side, part, time in seen if side == "first" and part == "prologue"]
    assert len(timesteps) == 5 and len(set(timesteps)) == 4
    assert [time for side, part, time in seen if side == "second" and part == "prologue"] == [timesteps[-1]]


def test_the_second_backend_holds_one_engine_at_a_time(bundle: Path) -> None:
    alive = []
    second = WatchedBackend(OnnxRuntimeBackend(), lambda part, tensors: alive.append(len(second.alive)))
    compare(bundle, second)
    assert set(alive) == {1}
    assert not second.alive


def test_only_the_parts_asked_for_are_compared(bundle: Path) -> None:
    told: list[tuple[int, int, str]] = []
    found = compare(
        bundle, parts=["epilogue", ALTERED], progress=lambda done, total, name: told.append((done, total, name))
    )
    assert {difference.part for difference in found} == {"epilogue", ALTERED}
    assert told == [(0, 2, ALTERED), (1, 2, "epilogue"), (2, 2, "done")]


def test_the_tolerance_can_be_chosen(bundle: Path) -> None:
    (found,) = compare(bundle, parts=["block.000"], tolerance=1e-9)
    assert found.tolerance == 1e-9 and not found.within


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ["block.999"]}, r"parts: got 'block\.999', expected .*block\.000"),
        ({"parts": []}, "parts: got"),
        ({"tolerance": 0.0}, "tolerance: got 0"),
        ({"tolerance": math.nan}, "tolerance: got nan"),
        ({"steps": 0}, "steps: got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(bundle: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        compare(bundle, **settings)


def test_polygraphy_is_silent_and_then_as_loud_as_before(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = G_LOGGER.module_severity.get()
    capfd.readouterr()
    compare(bundle, Altered(OnnxRuntimeBackend(), after=put(math.nan, "condition")), parts=["condition", "block.000"])
    assert capfd.readouterr() == ("", "")
    assert G_LOGGER.module_severity.get() == before != G_LOGGER.CRITICAL


def test_an_engine_that_fails_is_an_error_of_its_part(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    second = WatchedBackend(OnnxRuntimeBackend(), fail_at(0, lambda part: part == ALTERED))
    with pytest.raises(EngineError, match=f"{ALTERED}: injected fault"):
        compare(bundle, second)
    assert capfd.readouterr() == ("", "")


def test_without_polygraphy_the_error_says_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("polygraphy", "polygraphy.comparator"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match='^parity: polygraphy is not installed .*pip install "polygraphy'):
        compare(bundle)
