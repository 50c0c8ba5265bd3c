"""A diffusers scheduler becomes a table of coefficients.

Every deterministic scheduler is linear: what it returns is a sum of the initial noise and of the model outputs so
far, with coefficients that depend on the step alone. They are read off by running the scheduler once on basis
vectors: element i of the "sample" is the coefficient of basis vector i, so a step's result *is* its row of
coefficients. Rows are then expressed by the last few samples and model outputs, as few of them as suffice:

    x[t+1] = sum over i of a[i] x[t-i]  +  sum over i of b[i] m[t-i]

The table is checked against the scheduler itself on large random vectors; what is not linear (clipping,
thresholding, added noise) shows there and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..engines.errors import CheckpointError

MAX_STEPS = 100
RECURRENCES = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (3, 4))
TOLERANCE = 1e-5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The table for one number of steps T, fp64: timesteps and input scales (T,), a (T, samples), b (T, outputs)."""

    timesteps: Floats
    input_scales: Floats
    sample_coefficients: Floats
    output_coefficients: Floats
    noise_scale: float


def steps_from_scheduler(scheduler: Any, steps: int) -> Steps:
    """Read off one number of steps; the recurrence is the shortest in RECURRENCES that reproduces the scheduler.

    Raises CheckpointError where the scheduler is not linear or needs a longer memory.
    """
    timesteps = _start(scheduler, steps)
    basis = torch.eye(steps + 1, dtype=torch.float64)
    rows, scales = _run(scheduler, timesteps, basis[0], list(basis[1:]))
    for samples, outputs in RECURRENCES:
        solved = _solve(rows, samples, outputs)
        if solved is not None:
            break
    else:
        raise CheckpointError(f"scheduler {type(scheduler).__name__}: no recurrence of at most 3 samples fits it")
    table = Steps(
        timesteps=np.array([float(t) for t in timesteps]),
        input_scales=scales,
        sample_coefficients=solved[0],
        output_coefficients=solved[1],
        noise_scale=float(getattr(scheduler, "init_noise_sigma", 1.0)),
    )
    _check(scheduler, table)
    return table


def write_table(scheduler: Any, path: Path, max_steps: int = MAX_STEPS) -> None:
    """Write the tables for 1 … max_steps steps, one after another; the table of T steps starts at row T (T - 1) / 2."""
    tables = [steps_from_scheduler(scheduler, steps) for steps in range(1, max_steps + 1)]
    np.savez(
        path,
        allow_pickle=False,
        timesteps=np.concatenate([table.timesteps for table in tables]),
        input_scales=np.concatenate([table.input_scales for table in tables]),
        sample_coefficients=_stack([table.sample_coefficients for table in tables]),
        output_coefficients=_stack([table.output_coefficients for table in tables]),
        noise_scales=np.array([table.noise_scale for table in tables]),
    )


def _stack(tables: list[Floats]) -> Floats:
    """One below the other, the narrower ones filled up with zeros."""
    width = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables])


def _start(scheduler: Any, steps: int) -> list[Any]:
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise CheckpointError(f"scheduler {type(scheduler).__name__}: refuses {steps} steps: {error}") from error
    timesteps = list(scheduler.timesteps)
    if len(timesteps) != steps:
        raise CheckpointError(
            f"scheduler {type(scheduler).__name__}: calls the model {len(timesteps)} times for {steps} steps; only "
            "schedulers with one call a step can be exported"
        )
    return timesteps


def _run(
    scheduler: Any, timesteps: list[Any], noise: torch.Tensor, outputs: list[torch.Tensor]
) -> tuple[list[Floats], Floats]:
    """All samples from the first to the last, and what each step multiplies the model's input by."""
    shape = (1, 1, 1, -1)  # some schedulers insist on (batch, channels, height, width)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = noise.clone().view(shape)
    samples, scales = [noise.numpy()], []
    for timestep, output in zip(timesteps, outputs, strict=True):
        scales.append(float(scale(torch.ones(1, dtype=torch.float64), timestep)))
        try:
            sample = scheduler.step(output.view(shape), timestep, sample, return_dict=False)[0]
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"scheduler {type(scheduler).__name__}: its step cannot be read off ({reason}); use another scheduler"
            ) from error
        samples.append(sample.double().numpy().flatten())
    return samples, np.array(scales)


def _solve(rows: list[Floats], samples: int, outputs: int) -> tuple[Floats, Floats] | None:
    steps = len(rows) - 1
    a, b = np.zeros((steps, samples)), np.zeros((steps, outputs))
    for step in range(steps):
        past = [rows[step - i] for i in range(min(samples, step + 1))]
        made = [np.eye(steps + 1)[step - i + 1] for i in range(min(outputs, step + 1))]
        matrix = np.stack([*past, *made], axis=1)
        solution = np.linalg.lstsq(matrix, rows[step + 1], rcond=None)[0]
        if not np.abs(matrix @ solution - rows[step + 1]).max() <= TOLERANCE * np.abs(rows[step + 1]).max():
            return None
        a[step, : len(past)], b[step, : len(made)] = solution[: len(past)], solution[len(past) :]
    return a, b


def _check(scheduler: Any, table: Steps) -> None:
    steps = len(table.timesteps)
    generator = torch.Generator().manual_seed(steps)
    draws = 30 * torch.randn((steps + 1, 64), dtype=torch.float64, generator=generator)
    timesteps = _start(scheduler, steps)
    expected, _ = _run(scheduler, timesteps, draws[0], list(draws[1:]))
    got = [draws[0].numpy()]
    for step in range(steps):
        past = sum(c * got[step - i] for i, c in enumerate(table.sample_coefficients[step]) if i <= step)
        made = sum(c * draws[1 + step - i].numpy() for i, c in enumerate(table.output_coefficients[step]) if i <= step)
        got.append(past + made)
        if not np.abs(got[-1] - expected[step + 1]).max() <= TOLERANCE * np.abs(expected[step + 1]).max():
            raise CheckpointError(
                f"scheduler {type(scheduler).__name__}: step {step} of {steps} is not linear in the sample and "
                "the model outputs; switch clip_sample and thresholding off in scheduler_config.json, or use "
                "another scheduler"
            )
