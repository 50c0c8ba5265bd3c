"""Two backends over the same inputs, part by part: where they begin to differ, and by how much.

A whole video hardly tells: a small difference in one block grows from step to step, and may come from any of them. So
the first backend makes a video, every part of which meets real inputs, and each part is run once more on both
backends with just these. Polygraphy runs and compares them. One part is compared at a time, while its inputs are
there, and the second backend holds one engine at a time: besides what the request takes, both outputs have to fit
into the host's memory, in fp32.

Polygraphy also counts statistics that nobody asked for, quantiles among them: half a second per million values of a
part's output. For a model of real size, name the `parts` that matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engines.arrays import Array, Arrays, HostArray, numpy_dtype
from ..engines.backend import Backend, Engine
from ..engines.bundle import Bundle
from ..engines.compiled import Compiled
from ..engines.errors import EngineError, InvalidRequest, one_line
from ..engines.manifest import Manifest, Part, TensorSpec
from .pipeline import VideoPipeline
from .policies import NoReuse

TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
GREY_LEVELS = 255
FRAME_TOLERANCE = 2 / GREY_LEVELS

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Difference:
    """How far a part's outputs are apart, by the one that is furthest.

    `max_abs` and `mean_abs` are absolute differences, `scale` is the largest absolute value of the second backend's
    output, and `relative` is their ratio, max_abs / scale. For uint8 frames the scale is 255. Where an output has
    values that are not finite, the differences are `math.inf`, which JSON cannot hold, and never within tolerance.
    """

    part: str
    kind: str
    output: str
    max_abs: float
    mean_abs: float
    scale: float
    relative: float
    tolerance: float
    within: bool


def compare_backends(
    bundle: Bundle,
    first: Backend,
    second: Backend,
    *,
    steps: int = 3,
    tolerance: float | None = None,
    parts: Sequence[str] | None = None,
    progress: Progress = lambda done, total, name: None,
) -> list[Difference]:
    """Compare every part of a bundle, whose files must have been verified, or those named; the worst comes first.

    `first` makes a video of the bundle's prompt in that many steps; what runs in every step is compared in the last
    one. `second` is the reference, and runs each part once; it may be on another device. `tolerance` is a share of
    the largest value of an output and replaces that of the bundle's dtype; frames always have 2 of 255 grey levels.
    `progress` is told the parts done, their number and the one that comes next.

    Raises InvalidRequest; EngineError, also where polygraphy is missing; BundleError, IntegrityError.
    """
    try:
        import polygraphy.comparator  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f'compare: polygraphy is not installed ({one_line(error)}); pip install "polygraphy>=0.53"'
        ) from error
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InvalidRequest(f"tolerance: got {tolerance}, expected a number above 0")
    comparison = _Comparison(
        bundle, first, second, steps, tolerance or TOLERANCES[bundle.manifest.dtype], _check(bundle.manifest, parts), progress
    )
    # One request needs every engine once, so loading them when they are needed costs nothing.
    pipeline = VideoPipeline(bundle, comparison, low_memory=True)
    pipeline(bundle.manifest.defaults.prompt, steps=steps, policy=NoReuse())
    progress(len(comparison.wanted), len(comparison.wanted), "done")
    return sorted(comparison.differences, key=lambda found: found.relative / found.tolerance, reverse=True)


def _check(manifest: Manifest, parts: Sequence[str] | None) -> set[str]:
    known = {part.name for part in manifest.parts}
    wanted = known if parts is None else set(parts)
    for name in sorted(wanted - known) or ([] if wanted else [""]):
        raise InvalidRequest(f"parts: got {name!r}, expected names of this bundle's parts: {', '.join(sorted(known))}")
    return wanted


class _Comparison:
    """The first backend, as a pipeline sees it; its engines compare what they are given before they run it."""

    def __init__(
        self,
        bundle: Bundle,
        first: Backend,
        second: Backend,
        steps: int,
        tolerance: float,
        wanted: set[str],
        progress: Progress,
    ) -> None:
        self.name = first.name
        self.arrays: Arrays = first.arrays
        self.wanted = wanted
        self.differences: list[Difference] = []
        self._bundle = bundle
        self._first = first
        self._second = second
        self._tolerance = tolerance
        self._progress = progress
        manifest = bundle.manifest
        every_step = (manifest.prologue, *manifest.blocks, manifest.epilogue)
        self._runs_before = dict.fromkeys(wanted, 0) | {part.name: steps - 1 for part in every_step}

    def load(self, bundle: Bundle, part: Part) -> Engine:
        return _ComparedEngine(self, self._first.load(bundle, part), part)

    def compiled(self, bundle: Bundle) -> Compiled | None:
        return self._first.compiled(bundle)

    def trim(self) -> None:
        self._first.trim()

    def describe(self) -> dict[str, str]:
        return self._first.describe()

    def meet(self, engine: Engine, part: Part, tensors: Mapping[str, Array]) -> None:
        """Compare the part, if it is wanted and this is the run to do it at."""
        if part.name not in self.wanted:
            return
        self._runs_before[part.name] -= 1
        if self._runs_before[part.name] != -1:
            return
        self._progress(len(self.differences), len(self.wanted), part.name)
        feed = {spec.name: _as_numpy(self.arrays.to_host(tensors[spec.name])) for spec in part.inputs}
        shapes = {spec.name: tensors[spec.name].shape for spec in part.outputs}
        runners = [
            _runner("first", self._first.arrays, part, shapes, lambda: engine),
            _runner("second", self._second.arrays, part, shapes, lambda: self._second.load(self._bundle, part)),
        ]
        try:
            self.differences.append(_compare(part, runners, feed, self._tolerance))
        finally:
            with self._second.arrays.active():
                self._second.trim()


@dataclass
class _ComparedEngine:
    comparison: _Comparison
    engine: Engine
    part: Part

    def run(self, tensors: Mapping[str, Array]) -> None:
        self.comparison.meet(self.engine, self.part, tensors)
        self.engine.run(tensors)


def _runner(
    name: str, arrays: Arrays, part: Part, shapes: Mapping[str, tuple[int, ...]], load: Callable[[], Engine]
) -> Any:
    """A polygraphy runner of a part: arrays of the host in, outputs of those shapes out in fp32."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Runner(BaseRunner):  # type: ignore[misc]
        engine: Engine | None = None

        def activate_impl(self) -> None:
            self.engine = load()

        def deactivate_impl(self) -> None:
            self.engine = None

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for spec in part.inputs:
                metadata.add(spec.name, _numpy_type(spec), [None] * len(spec.shape))
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, HostArray]) -> dict[str, HostArray]:
            assert self.engine is not None, "polygraphy activates a runner first"
            with arrays.active():
                inputs = {
                    spec.name: arrays.from_host(feed_dict[spec.name].astype(numpy_dtype(spec.dtype), copy=False))
                    for spec in part.inputs
                }
                outputs = {spec.name: arrays.empty(shapes[spec.name], spec.dtype) for spec in part.outputs}
                started = time.perf_counter()
                self.engine.run({**inputs, **outputs})
                arrays.synchronize()
                self.inference_time = time.perf_counter() - started
                return {n: arrays.to_host(values).astype(np.float32, copy=False) for n, values in outputs.items()}

    return Runner(name)


def _compare(part: Part, runners: Sequence[Any], feed: Mapping[str, HostArray], tolerance: float) -> Difference:
    """Run a part on both and find the output that differs most."""
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    # Values that are not finite are an outcome, not a mistake of the comparison.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        results = Comparator.run(runners, data_loader=[dict(feed)])
        reference = results["second"][0]
        scales = {spec.name: _scale(spec, reference[spec.name]) for spec in part.outputs}
        tolerances = {spec.name: FRAME_TOLERANCE if spec.dtype == "uint8" else tolerance for spec in part.outputs}
        check = SimpleCompareFunc(
            atol={name: tolerances[name] * scale for name, scale in scales.items()}, rtol=0.0, check_error_stat="max"
        )
        (found,) = Comparator.compare_accuracy(results, compare_func=check)[0]["first", "second"]
    differences = [
        _difference(part, name, result, scales[name], tolerances[name]) for name, result in found.items()
    ]
    return max(differences, key=lambda difference: difference.relative / difference.tolerance)


def _difference(part: Part, output: str, result: Any, scale: float, tolerance: float) -> Difference:
    finite = math.isfinite(result.max_absdiff)
    max_abs = result.max_absdiff if finite else math.inf
    return Difference(
        part=part.name,
        kind=part.kind,
        output=output,
        max_abs=max_abs,
        mean_abs=result.mean_absdiff if finite else math.inf,
        scale=scale,
        relative=max_abs / scale if scale else math.inf if max_abs else 0.0,
        tolerance=tolerance,
        within=bool(result) and finite,
    )


def _scale(spec: TensorSpec, values: HostArray) -> float:
    """The largest of the values that are finite."""
    if spec.dtype == "uint8":
        return float(GREY_LEVELS)
    return float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))


def _as_numpy(values: HostArray) -> HostArray:
    """Polygraphy knows numpy's own types only; fp32 holds every bf16 number."""
    return values if values.dtype.isbuiltin else values.astype(np.float32)


def _numpy_type(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(np.float32) if spec.dtype == "bf16" else numpy_dtype(spec.dtype)
