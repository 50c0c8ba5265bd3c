"""Applies a bundle's sampler table; the scheduler itself was compiled away at export."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.arrays import Array, Arrays, HostArray
from ..engines.errors import IntegrityError, InvalidRequest, quoted
from ..engines.npz import check_npz

VECTORS = ("timesteps", "input_scales", "noise_coefficients", "signal_scales")
MATRICES = ("sample_coefficients", "output_coefficients")
LEAST_SIGNAL = 0.01  # where a schedule begins with pure noise
COLUMNS = ("calls", *VECTORS, *MATRICES, "noise_scales")


class Noise:
    """The random numbers of one request, standard normal, from one generator per prompt.

    The first draw is what denoising begins with; samplers that add noise draw more of them, step by step.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], arrays: Arrays) -> None:
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        self._shape = shape
        self._arrays = arrays

    def draw(self) -> Array:
        """The next (prompts, *shape) fp32, on the device."""
        rows = [generator.standard_normal(self._shape, dtype=np.float32) for generator in self._generators]
        return self._arrays.from_host(np.stack(rows))


@dataclass(frozen=True)
class Schedule:
    """One number of steps, as T calls of the model, nearly always one each; all fp64.

    Timesteps, input scales, c (T,), coefficients a (T, n) and b (T, m):

    x[t+1] = sum of a[t, i] x[t-i] over i, plus sum of b[t, i] m[t-i], plus c[t] n[t], with x the samples, m the model
    outputs and n standard normal noise, drawn only where c[t] is not 0. The signal scale (T,) of step t is what the
    finished sample is multiplied by in x[t]; no number where the scheduler does not tell.
    """

    timesteps: HostArray
    input_scales: HostArray
    noise_coefficients: HostArray
    sample_coefficients: HostArray
    output_coefficients: HostArray
    signal_scales: HostArray
    noise_scale: float

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    def turns(self, below: Sequence[float]) -> list[range]:
        """The steps of each of several transformers, every later one of which takes over below its timestep.

        Those of some may be none.
        """
        starts = [int(np.argmax(np.append(self.timesteps, -np.inf) < timestep)) for timestep in below]
        return [range(first, last) for first, last in zip([0, *starts], [*starts, self.steps], strict=True)]

    def sensitivities(self) -> HostArray:
        """How far the last sample moves if the output of one call is off by 1, to first order; (T,) fp64.

        The model is taken to answer a changed sample as if the video in it had changed and the noise had not: a sample
        off by d means a video off by d over the signal scale, and outputs that follow it. So the recurrence is closed
        by an answer c[t] of the output to the sample, which is the one that keeps a video in its place:
        s[t+1] = sum of a[t, i] s[t-i] + sum of b[t, i] c[t-i] s[t-i], with s the signal scales.
        """
        a, b, steps = self.sample_coefficients, self.output_coefficients, self.steps
        scales = np.append(np.maximum(self.signal_scales, LEAST_SIGNAL), 1.0)
        answers = np.zeros(steps)
        for step in range(steps):
            held = _recur(a[step], scales, step) + _recur(b[step, 1:], answers * scales[:-1], step - 1)
            if b[step, 0]:
                answers[step] = (scales[step + 1] - held) / (b[step, 0] * scales[step])
        return np.array([self._moved(step, answers) for step in range(steps)])

    def _moved(self, wrong: int, answers: HostArray) -> float:
        """What becomes of an output that is off by 1."""
        samples, outputs = np.zeros(self.steps + 1), np.zeros(self.steps)
        outputs[wrong] = 1
        for step in range(wrong, self.steps):
            outputs[step] += answers[step] * samples[step]
            samples[step + 1] = _recur(self.sample_coefficients[step], samples, step)
            samples[step + 1] += _recur(self.output_coefficients[step], outputs, step)
        return float(abs(samples[-1]))

    def begin(self, latents: Array, draw: Callable[[], Array]) -> Sampler:
        """The sampler of one request; `latents` is its standard normal noise, which is left as it is.

        `draw` makes further noise of that shape, in steps that add some.
        """
        return Sampler(self, latents * np.float32(self.noise_scale), draw)


class Sampler:
    """The samples of one request. `latents` is the newest, fp32."""

    def __init__(self, schedule: Schedule, latents: Array, draw: Callable[[], Array]) -> None:
        self._schedule = schedule
        self._draw = draw
        self._samples: list[Array] = [latents]
        self._outputs: list[Array] = []

    @property
    def latents(self) -> Array:
        """The current sample."""
        return self._samples[0]

    def model_input(self, step: int) -> Array:
        """The sample as the model wants to see it."""
        scale = self._schedule.input_scales[step]
        return self.latents if scale == 1 else self.latents * np.float32(scale)

    def advance(self, step: int, model_output: Array) -> None:
        """One step further, given what the model made of this one."""
        a, b = self._schedule.sample_coefficients[step], self._schedule.output_coefficients[step]
        self._outputs = [model_output, *self._outputs][: len(b)]
        terms = [*zip(a, self._samples, strict=False), *zip(b, self._outputs, strict=False)]
        noise = self._schedule.noise_coefficients[step]
        if noise:
            terms.append((noise, self._draw()))
        new: Any = 0
        for coefficient, values in terms:
            if coefficient:
                new = new + np.float32(coefficient) * values
        self._samples = [new, *self._samples][: len(a)]


def _recur(coefficients: HostArray, values: HostArray, newest: int) -> float:
    """The sum of coefficients times values, the first with the newest, as far back as there are any."""
    count = min(len(coefficients), newest + 1)
    return float(sum(coefficients[i] * values[newest - i] for i in range(count)))


class SamplerTable:
    """The schedules of a bundle for 1 … `max_steps` steps, one below the other; `calls` says how long each is."""

    def __init__(self, columns: dict[str, HostArray], max_steps: int) -> None:
        self._columns = columns
        self._calls = columns["calls"].astype(np.int64)
        self.max_steps = max_steps

    @property
    def min_steps(self) -> int:
        """The fewest that the sampler takes."""
        return 1 + int(np.argmax(self._calls > 0))

    def schedule(self, steps: int) -> Schedule:
        """The schedule of that many steps. Raises InvalidRequest."""
        if not isinstance(steps, (int, np.integer)) or not 1 <= steps <= self.max_steps:
            raise InvalidRequest(
                f"steps: got {quoted(steps)}, expected 1 to {self.max_steps}, which the bundle has tables for"
            )
        calls = self._calls[:steps]
        if not calls[-1]:
            raise InvalidRequest(
                f"steps: got {steps}, expected {self.min_steps} to {self.max_steps}; the sampler takes no fewer"
            )
        last = int(calls.sum())
        rows = {name: self._columns[name][last - int(calls[-1]) : last] for name in (*VECTORS, *MATRICES)}
        return Schedule(**rows, noise_scale=float(self._columns["noise_scales"][steps - 1]))


def load_table(path: Path, max_steps: int, kept: int | None = None) -> SamplerTable:
    """Read `sampler.npz`; nothing in it is unpickled. `kept` is how many arrays it may ask for at once (None: any).

    Raises IntegrityError.
    """
    try:
        # a file object of our own: np.load leaves the one it opens itself to the garbage collector when it fails
        with path.open("rb") as file:
            check_npz(file, COLUMNS, max_steps * (max_steps + 1) // 2)
            with np.load(file, allow_pickle=False) as table:
                columns = {name: table[name] for name in COLUMNS}
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path}: is not a sampler table ({error}); export again") from error
    calls = columns["calls"]
    if calls.shape != (max_steps,) or calls.dtype != np.float64 or not _are_counts(calls):
        raise IntegrityError(f"{path}: calls are no counts for 1 to {max_steps} steps; export again")
    rows = int(calls.sum())
    shapes = dict.fromkeys(VECTORS, (rows,)) | {"noise_scales": (max_steps,), "calls": (max_steps,)}
    for name, column in columns.items():
        fits = column.shape == shapes[name] if name in shapes else column.ndim == 2 and len(column) == rows
        if column.dtype != np.float64 or not fits:
            raise IntegrityError(
                f"{path}: {name} is {column.dtype} {column.shape}, not fp64 for 1 to {max_steps} steps; export again"
            )
    if kept is not None and (asked := sum(columns[name].shape[1] for name in MATRICES)) > kept:
        raise IntegrityError(f"{path}: keeps {asked} arrays, not the {kept} that its manifest says; export again")
    return SamplerTable(columns, max_steps)


def _are_counts(calls: HostArray) -> bool:
    """Whether every number of steps has as many calls, or up to twelve times as many; or, the first few, none."""
    steps = np.arange(1, len(calls) + 1)
    fits = (calls == 0) | ((calls >= steps) & (calls <= 12 * steps) & (calls == np.floor(calls)))
    return bool(fits.all() and calls[-1] > 0 and (np.diff((calls > 0).astype(int)) >= 0).all())
