"""A diffusers scheduler becomes a table of coefficients.

Schedulers are linear: what they return is a sum of the initial noise, of the model outputs so far, and of noise that
some of them add, with coefficients that depend on the step alone. They are read off by running the scheduler once on
basis vectors: element i of the "sample" is the coefficient of basis vector i, so a step's result *is* its row of
coefficients. Rows are then expressed by the last few samples and model outputs, as few of them as suffice:

    x[t+1] = sum over i of a[i] x[t-i]  +  sum over i of b[i] m[t-i]  +  c n[t]

Noise that a step adds is known, for the scheduler draws it from a generator of ours whose numbers can be drawn again.
Schedulers are driven as diffusers' pipelines drive them: `eta` is 0 where a step takes one, whatever its own default,
and steps begin with the first timestep also where rounding made the next one the same. Some call the model more often
than there are steps, as PNDM does to warm up; each call is then a row of the table.

The table is checked against the scheduler itself on large random vectors; what is not linear (clipping, thresholding)
shows there and is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import __version__ as diffusers_version
from diffusers import schedulers

from ..engines.errors import CheckpointError, one_line
from ..engines.manifest import SamplerSettings
from .checkpoint import Checkpoint

MAX_STEPS = 100
RECURRENCES = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4), (4, 13))  # the last for PNDM
# PNDM takes its first three steps in twelve calls of the model, and then one a step.
WARM_UP = 12
MOST_EXTRA = 9
TOLERANCE = 1e-5
MAX_DRAWS = 4  # of noise that one step may make
SPARE = 8  # random elements beside the basis, so that even one step has more equations than coefficients

_REMEDY = "switch clip_sample and thresholding off in scheduler_config.json, or use another scheduler"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The table for one number of steps, which take T calls of the model, fp64.

    Timesteps, input scales, noise coefficients and signal scales (T,), a (T, samples), b (T, outputs).
    """

    timesteps: Floats
    input_scales: Floats
    sample_coefficients: Floats
    output_coefficients: Floats
    noise_coefficients: Floats
    signal_scales: Floats
    noise_scale: float


@dataclass(frozen=True)
class _Course:
    """A scheduler's way from noise to the last sample: T + 1 samples; per step the output, input scale and noise.

    `noise` is what the step drew last, zeros where it drew nothing.
    """

    samples: list[Floats]
    outputs: list[Floats]
    scales: Floats
    noise: list[Floats]


def steps_from_scheduler(scheduler: Any, steps: int) -> Steps:
    """Read off one number of steps; the recurrence is the shortest in RECURRENCES that reproduces the scheduler.

    Raises CheckpointError where the scheduler is not linear or needs a longer memory.
    """
    timesteps = _start(scheduler, steps)
    calls = len(timesteps)
    more = torch.randn((calls + 1, SPARE), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.cat([torch.eye(calls + 1, dtype=torch.float64), more], dim=1)
    course = _run(scheduler, timesteps, basis[0], list(basis[1:]))
    signal_scales, wrong = _signal_scales(scheduler, steps, timesteps), None
    for samples, outputs in RECURRENCES:
        solved = _solve(course, samples, outputs)
        if solved is None:
            continue
        table = Steps(
            timesteps=np.array([float(t) for t in timesteps]),
            input_scales=course.scales,
            sample_coefficients=solved[0],
            output_coefficients=solved[1],
            noise_coefficients=solved[2],
            signal_scales=signal_scales,
            noise_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        )
        wrong = _first_wrong(scheduler, steps, table)
        if wrong is None:  # else the basis was reproduced by chance, within what rounds
            return table
    where = "" if wrong is None else f"call {wrong} of {len(timesteps)} is "
    raise CheckpointError(
        f"scheduler {type(scheduler).__name__}: {where}not linear in the last samples and model outputs; {_REMEDY}"
    )


def scheduler_from_checkpoint(checkpoint: Checkpoint, **settings: Any) -> Any:
    """The scheduler that a diffusers checkpoint names, with its settings or these. Raises CheckpointError."""
    config = checkpoint.config("scheduler", "scheduler_config.json")
    name = checkpoint.component_class("scheduler")
    scheduler = getattr(schedulers, name, None)
    if scheduler is None or not hasattr(scheduler, "from_config"):
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: diffusers {diffusers_version} has no scheduler {name}; name one that it has"
        )
    with _told(name, "cannot be made of scheduler_config.json"):
        return scheduler.from_config(config, **settings)


def check_scheduler(scheduler: Any, steps: int) -> None:
    """Refuse a scheduler of which no table can be made, by one for that number of steps, if it takes that many.

    Raises CheckpointError.
    """
    with suppress(_Refused):
        steps_from_scheduler(scheduler, steps)


def write_table(scheduler: Any, path: Path, max_steps: int = MAX_STEPS) -> None:
    """Write the tables for 1 … max_steps steps, one after another; `calls` says how many rows each has.

    Where a scheduler refuses large numbers, there are fewer tables; where it refuses the first few, these have no rows.
    Raises CheckpointError.
    """
    made: dict[int, Steps] = {}
    for steps in range(1, max_steps + 1):
        try:
            made[steps] = steps_from_scheduler(scheduler, steps)
        except _Refused:
            if made:
                break
            if steps == max_steps:
                raise
    missing = min(made) - 1
    tables = list(made.values())
    np.savez(
        path,
        allow_pickle=False,
        calls=np.array([0] * missing + [len(table.timesteps) for table in tables], np.float64),
        timesteps=np.concatenate([table.timesteps for table in tables]),
        input_scales=np.concatenate([table.input_scales for table in tables]),
        sample_coefficients=_stack([table.sample_coefficients for table in tables]),
        output_coefficients=_stack([table.output_coefficients for table in tables]),
        noise_coefficients=np.concatenate([table.noise_coefficients for table in tables]),
        signal_scales=np.concatenate([table.signal_scales for table in tables]),
        noise_scales=np.array([0.0] * missing + [table.noise_scale for table in tables]),
    )


def sampler_from_table(path: Path, scheduler: Any) -> SamplerSettings:
    """What the manifest says of a written file."""
    with np.load(path, allow_pickle=False) as table:
        return SamplerSettings(
            table=path.name,
            scheduler=type(scheduler).__name__,
            max_steps=len(table["calls"]),
            kept=table["sample_coefficients"].shape[1] + table["output_coefficients"].shape[1],
        )


def _stack(tables: list[Floats]) -> Floats:
    """One below the other, the narrower ones filled up with zeros."""
    width = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables])


def _start(scheduler: Any, steps: int) -> list[Any]:
    with _told(type(scheduler).__name__, f"refuses {steps} steps", _Refused):
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
    # trailing spacing in diffusers counts down in fractions, which for some numbers ends one step below the last
    timesteps = [timestep for timestep in scheduler.timesteps if timestep >= 0]
    afterwards = [float(timestep) for timestep in timesteps[WARM_UP:]]
    extra = len(timesteps) - steps
    if not 0 <= extra <= MOST_EXTRA or (extra and len(set(afterwards)) < len(afterwards)):
        raise CheckpointError(
            f"scheduler {type(scheduler).__name__}: calls the model {len(timesteps)} times for {steps} steps; only "
            "schedulers with one call a step, but for a warm-up, can be exported"
        )
    return timesteps


class _Refused(CheckpointError):
    """A scheduler does not take that number of steps."""


@contextmanager
def _told(scheduler: str, what: str, kind: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Whatever a scheduler raises becomes one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = one_line(error)[:200] or type(error).__name__
        raise kind(f"scheduler {scheduler}: {what} ({reason}); use another scheduler") from error


def _run(scheduler: Any, timesteps: list[Any], noise: torch.Tensor, outputs: list[torch.Tensor]) -> _Course:
    shape = (1, 1, 1, -1)  # some schedulers insist on (batch, channels, height, width)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    step = _step_of(scheduler)
    sample = noise.clone().view(shape)
    samples, scales, draws = [noise.numpy()], [], []
    for index, output in enumerate(outputs):
        scales.append(float(scale(torch.ones(1, dtype=torch.float64), timesteps[index])))
        generator = torch.Generator().manual_seed(index)
        with _told(type(scheduler).__name__, "its step cannot be read off"):
            sample = step(output.view(shape), timesteps, index, sample, generator)
        samples.append(sample.double().numpy().flatten())
        draws.append(_drawn(generator, index, sample.shape))
    return _Course(samples, [output.numpy() for output in outputs], np.array(scales), draws)


_Step = Callable[[torch.Tensor, list[Any], int, torch.Tensor, torch.Generator], torch.Tensor]


def _step_of(scheduler: Any) -> _Step:
    """A scheduler's step as a function of output, all timesteps, the step's index, sample and generator."""
    known = inspect.signature(scheduler.step).parameters
    if "old_pred_original_sample" in known:
        return _two_step(scheduler)

    def step(
        output: torch.Tensor, timesteps: list[Any], index: int, sample: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        extra = {name: value for name, value in (("eta", 0.0), ("generator", generator)) if name in known}
        result: torch.Tensor = scheduler.step(output, timesteps[index], sample, **extra, return_dict=False)[0]
        return result

    return step


def _two_step(scheduler: Any) -> _Step:
    """The step of a scheduler that leaves it to its caller to remember the last clean sample."""
    clean: list[torch.Tensor | None] = [None]

    def step(
        output: torch.Tensor, timesteps: list[Any], index: int, sample: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        before = timesteps[index - 1] if index else None
        old = clean[0] if index else None
        new: torch.Tensor
        new, clean[0] = scheduler.step(
            output, old, timesteps[index], before, sample, generator=generator, return_dict=False
        )
        return new

    return step


def _signal_scales(scheduler: Any, steps: int, timesteps: list[Any]) -> Floats:
    """What a finished sample is multiplied by at each timestep, (T,); no numbers where the scheduler does not tell.

    It tells by the noising that the model was trained with: of ones, with no noise.
    """
    _start(scheduler, steps)
    scheduler.set_timesteps(steps)  # and now no begin index: each timestep is looked up
    ones, zeros = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    scales = np.full(len(timesteps), np.nan)
    for index, timestep in enumerate(timesteps):
        when = torch.as_tensor(timestep).reshape(1)
        try:
            if hasattr(scheduler, "scale_noise"):
                noised = scheduler.scale_noise(ones, when, zeros)
            else:
                noised = scheduler.add_noise(ones, zeros, when)
        except (AttributeError, ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError):
            return np.full(len(timesteps), np.nan)
        scales[index] = float(noised)
    return scales


def _drawn(generator: torch.Generator, seed: int, shape: torch.Size) -> Floats:
    """What was drawn last from a generator of that seed, zeros if nothing: the same draws lead to the same state."""
    for dtype in (torch.float64, torch.float32):
        again, drawn = torch.Generator().manual_seed(seed), torch.zeros(shape)
        for _ in range(MAX_DRAWS):
            if torch.equal(again.get_state(), generator.get_state()):
                return drawn.double().numpy().flatten()
            drawn = torch.randn(shape, generator=again, dtype=dtype)
    raise CheckpointError("scheduler: draws noise in a way that cannot be followed; use another scheduler")


def _solve(course: _Course, samples: int, outputs: int) -> tuple[Floats, Floats, Floats] | None:
    rows = course.samples
    steps = len(rows) - 1
    a, b, c = np.zeros((steps, samples)), np.zeros((steps, outputs)), np.zeros(steps)
    for step in range(steps):
        past = [rows[step - i] for i in range(min(samples, step + 1))]
        made = [course.outputs[step - i] for i in range(min(outputs, step + 1))]
        noise = [course.noise[step]] if course.noise[step].any() else []
        matrix = np.stack([*past, *made, *noise], axis=1)
        solution = np.linalg.lstsq(matrix, rows[step + 1], rcond=None)[0]
        if not np.abs(matrix @ solution - rows[step + 1]).max() <= TOLERANCE * np.abs(rows[step + 1]).max():
            return None
        a[step, : len(past)], b[step, : len(made)] = solution[: len(past)], solution[len(past) :][: len(made)]
        if noise and np.abs(solution[-1] * noise[0]).max() > TOLERANCE * np.abs(rows[step + 1]).max():
            c[step] = solution[-1]  # else it is rounding: most last steps multiply what they draw by 0
    return a, b, c


def _first_wrong(scheduler: Any, steps: int, table: Steps) -> int | None:
    """The first call after which the table's sample is not the scheduler's, of large random numbers."""
    calls = len(table.timesteps)
    generator = torch.Generator().manual_seed(steps)
    draws = 30 * torch.randn((calls + 1, 64), dtype=torch.float64, generator=generator)
    course = _run(scheduler, _start(scheduler, steps), draws[0], list(draws[1:]))
    got = [draws[0].numpy()]
    for step in range(calls):
        past = sum(c * got[step - i] for i, c in enumerate(table.sample_coefficients[step]) if i <= step)
        made = sum(c * draws[1 + step - i].numpy() for i, c in enumerate(table.output_coefficients[step]) if i <= step)
        got.append(past + made + table.noise_coefficients[step] * course.noise[step])
        expected = course.samples[step + 1]
        if not np.abs(got[-1] - expected).max() <= TOLERANCE * np.abs(expected).max():
            return step
    return None
