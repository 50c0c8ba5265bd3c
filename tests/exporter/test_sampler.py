"""The table that an export writes makes the runtime's sampler do what the diffusers scheduler does."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import CheckpointError, IntegrityError, InvalidRequest
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.sampler import (
    Steps,
    sampler_from_table,
    scheduler_from_checkpoint,
    steps_from_scheduler,
    write_table,
)
from foresight.runtime.sampler import Schedule, load_table

BETAS: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
COGVIDEOX: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "clip_sample": False,
}


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


Make = Callable[[], Any]


def ddim(**settings: Any) -> Make:
    return partial(DDIMScheduler, **BETAS, **({"clip_sample": False} | settings))


def dpm(**settings: Any) -> Make:
    return partial(DPMSolverMultistepScheduler, **BETAS, **settings)


def euler(**settings: Any) -> Make:
    return partial(EulerDiscreteScheduler, **BETAS, **settings)


LINEAR: dict[str, Make] = {
    f"DDIM {prediction} {spacing}": ddim(prediction_type=prediction, timestep_spacing=spacing)
    for prediction in ("epsilon", "sample", "v_prediction")
    for spacing in ("leading", "trailing", "linspace")
} | {
    "DDIM of Latte": ddim(steps_offset=1, set_alpha_to_one=False),
    "DPM-Solver++ order 1": dpm(solver_order=1),
    "DPM-Solver++ order 2": dpm(),
    "DPM-Solver++ order 3": dpm(solver_order=3),
    "DPM-Solver++ Heun": dpm(solver_type="heun"),
    "DPM-Solver++ Karras": dpm(use_karras_sigmas=True),
    "Euler": euler(),
    "Euler v_prediction trailing": euler(prediction_type="v_prediction", timestep_spacing="trailing"),
    "CogVideoX DDIM": partial(CogVideoXDDIMScheduler, **COGVIDEOX),
    "CogVideoX DDIM epsilon": CogVideoXDDIMScheduler,
    "flow matching": FlowMatchEulerDiscreteScheduler,
    "UniPC": partial(UniPCMultistepScheduler, **BETAS),
    "UniPC flow, shift 3": partial(UniPCMultistepScheduler, **FLOW, flow_shift=3.0),
    "UniPC flow, shift 12": partial(UniPCMultistepScheduler, **FLOW, flow_shift=12.0),
    "DPM-Solver++ flow": partial(DPMSolverMultistepScheduler, **FLOW, flow_shift=5.0),
    "LMS": partial(LMSDiscreteScheduler, **BETAS),
    "DEIS": partial(DEISMultistepScheduler, **BETAS),
    "TCD": partial(TCDScheduler, **BETAS, clip_sample=False),
    "PNDM without Runge-Kutta": partial(PNDMScheduler, **BETAS, skip_prk_steps=True),
    "PNDM": partial(PNDMScheduler, **BETAS),
}
NOISY: dict[str, Make] = {
    "CogVideoX DPM": partial(CogVideoXDPMScheduler, **COGVIDEOX),
    "CogVideoX DPM of the 5b": partial(CogVideoXDPMScheduler, **COGVIDEOX | {"snr_shift_scale": 1.0}),
    "DDPM": partial(DDPMScheduler, **BETAS, clip_sample=False),
    "ancestral Euler": partial(EulerAncestralDiscreteScheduler, **BETAS),
    "SDE-DPM-Solver++": dpm(algorithm_type="sde-dpmsolver++"),
}
REFUSED: dict[str, Make] = {
    "clip_sample": ddim(clip_sample=True),
    "thresholding": ddim(thresholding=True),
    "Heun calls the model twice": partial(HeunDiscreteScheduler, **BETAS),
    "so does KDPM2": partial(KDPM2DiscreteScheduler, **BETAS),
}
# diffusers' own, with numpy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def schedule_from(table: Steps) -> Schedule:
    return Schedule(**asdict(table))


def no_noise() -> Any:
    raise AssertionError("this sampler adds no noise")


def start(scheduler: Any, steps: int) -> None:
    """As a pipeline begins; the first index, where it can be set, is then not that of a second timestep like it."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def run_both(scheduler: Any, steps: int, schedule: Schedule, seed: int) -> tuple[list[Any], list[Any]]:
    """Everything a model gets to see, and the final sample, by the runtime and by the scheduler itself."""
    draw = np.random.default_rng(seed)
    shape = (1, 4, 3, 5)
    noise = draw.standard_normal(shape).astype(np.float32)
    outputs = [draw.standard_normal(shape).astype(np.float32) for _ in range(schedule.steps)]
    sampler = schedule.begin(noise, no_noise)
    ours = []
    for step, output in enumerate(outputs):
        ours.append(sampler.model_input(step).copy())
        sampler.advance(step, output)
    start(scheduler, steps)
    sample = torch.from_numpy(noise).double() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    theirs = []
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        theirs.append(scaled.numpy())
        eta = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
        sample = scheduler.step(torch.from_numpy(output).double(), timestep, sample, **eta, return_dict=False)[
            0
        ].double()
    return [*ours, sampler.latents], [*theirs, sample.numpy()]


@pytest.mark.parametrize("name", LINEAR)
@given(steps=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_the_runtime_takes_the_steps_of_the_scheduler(name: str, steps: int, seed: int) -> None:
    scheduler = LINEAR[name]()
    assume((name != "PNDM" or steps > 3) and (name != "TCD" or steps <= 50))
    ours, theirs = run_both(scheduler, steps, schedule_from(steps_from_scheduler(scheduler, steps)), seed)
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max() * steps**0.5)


@pytest.mark.parametrize("steps", [7, 10])
def test_a_recurrence_that_fits_the_basis_by_chance_is_not_taken(steps: int) -> None:
    """LMS needs four outputs; two samples and three outputs come near enough for these."""
    scheduler = LINEAR["LMS"]()
    ours, theirs = run_both(scheduler, steps, schedule_from(steps_from_scheduler(scheduler, steps)), 1)
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max() * steps**0.5)


@pytest.mark.parametrize("name", NOISY)
@given(steps=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_the_runtime_adds_the_noise_that_the_scheduler_adds(name: str, steps: int, seed: int) -> None:
    """The scheduler draws from torch; the runtime is given the last that was drawn in a step."""
    scheduler = NOISY[name]()
    schedule = schedule_from(steps_from_scheduler(scheduler, steps))
    scheduler.set_timesteps(steps)
    draw, shape = np.random.default_rng(seed), (1, 4, 3, 5)
    noise = draw.standard_normal(shape).astype(np.float32)
    given_noise: list[Any] = []
    sampler = schedule.begin(noise, lambda: given_noise[-1])
    sample = torch.from_numpy(noise).double() * float(scheduler.init_noise_sigma)
    clean, largest = None, 1.0
    for step, timestep in enumerate(scheduler.timesteps[:steps]):
        output = draw.standard_normal(shape).astype(np.float32)
        generator, again = (torch.Generator().manual_seed(step) for _ in range(2))
        double = torch.from_numpy(output).double()
        if isinstance(scheduler, CogVideoXDPMScheduler):
            before = scheduler.timesteps[step - 1] if step else None
            draws = 1 if clean is None or timestep < 1000 // steps else 2
            sample, clean = scheduler.step(
                double, clean, timestep, before, sample, generator=generator, return_dict=False
            )
        else:
            draws = 1
            sample = scheduler.step(double, timestep, sample, generator=generator, return_dict=False)[0]
        dtype = torch.float32 if name == "SDE-DPM-Solver++" else torch.float64
        given_noise += [torch.randn(shape, generator=again, dtype=dtype).float().numpy() for _ in range(draws)]
        sampler.advance(step, output)
        largest = max(largest, float(sample.abs().max()))
        np.testing.assert_allclose(sampler.latents, sample.numpy(), rtol=0, atol=2e-5 * largest * steps**0.5)


@pytest.mark.parametrize("name", NOISY)
def test_the_last_step_adds_no_noise(name: str) -> None:
    coefficients = steps_from_scheduler(NOISY[name](), 10).noise_coefficients
    assert coefficients[:-1].all() and not coefficients[-1]


def test_a_timestep_below_the_last_is_left_out() -> None:
    """The trailing spacing of diffusers makes 62 of them for 61 steps; the last is -1."""
    scheduler = LINEAR["CogVideoX DDIM"]()
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
    table = steps_from_scheduler(scheduler, 61)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps[:61].double().numpy())


@pytest.mark.parametrize("name", LINEAR)
def test_the_timesteps_are_the_schedulers(name: str) -> None:
    scheduler = LINEAR[name]()
    table = steps_from_scheduler(scheduler, 17)
    scheduler.set_timesteps(17)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.double().numpy())


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_that_is_not_linear_is_refused(name: str, tmp_path: Path) -> None:
    scheduler = REFUSED[name]()
    with pytest.raises(CheckpointError, match=f"scheduler {type(scheduler).__name__}: "):
        write_table(scheduler, tmp_path / "sampler.npz", max_steps=12)


def test_the_refusal_of_clipping_says_what_to_switch_off() -> None:
    with pytest.raises(CheckpointError, match="switch clip_sample and thresholding off"):
        steps_from_scheduler(REFUSED["clip_sample"](), 10)


@pytest.mark.parametrize(("name", "samples", "outputs"), [("DDIM of Latte", 1, 1), ("DPM-Solver++ order 2", 2, 2)])
def test_the_recurrence_is_the_shortest_that_fits(name: str, samples: int, outputs: int) -> None:
    table = steps_from_scheduler(LINEAR[name](), 12)
    assert table.sample_coefficients.shape == (12, samples)
    assert table.output_coefficients.shape == (12, outputs)


@pytest.mark.parametrize("name", ["DDIM of Latte", "DPM-Solver++ order 3"])
def test_a_written_table_holds_every_number_of_steps(name: str, tmp_path: Path) -> None:
    write_table(LINEAR[name](), tmp_path / "sampler.npz", max_steps=9)
    table = load_table(tmp_path / "sampler.npz", 9)
    for steps in range(1, 10):
        read, made = table.schedule(steps), steps_from_scheduler(LINEAR[name](), steps)
        width = made.sample_coefficients.shape[1]
        assert read.steps == steps
        np.testing.assert_array_equal(read.timesteps, made.timesteps)
        np.testing.assert_array_equal(read.input_scales, made.input_scales)
        np.testing.assert_array_equal(read.sample_coefficients[:, :width], made.sample_coefficients)
        assert not read.sample_coefficients[:, width:].any()


def test_a_table_that_asks_for_more_arrays_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    write_table(LINEAR["DDIM of Latte"](), tmp_path / "sampler.npz", max_steps=9)
    assert load_table(tmp_path / "sampler.npz", 9, kept=2).max_steps == 9
    with pytest.raises(IntegrityError, match="keeps 2 arrays, not the 1 that its manifest says"):
        load_table(tmp_path / "sampler.npz", 9, kept=1)


@pytest.mark.parametrize("steps", [0, 101, -1])
def test_a_number_of_steps_without_a_table_is_refused(bundle: Path, steps: int) -> None:
    table = load_table(bundle / "sampler.npz", open_bundle(bundle).manifest.sampler.max_steps)
    with pytest.raises(InvalidRequest, match=rf"steps: got {steps}, expected 1 to 100"):
        table.schedule(steps)


@pytest.mark.parametrize("steps", [1, 100])
def test_a_bundle_has_tables_for_1_to_100_steps(bundle: Path, steps: int) -> None:
    assert load_table(bundle / "sampler.npz", 100).schedule(steps).steps == steps


def test_the_noise_a_request_begins_with_is_left_as_it_is() -> None:
    schedule = schedule_from(steps_from_scheduler(LINEAR["Euler"](), 3))
    noise = np.ones((1, 4), np.float32)
    sampler = schedule.begin(noise, no_noise)
    for step in range(3):
        sampler.advance(step, np.ones((1, 4), np.float32))
    assert (noise == 1).all()


def test_samples_stay_in_single_precision() -> None:
    sampler = schedule_from(steps_from_scheduler(LINEAR["Euler"](), 2)).begin(np.ones((1, 4), np.float32), no_noise)
    sampler.advance(0, np.ones((1, 4), np.float32))
    assert sampler.latents.dtype == sampler.model_input(1).dtype == np.float32


def test_a_step_draws_no_noise_that_the_pipelines_do_not_ask_for() -> None:
    """TCD's own eta is 0.3, its pipelines pass 0."""
    assert not steps_from_scheduler(LINEAR["TCD"](), 8).noise_coefficients.any()


def test_a_sampler_that_warms_up_calls_the_model_more_often_than_it_steps(tmp_path: Path) -> None:
    for name, fewest, calls in (("PNDM without Runge-Kutta", 1, [1, 3, 4]), ("PNDM", 4, [13, 14, 15])):
        write_table(LINEAR[name](), tmp_path / "sampler.npz", max_steps=9)
        table = load_table(tmp_path / "sampler.npz", 9)
        assert [table.schedule(steps).steps for steps in range(fewest, fewest + 3)] == calls
        made = steps_from_scheduler(LINEAR[name](), 7)
        np.testing.assert_array_equal(table.schedule(7).timesteps, made.timesteps)
        if fewest > 1:
            with pytest.raises(InvalidRequest, match=f"steps: got {fewest - 1}, expected {fewest} to 9"):
                table.schedule(fewest - 1)


class Broken:
    """A scheduler in whose hands something goes wrong."""

    def __init__(self, where: str, error: Exception) -> None:
        self.where, self.error = where, error
        self.timesteps: list[int] = []

    def set_timesteps(self, steps: int) -> None:
        if self.where == "set_timesteps":
            raise self.error
        self.timesteps = list(range(steps))

    def step(self, output: Any, timestep: Any, sample: Any, return_dict: bool) -> Any:
        raise self.error


@pytest.mark.parametrize("where", ["set_timesteps", "step"])
@pytest.mark.parametrize(
    "error", [AssertionError(), ZeroDivisionError("by zero"), ImportError("no torchsde"), OSError()]
)
def test_whatever_a_scheduler_raises_is_one_line(where: str, error: Exception, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler Broken: .*\(.+\); use another scheduler"):
        write_table(Broken(where, error), tmp_path / "sampler.npz", max_steps=9)


@pytest.mark.parametrize(
    "name", ["DPMSolverSDEScheduler", "SchedulerOutput", "NoSuchScheduler", "logging", "LatteTransformer"]
)
def test_a_scheduler_that_cannot_be_made_is_one_line(name: str, wide_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide_checkpoint, tmp_path / "checkpoint"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", name))
    with pytest.raises(CheckpointError, match=name):
        scheduler_from_checkpoint(Checkpoint("it", folder))


def test_a_scheduler_that_takes_only_so_many_steps_has_tables_for_those(tmp_path: Path) -> None:
    scheduler = TCDScheduler(**BETAS, clip_sample=False, original_inference_steps=6)
    write_table(scheduler, tmp_path / "sampler.npz", max_steps=9)
    described = sampler_from_table(tmp_path / "sampler.npz", scheduler)
    assert (described.scheduler, described.max_steps, described.kept) == ("TCDScheduler", 6, 2)
    assert load_table(tmp_path / "sampler.npz", described.max_steps).schedule(6).steps == 6


def answers_of_an_ideal_model(scheduler: Any, schedule: Schedule, wrong: int, video: float, noise: float) -> float:
    """The last sample of a model that takes the noise in every sample for what it is, off by 1 in one output."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    sampler = schedule.begin(np.full((1, 1), noise), lambda: np.zeros((1, 1)))
    for step in range(schedule.steps):
        signal = schedule.signal_scales[step]
        spread = float(noise_scale(scheduler, schedule.timesteps[step]))
        # the video, where the noise is what it is; there may be none in the first sample
        seen = (sampler.latents[0, 0] - spread * noise) / signal if signal else video
        outputs = {
            "epsilon": noise,
            "sample": seen,
            "v_prediction": signal * noise - spread * seen,
            "flow_prediction": noise - seen,
        }
        sampler.advance(step, np.full((1, 1), outputs[kind] + (step == wrong)))
    return float(sampler.latents[0, 0])


def noise_scale(scheduler: Any, timestep: float) -> Any:
    ones, zeros = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    when = torch.tensor([timestep], dtype=scheduler.timesteps.dtype)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(zeros, when, ones)
    return scheduler.add_noise(zeros, ones, when)


def closeness(name: str) -> float:
    """How near to an ideal model's answer the sensitivity is, as a share of it.

    With linspace, diffusers' DDIM steps to other timesteps than those it calls the model at; and an output that counts
    in several steps moves the samples in between by other shares than one that was off all along would.
    """
    return 0.3 if "linspace" in name else 0.12 if "order 2" in name or "order 3" in name else 0.02


SENSITIVE = [name for name in LINEAR if "DDIM" in name or "order" in name or "flow matching" in name]


@pytest.mark.parametrize("name", SENSITIVE)
@pytest.mark.parametrize("steps", [7, 20])
def test_sensitivities_are_what_an_ideal_model_shows(name: str, steps: int) -> None:
    scheduler = LINEAR[name]()
    schedule = schedule_from(steps_from_scheduler(scheduler, steps))
    scheduler.set_timesteps(steps)
    sensitivities = schedule.sensitivities()
    still = answers_of_an_ideal_model(scheduler, schedule, -1, 0.3, 0.7)
    for wrong in range(1, steps):
        moved = abs(answers_of_an_ideal_model(scheduler, schedule, wrong, 0.3, 0.7) - still)
        assert moved == pytest.approx(sensitivities[wrong], rel=closeness(name), abs=1e-3)
        assert moved > 1e-3


@pytest.mark.parametrize("name", [*LINEAR, *NOISY])
def test_every_scheduler_tells_how_much_signal_its_samples_hold(name: str) -> None:
    scheduler = (LINEAR | NOISY)[name]()
    schedule = schedule_from(steps_from_scheduler(scheduler, 10))
    assert ((schedule.signal_scales >= 0) & (schedule.signal_scales <= 1 + 1e-9)).all()
    assert np.isfinite(schedule.sensitivities()).all()
    assert (np.diff(schedule.signal_scales) > -1e-6).all()
