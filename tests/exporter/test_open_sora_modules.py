"""The parts of Open-Sora 1.2 compute what its models do; its VAE works in chunks; its sizes and timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foresight.engines.errors import InvalidRequest
from foresight.exporter.graph import graph_from_module
from foresight.exporter.models.base import MASKED, ExportRequest
from foresight.exporter.models.open_sora import config, modules, presets, schedule, stdit3, vae
from foresight.exporter.sampler import steps_from_scheduler
from tests.exporter.open_sora import LATENTS, SMALL_VAE, TOLERANCE, pattern, small_transformer, small_vae

PUBLISHED_VAE = config.VideoVAEConfig()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# The transformer in parts


def request() -> dict[str, Tensor]:
    """A prompt of five tokens and one of three, and the same two without."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    return {
        "latents": pattern(4, *LATENTS),
        "timestep": torch.tensor([971.35, 300.0, 971.35, 300.0]),
        "text": pattern(4, 6, 12),
        "text_mask": mask.repeat(2, 1),
        "unconditional": torch.tensor([0, 0, 1, 1]),
    }


def run_parts(model: stdit3.STDiT3, inputs: dict[str, Tensor], height: int = 48, width: int = 56) -> Tensor:
    """One evaluation as the runtime makes it; every block's distance is checked on the way."""
    dtype = model.x_embedder.proj.weight.dtype
    text, bias = modules.Condition(model)(inputs["text"].to(dtype), inputs["text_mask"], inputs["unconditional"])
    prologue = modules.Prologue(model, LATENTS, height, width, fps=24)
    hidden, modulation, time = prologue(inputs["latents"], inputs["timestep"])
    rotation = modules.temporal_rotation(model.rope.freqs, LATENTS[1], dtype)
    for spatial, temporal in model.pairs:
        for block in (modules.Block(spatial), modules.Block(temporal, rotation)):
            new, distance = block(hidden, modulation, hidden.clone(), text, bias)
            torch.testing.assert_close(distance, (new.float() - hidden.float()).square().mean((1, 2, 3)))
            hidden = new
    return modules.Epilogue(model, LATENTS)(hidden, time)  # type: ignore[no-any-return]


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4)])
@pytest.mark.parametrize("pred_sigma", [True, False])
def test_the_parts_in_a_row_are_the_transformer(patch: tuple[int, int, int], pred_sigma: bool) -> None:
    model, inputs = small_transformer(patch_size=patch, pred_sigma=pred_sigma), request()
    whole = model(**inputs, fps=24, height=48, width=56)
    assert whole.shape == (4, 8 if pred_sigma else 4, *LATENTS[1:])
    torch.testing.assert_close(run_parts(model, inputs), whole[:, :4], rtol=0, atol=TOLERANCE)


def test_the_parts_in_bf16_are_the_transformer_in_bf16() -> None:
    """Sides are rounded as well: 1.2 is told of 856 pixels where 854 were asked for."""
    model, inputs = small_transformer().bfloat16(), request()
    whole = model(**inputs, fps=24, height=480, width=856)[:, :4]
    assert torch.equal(run_parts(model, inputs, 480, 854), whole)


def test_the_text_is_finite_where_there_is_none() -> None:
    text, bias = modules.Condition(small_transformer())(
        *(request()[name] for name in ("text", "text_mask", "unconditional"))
    )
    assert text.isfinite().all()
    assert bias.shape == (4, 1, 1, 6)
    assert bias[1].flatten().tolist() == [0, 0, 0, *[MASKED] * 3]


def operators(part: torch.nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]]) -> set[str]:
    outputs = [f"output_{index}" for index in range(2)]
    return {node.op_type for node in graph_from_module(part, inputs, outputs, dynamic, 23).model.graph}


@pytest.mark.slow
def test_graphs_of_any_text_length_have_neither_scatter_nor_sequences() -> None:
    model, inputs = small_transformer(), request()
    rows, text = {0: "batch"}, {0: "batch", 1: "text"}
    names = operators(
        modules.Condition(model),
        {"text_states": inputs["text"], "text_mask": inputs["text_mask"], "unconditional": inputs["unconditional"]},
        {"text_states": text, "text_mask": text, "unconditional": rows},
    )
    hidden = pattern(4, 5, 12, 48)
    names |= operators(
        modules.Block(next(model.pairs)[1], modules.temporal_rotation(model.rope.freqs, 5, torch.float32)),
        {
            "hidden": hidden,
            "modulation": pattern(4, 6, 48),
            "cached_hidden": hidden.clone(),
            "text": pattern(4, 6, 48),
            "text_bias": torch.zeros(4, 1, 1, 6),
        },
        {"hidden": rows, "modulation": rows, "cached_hidden": rows, "text": text, "text_bias": {0: "batch", 3: "text"}},
    )
    assert not {name for name in names if "Scatter" in name or "Sequence" in name}


# The VAE


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (16, 4), (17, 5), (20, 6), (51, 15), (408, 120)])
def test_seventeen_frames_are_five_latents(frames: int, latents: int) -> None:
    assert PUBLISHED_VAE.latent_frames(frames) == latents


@pytest.mark.parametrize("frames", [1, 3, 17, 20, 51])
def test_a_video_comes_back_with_as_many_frames(frames: int) -> None:
    model, video = small_vae(), pattern(1, 3, frames, 4, 6)
    latents = model.encode(video, sample=False)
    assert latents.shape == (1, 4, SMALL_VAE.latent_frames(frames), 2, 3)
    assert model.decode(latents, frames).shape == video.shape


def test_chunks_know_nothing_of_each_other() -> None:
    model, video = small_vae(), pattern(1, 3, 34, 4, 6)
    latents = model.encode(video, sample=False)
    torch.testing.assert_close(model.encode(video[:, :, 17:], sample=False), latents[:, :, 5:], rtol=0, atol=TOLERANCE)
    decoded = model.decode(latents, 34)
    torch.testing.assert_close(model.decode(latents[:, :, 5:], 17), decoded[:, :, 17:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_see_no_later_frame(stride: int) -> None:
    """Where time is halved, none after their own two. Group normalisation does, but only within a chunk."""
    conv = vae.CausalConv3d(4, 4, 3, stride=stride)
    states = pattern(1, 4, 8, 3, 3)
    changed = states.clone()
    changed[:, :, 4] += 1
    same = (conv(changed) == conv(states)).flatten(3).all(-1).all(1)[0].tolist()
    assert same == ([True] * 4 + [False] * 3 + [True] if stride == 1 else [True, True, False, True])


def test_neighbouring_channels_become_neighbouring_frames() -> None:
    states = torch.arange(8.0).view(1, 4, 2, 1, 1)  # two frames of four channels
    assert vae.frames_from_channels(states).flatten(1).tolist() == [[0, 2, 1, 3, 4, 6, 5, 7]]


def test_samples_scatter_around_the_mean() -> None:
    model, video = small_vae(), pattern(1, 3, 17, 4, 6)
    draws = [model.encode(video, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], model.encode(video, sample=False))


@pytest.mark.parametrize(("frames", "chunks"), [(51, [17, 17, 17]), (7, [7])])
def test_the_two_decoders_in_a_row_are_the_vae(frames: int, chunks: list[int]) -> None:
    model = small_vae()
    latents = pattern(4, SMALL_VAE.latent_frames(frames), 5, 3)
    cut = torch.split(latents, 5, dim=1)
    between = torch.cat([modules.TemporalDecoder(model, n)(some) for n, some in zip(chunks, cut, strict=True)])
    assert between.shape == (frames, 4, 5, 3)
    assert between.dtype == torch.float32
    pictures, means = modules.SpatialDecoder(model)(between)
    video = model.decode(latents[None], frames)[0]
    shades = ((video.clamp(-1, 1) + 1) / 2 * 255 + 0.5).permute(1, 2, 3, 0)
    assert pictures.shape == (frames, 10, 6, 3)
    assert pictures.dtype == torch.uint8
    assert (pictures - shades).abs().max() <= 1 + 1e-3
    assert (pictures == shades.to(torch.uint8)).float().mean() > 0.999
    torch.testing.assert_close(means, video.mean((0, 2, 3)))


# Timesteps


def test_timesteps_of_240p_in_two_seconds_are_the_published_ones() -> None:
    flow = schedule.RectifiedFlow(240, 426, 51, torch.bfloat16)
    flow.set_timesteps(30)
    assert flow.timesteps.shape == (30,)
    expected = torch.tensor([1000, 985.96, 971.35, 956.13, 212.04, 147.48, 77.08])
    torch.testing.assert_close(flow.timesteps[[0, 1, 2, 3, -3, -2, -1]], expected, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("size", "rounded", "exact"),
    [((240, 426), 2.421875, 2.418723), ((480, 854), 4.84375, 4.84312), ((720, 1280), 7.25, 7.26184)],
)
def test_larger_videos_have_more_noise_for_longer(size: tuple[int, int], rounded: float, exact: float) -> None:
    ratios = {dtype: float(schedule.timestep_ratio(*size, 51, dtype)) for dtype in (torch.bfloat16, torch.float32)}
    assert ratios == {torch.bfloat16: rounded, torch.float32: pytest.approx(exact, rel=1e-5)}
    assert float(schedule.timestep_ratio(*size, 51, torch.float16)) == ratios[torch.float32]


def test_one_frame_counts_as_one_latent() -> None:
    assert float(schedule.timestep_ratio(512, 512, 1, torch.float32)) == 1
    assert float(schedule.timestep_ratio(512, 512, 17, torch.float32)) == pytest.approx(5**0.5)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_following_the_velocity_leads_from_noise_to_video(steps: int) -> None:
    flow = schedule.RectifiedFlow(240, 426, 51, torch.bfloat16)
    flow.set_timesteps(steps)
    video, noise = pattern(1, 4, 3, 2, 2), pattern(1, 4, 3, 2, 2, phase=1)
    sample = noise
    for timestep in flow.timesteps:
        torch.testing.assert_close(sample, video + timestep / 1000 * (noise - video))
        sample = flow.step(video - noise, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, video)


def test_the_flow_becomes_a_table_of_one_sample_and_one_output() -> None:
    table = steps_from_scheduler(schedule.RectifiedFlow(240, 426, 51, torch.bfloat16), 30)
    assert table.noise_scale == 1
    assert table.sample_coefficients.shape == table.output_coefficients.shape == (30, 1)
    assert table.sample_coefficients == pytest.approx(1)
    assert table.output_coefficients.sum() == pytest.approx(1)
    assert table.output_coefficients[-1, 0] == pytest.approx(0.07708, abs=1e-5)


# Sizes

SIZES = {
    "9:16": ((144, 256), (240, 426), (360, 640), (480, 854), (720, 1280)),
    "16:9": ((256, 144), (426, 240), (640, 360), (854, 480), (1280, 720)),
    "3:4": ((166, 221), (276, 368), (416, 554), (554, 738), (832, 1110)),
    "4:3": ((221, 165), (370, 278), (554, 416), (740, 555), (1108, 832)),
    "1:1": ((192, 192), (320, 320), (480, 480), (640, 640), (960, 960)),
}


@pytest.mark.parametrize("aspect", SIZES)
def test_sizes_are_the_published_ones(aspect: str) -> None:
    assert (
        tuple(presets.preset_size(name, aspect) for name in ("144p", "240p", "360p", "480p", "720p")) == SIZES[aspect]
    )


def test_all_sizes_of_a_row_and_of_a_column_are_alike() -> None:
    """Open-Sora's name 50:27 is wrong: the sizes are 25:12, as those of 12:25 turned around."""
    assert len(presets.ASPECTS) == 17
    for aspect, sizes in presets.ASPECTS.items():
        high, wide = (int(side) for side in aspect.replace("50:27", "25:12").split(":"))
        for (height, width), area in zip(sizes, (36864, 102240, 230400, 409920, 921600), strict=True):
            assert height / width == pytest.approx(high / wide, rel=0.02)
            assert height * width == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize(
    ("resolution", "latents", "patches"),
    [
        ("144p", (4, 15, 18, 32), (9, 16)),
        ("240p", (4, 15, 30, 53), (15, 27)),
        ("360p", (4, 15, 45, 80), (23, 40)),
        ("480p", (4, 15, 60, 106), (30, 53)),
        ("720p", (4, 15, 90, 160), (45, 80)),
    ],
)
def test_two_seconds_have_the_published_latents(
    resolution: str, latents: tuple[int, ...], patches: tuple[int, int]
) -> None:
    size = presets.video_size(ExportRequest(resolution=resolution, aspect="9:16", duration="2s"), PUBLISHED_VAE)
    assert size.latents(PUBLISHED_VAE) == latents
    assert config.STDiT3Config().patches(*latents[2:]) == patches


def test_who_asks_for_nothing_gets_the_default() -> None:
    assert presets.video_size(ExportRequest(), PUBLISHED_VAE) == presets.VideoSize(240, 426, 51)
    assert presets.video_size(ExportRequest(duration="16s"), PUBLISHED_VAE) == presets.VideoSize(240, 426, 408)
    assert presets.video_size(ExportRequest(aspect="1:1"), PUBLISHED_VAE) == presets.VideoSize(320, 320, 51)
    small = presets.VideoSize(32, 32, 17)
    assert presets.video_size(ExportRequest(width=48), SMALL_VAE, small) == presets.VideoSize(32, 48, 17)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resolution": "1080p"}, "resolution: got '1080p', expected one of 144p, 240p"),
        ({"aspect": "16:10"}, "aspect: got '16:10', expected one of 3:8, "),
        ({"duration": "3s"}, "duration: got '3s', expected one of 2s, 4s, 8s, 16s, 32s"),
        ({"resolution": "240p", "height": 240}, "resolution and aspect: got height and width as well"),
        ({"duration": "2s", "frames": 51}, "duration: got frames as well"),
        ({"height": 7}, "height: got 7, expected 8 pixels or more"),
        ({"height": 1080, "width": 1920}, "got 1080 x 1920, expected at most 924408 pixels"),
        ({"frames": 18}, "frames: got 18, expected 1 to 17, or a multiple of 17 up to 816"),
        ({"frames": 833}, "frames: got 833, expected 1 to 17, or a multiple of 17 up to 816"),
    ],
)
def test_other_sizes_are_refused_with_what_is_possible(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        presets.video_size(ExportRequest(**asked), PUBLISHED_VAE)
    assert message in str(caught.value)
