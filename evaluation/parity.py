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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engines.arrays import Array, Arrays, HostArray, numpy_dtype
from ..engines.backend import Backend, Engine
from ..engines.bundle import Bundle
from ..engines.compiled import Compiled
from ..engines.errors import EngineError, InvalidRequest, one_line, quoted
from ..engines.manifest import FRAME_MEANS, Manifest, Part, TensorSpec
from ..engines.progress import OnPart
from ..runtime.memory import MemoryLimits
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import NoReuse

# Largest difference that passes, as a share of the largest value of an output; for frames in grey levels. Measured on
# the demo model, against values computed in fp32, were 1e-6 with fp32, 1e-3 with fp16 and 1e-2 with bf16; 0, 1 and 2
# grey levels. The rest is room for deeper models and other orders of summation; but matrices multiplied in TF32 where
# the bundle says fp32, which costs about 1e-3, do not pass.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
GREY_LEVELS = {"fp32": 2, "fp16": 2, "bf16": 8}
WHITE = 255


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
    progress: OnPart = lambda done, total, name: None,
) -> list[Difference]:
    """Compare every part of a bundle, whose files must have been verified, or those named; the worst comes first.

    `first` makes a video of the bundle's prompt in that many steps; what runs in every step is compared in the last
    one. Where `first` arrives at values that are not finite, the part that made them comes first, and those that were
    given them follow. `second` is the reference, and runs each part once; it may be on another device.

    `tolerance` is a share of the largest value of an output and replaces that of the part's dtype, except for
    frames, which have theirs. `progress` is told the parts done, their number and the one that comes next.

    Raises InvalidRequest; EngineError, also where polygraphy is missing; BundleError, IntegrityError.
    """
    try:
        import polygraphy.comparator  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f'parity: polygraphy is not installed ({one_line(error)}); pip install "polygraphy>=0.53"'
        ) from error
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InvalidRequest(f"tolerance: got {quoted(tolerance)}, expected a number above 0")
    comparison = _Comparison(
        bundle=bundle,
        first=first,
        second=second,
        steps=steps,
        tolerance=tolerance,
        wanted=_check_parts(bundle.manifest, parts),
        progress=progress,
    )
    # One request needs every engine once, so loading them when they are needed costs nothing.
    pipeline = VideoPipeline(bundle, comparison, MemoryLimits(low_memory=True), only_finite=False)
    with np.errstate(all="ignore"):  # values that are not finite are something to report
        pipeline(bundle.manifest.defaults.prompt, steps=steps, policy=NoReuse())
    progress(len(comparison.wanted), len(comparison.wanted), "done")
    return sorted(comparison.differences, key=_severity, reverse=True)


def _check_parts(manifest: Manifest, parts: Sequence[str] | None) -> set[str]:
    known = {part.name for part in manifest.parts}
    wanted = known if parts is None else set(parts)
    for name in sorted(wanted - known) or ([] if wanted else [""]):
        raise InvalidRequest(
            f"parts: got {quoted(name)}, expected names of this bundle's parts: {', '.join(sorted(known))}"
        )
    return wanted


@dataclass
class _Comparison:
    """The first backend, as a pipeline sees it; its engines are compared on what they are given."""

    bundle: Bundle
    first: Backend
    second: Backend
    steps: int
    tolerance: float | None
    wanted: set[str]
    progress: OnPart
    differences: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.first.name
        self.arrays: Arrays = self.first.arrays
        manifest = self.bundle.manifest
        self._in_every_step = {part.name for expert in manifest.experts for part in expert.transformer}
        self._runs: Counter[str] = Counter()

    def load(self, bundle: Bundle, part: Part) -> Engine:
        return _ComparedEngine(self, self.first.load(bundle, part), part)

    def compiled(self, bundle: Bundle) -> Compiled | None:
        return self.first.compiled(bundle)

    def trim(self) -> None:
        self.first.trim()

    def describe(self) -> dict[str, str]:
        return self.first.describe()

    def meet(self, engine: Engine, part: Part, tensors: Mapping[str, Array]) -> None:
        """Compare the part on what it has just been run on, if it is wanted and this is the run to do it at.

        That is its last, or an earlier one with a result that is not finite: after that no input would be, anywhere.
        """
        if part.name not in self.wanted or part.name in {found.part for found in self.differences}:
            return
        self._runs[part.name] += 1
        last = self._runs[part.name] == self.steps or part.name not in self._in_every_step
        if not last and all(np.isfinite(self.arrays.to_host(tensors[spec.name])).all() for spec in part.outputs):
            return
        self.progress(len(self.differences), len(self.wanted), part.name)
        feed = {
            spec.name: self.arrays.to_host(tensors[spec.name]).astype(_numpy_type(spec), copy=False)
            for spec in part.inputs
        }
        shapes = {spec.name: tensors[spec.name].shape for spec in part.outputs}
        runners = [
            _runner("first", self.first.arrays, part, shapes, lambda: engine),
            _runner("second", self.second.arrays, part, shapes, lambda: self.second.load(self.bundle, part)),
        ]
        try:
            self.differences.append(self._compare(part, runners, feed))
        finally:
            with self.second.arrays.active():
                self.second.trim()

    def _compare(self, part: Part, runners: Sequence[Any], feed: Mapping[str, HostArray]) -> Difference:
        """Run a part on both and find the output that differs most."""
        from polygraphy.comparator import Comparator, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER

        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run(runners, data_loader=[dict(feed)])
            reference = results["second"][0]
            scales = {spec.name: _scale(spec, reference[spec.name]) for spec in part.outputs}
            dtype = self.bundle.manifest.dtype_of(part)
            share = self.tolerance or TOLERANCES[dtype]
            tolerances = {
                spec.name: GREY_LEVELS[dtype] / WHITE if spec.dtype == "uint8" else share for spec in part.outputs
            }
            check = SimpleCompareFunc(
                atol={name: tolerances[name] * scale for name, scale in scales.items()},
                rtol=0.0,
                check_error_stat="max",
            )
            (found,) = Comparator.compare_accuracy(results, compare_func=check)[0]["first", "second"]
        differences = [
            _difference(part, name, result, scales[name], tolerances[name]) for name, result in found.items()
        ]
        return max(differences, key=_severity)


@dataclass
class _ComparedEngine:
    comparison: _Comparison
    engine: Engine
    part: Part

    def run(self, tensors: Mapping[str, Array]) -> None:
        self.engine.run(tensors)
        self.comparison.meet(self.engine, self.part, tensors)


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


def _severity(difference: Difference) -> float:
    return difference.relative / difference.tolerance


def _scale(spec: TensorSpec, values: HostArray) -> float:
    """The largest of the values that are finite; of means, what the values themselves are about, from -1 to 1."""
    if spec.dtype == "uint8":
        return float(WHITE)
    least = 1.0 if spec.name == FRAME_MEANS else 0.0
    return float(np.max(np.abs(values), where=np.isfinite(values), initial=least))


def _numpy_type(spec: TensorSpec) -> np.dtype[Any]:
    """Polygraphy knows numpy's own types only; fp32 holds every bf16 number."""
    return np.dtype(np.float32) if spec.dtype == "bf16" else numpy_dtype(spec.dtype)
