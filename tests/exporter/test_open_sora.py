"""Open-Sora 1.2 as published: the names and shapes of its weights, and what the transformer computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foresight.engines.errors import CheckpointError
from foresight.exporter.models.open_sora import config, stdit3, vae
from tests.exporter.open_sora import LATENTS, SMALL_VAE, SPATIAL, TOLERANCE, pattern, small_transformer, small_vae

CONFIG: dict[str, Any] = {
    "architectures": ["STDiT3"],
    "caption_channels": 4096,
    "class_dropout_prob": 0.1,
    "depth": 28,
    "drop_path": 0.0,
    "enable_flash_attn": True,
    "freeze_y_embedder": True,
    "hidden_size": 1152,
    "in_channels": 4,
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "mlp_ratio": 4.0,
    "model_max_length": 300,
    "model_type": "STDiT3",
    "num_heads": 16,
    "patch_size": [1, 2, 2],
    "pred_sigma": True,
    "qk_norm": True,
    "skip_y_embedder": False,
    "torch_dtype": "float32",
}
VAE_CONFIG: dict[str, Any] = {
    "architectures": ["VideoAutoencoderPipeline"],
    "micro_frame_size": 17,
    "model_type": "VideoAutoencoderPipeline",
    "vae_2d": {
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "micro_batch_size": 4,
        "subfolder": "vae",
        "type": "VideoAutoencoderKL",
    },
    "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# The published checkpoints


def linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def published_transformer() -> dict[str, tuple[int, ...]]:
    dim = 1152
    names: dict[str, tuple[int, ...]] = {
        "rope.freqs": (36,),
        "x_embedder.proj.weight": (dim, 4, 1, 2, 2),
        "x_embedder.proj.bias": (dim,),
        "y_embedder.y_embedding": (300, 4096),
        "final_layer.scale_shift_table": (2, dim),
        **linear("t_block.1", 6 * dim, dim),
        **linear("y_embedder.y_proj.fc1", dim, 4096),
        **linear("y_embedder.y_proj.fc2", dim, dim),
        **linear("final_layer.linear", 32, dim),
    }
    for embedder in ("t_embedder", "fps_embedder"):
        names |= linear(f"{embedder}.mlp.0", dim, 256) | linear(f"{embedder}.mlp.2", dim, dim)
    for block in (f"{kind}_blocks.{index}" for kind in ("spatial", "temporal") for index in range(28)):
        names |= {f"{block}.scale_shift_table": (6, dim)}
        names |= {f"{block}.attn.q_norm.weight": (72,), f"{block}.attn.k_norm.weight": (72,)}
        names |= linear(f"{block}.attn.qkv", 3 * dim, dim) | linear(f"{block}.attn.proj", dim, dim)
        names |= linear(f"{block}.cross_attn.q_linear", dim, dim) | linear(f"{block}.cross_attn.proj", dim, dim)
        names |= linear(f"{block}.cross_attn.kv_linear", 2 * dim, dim)
        names |= linear(f"{block}.mlp.fc1", 4 * dim, dim) | linear(f"{block}.mlp.fc2", dim, 4 * dim)
    return names


def test_the_transformer_has_the_published_weights() -> None:
    with torch.device("meta"):
        state = stdit3.STDiT3(config.STDiT3Config.from_json(CONFIG)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == published_transformer()
    assert len(state) == 973
    assert sum(tensor.numel() for tensor in state.values()) == 1_208_872_772


def test_the_vae_has_the_published_weights() -> None:
    with torch.device("meta"):
        state = vae.VideoVAE(config.VideoVAEConfig.from_json(VAE_CONFIG)).state_dict()
    sizes = {
        stage: sum(tensor.numel() for name, tensor in state.items() if name.startswith(stage))
        for stage in ("spatial_vae.module.", "temporal_vae.")
    }
    assert sizes == {"spatial_vae.module.": 83_653_863, "temporal_vae.": 309_687_144}
    expected = {
        "encoder.conv_in.conv.weight": (128, 4, 3, 3, 3),
        "encoder.block_res_blocks.1.0.conv3.conv.weight": (256, 128, 1, 1, 1),
        "encoder.block_res_blocks.3.0.conv3.conv.weight": (512, 256, 1, 1, 1),
        "encoder.conv_blocks.1.conv.weight": (256, 256, 3, 3, 3),
        "encoder.conv_blocks.2.conv.bias": (256,),
        "encoder.conv2.conv.weight": (8, 512, 1, 1, 1),
        "quant_conv.conv.weight": (8, 8, 1, 1, 1),
        "post_quant_conv.conv.weight": (4, 4, 1, 1, 1),
        "decoder.conv1.conv.bias": (512,),
        "decoder.block_res_blocks.2.0.conv3.conv.weight": (256, 512, 1, 1, 1),
        "decoder.block_res_blocks.0.0.conv3.conv.weight": (128, 256, 1, 1, 1),
        "decoder.conv_blocks.1.conv.weight": (512, 256, 3, 3, 3),
        "decoder.conv_blocks.2.conv.weight": (1024, 512, 3, 3, 3),
        "decoder.norm1.weight": (128,),
        "decoder.conv_out.conv.weight": (4, 128, 3, 3, 3),
    }
    assert {name: tuple(state[f"temporal_vae.{name}"].shape) for name in expected} == expected
    assert state["scale"].shape == state["shift"].shape == (1, 4, 1, 1, 1)
    without = ("encoder.conv_in.conv.bias", "encoder.conv_blocks.0.conv.weight", "decoder.res_blocks.0.conv1.conv.bias")
    assert not any(f"temporal_vae.{name}" in state for name in without)


def test_the_transformer_computes_what_the_original_computes() -> None:
    """Expected are every 67th value of what STDiT3 of Open-Sora v1.2.0 returned for the same weights and inputs."""
    text = torch.cat([pattern(1, 6, 12, phase=1), torch.zeros(1, 6, 12)])
    output = small_transformer()(
        pattern(1, 4, 3, 3, 5).repeat(2, 1, 1, 1, 1),
        torch.tensor([985.96, 985.96]),
        text,
        torch.tensor([[1, 1, 1, 1, 0, 0]]).repeat(2, 1),
        fps=24,
        height=24,
        width=40,
        unconditional=torch.tensor([0, 1]),
    )
    expected = (0.05155, -0.0246, 1.05275, 0.226, -0.40382, 0.39391, 0.7998, 0.72738, 0.64039, -0.59643, -0.1467)
    torch.testing.assert_close(output.flatten()[::67], torch.tensor(expected), rtol=0, atol=2e-5)


def test_the_vae_computes_what_the_original_computes() -> None:
    """Expected are values of what VideoAutoencoderPipeline of Open-Sora v1.2.0 returned, likewise."""
    model = small_vae()
    video = model.decode(pattern(1, 4, 6, 2, 3), frames=20)
    expected = (-0.40018, 1.86512, 0.88273, 0.76726, -0.49698, 0.46241, -0.55075, -0.15472, -0.54153, 0.25888)
    torch.testing.assert_close(video.flatten()[::157], torch.tensor(expected), rtol=0, atol=2e-5)
    mean, logvar = model.temporal_vae.encode(pattern(1, 4, 7, 2, 3))
    expected_mean = (0.10913, 0.30265, 0.13621, 0.03968, 0.11635, -0.02482, 0.03992)
    expected_logvar = (-0.43355, -0.39331, 0.03536, 0.13211, 0.40547, 0.48418, -0.08378)
    torch.testing.assert_close(mean.flatten()[::7], torch.tensor(expected_mean), rtol=0, atol=2e-5)
    torch.testing.assert_close(logvar.flatten()[::7], torch.tensor(expected_logvar), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qk_norm": False}, "qk_norm"),
        ({"skip_y_embedder": True}, "skip_y_embedder"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"patch_size": 2}, "patch_size"),
        ({"num_heads": 16.5}, "num_heads"),
        ({"hidden_size": 1150}, "hidden_size"),
        ({"depth": 0}, "depth"),
        ({"model_type": "STDiT2"}, "model_type"),
        ({"time_scale": 1.0}, "time_scale"),
    ],
)
def test_a_transformer_of_another_kind_is_refused_by_the_setting_that_differs(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        config.STDiT3Config.from_json(CONFIG | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "VQ"}, "model_type"),
        ({"overlap": 2}, "overlap"),
        ({"vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": "someone/else"}}, "vae_2d from_pretrained"),
        ({"vae_2d": {"type": "VideoAutoencoderKL", "config": {"latent_channels": 16}}}, "latent_channels"),
        ({"vae_temporal": {"type": "VAE_Temporal_SD", "filters": 8}}, "vae_temporal filters"),
        ({"vae_temporal": {"type": "VAE_Temporal"}}, "temporal_downsample"),
        ({"vae_temporal": {"type": "VAE_Temporal", "temporal_downsample": [True]}}, "temporal_downsample"),
    ],
)
def test_a_vae_of_another_kind_is_refused_by_the_setting_that_differs(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        config.VideoVAEConfig.from_json(VAE_CONFIG | change)


def test_small_vaes_bring_their_own_sizes() -> None:
    sizes = {"filters": 8, "num_res_blocks": 1, "temporal_downsample": [False, True, True], "num_groups": 4}
    settings = VAE_CONFIG | {
        "vae_2d": {"type": "VideoAutoencoderKL", "config": SPATIAL},
        "vae_temporal": {"type": "VAE_Temporal", **sizes},
    }
    assert config.VideoVAEConfig.from_json(settings) == SMALL_VAE


# What the transformer is made of


def test_scalars_are_embedded_by_cosines_then_sines() -> None:
    embedded = stdit3.sinusoid(torch.tensor([0.0, 24.0]))
    assert torch.equal(embedded[0], torch.tensor([1.0] * 128 + [0.0] * 128))
    assert embedded[1, 0].item() == pytest.approx(math.cos(24), abs=1e-6)
    assert embedded[1, 128 + 1].item() == pytest.approx(math.sin(24 * 10000 ** (-1 / 128)), abs=1e-5)


def test_positions_have_the_column_in_the_first_half_and_the_row_in_the_second() -> None:
    rows, columns, dim = 15, 27, 1152
    scale = math.sqrt(240 * 426) / 512
    table = stdit3.position_embedding(dim, (rows, columns), scale, torch.float32).view(rows, columns, dim)
    assert torch.equal(table[3, :, : dim // 2], table[11, :, : dim // 2])
    assert torch.equal(table[:, 4, dim // 2 :], table[:, 20, dim // 2 :])
    side = round(math.sqrt(rows * columns))
    column, row = (at / scale * side / count for at, count in ((7, columns), (5, rows)))
    second = 10000 ** (-2 / 576)
    for start, at in ((0, column), (dim // 2, row)):
        got = table[5, 7, start : start + dim // 2]
        assert got[0].item() == pytest.approx(math.sin(at), abs=1e-5)
        assert got[1].item() == pytest.approx(math.sin(at * second), abs=1e-5)
        assert got[288].item() == pytest.approx(math.cos(at), abs=1e-5)


def test_neighbouring_channels_rotate_as_a_pair() -> None:
    frequencies = stdit3.rotary_frequencies(72)
    assert frequencies.shape == (36,)
    assert frequencies[5].item() == pytest.approx(10000 ** (-10 / 72))
    states = pattern(1, 1, 3, 72)
    turned = stdit3.rotate(states, *stdit3.rotation_table(frequencies, 3))
    first, second = states[0, 0, 2, 10].item(), states[0, 0, 2, 11].item()
    angle = 2 * frequencies[5].item()
    assert turned[0, 0, 2, 10].item() == pytest.approx(first * math.cos(angle) - second * math.sin(angle), abs=1e-6)
    assert turned[0, 0, 2, 11].item() == pytest.approx(second * math.cos(angle) + first * math.sin(angle), abs=1e-6)
    assert torch.equal(turned[:, :, 0], states[:, :, 0])


@pytest.mark.parametrize("temporal", [False, True])
def test_spatial_blocks_mix_positions_and_temporal_blocks_mix_frames(temporal: bool) -> None:
    model = small_transformer()
    rotation = stdit3.rotation_table(model.rope.freqs, 3) if temporal else None
    hidden, modulation, text, bias = pattern(1, 3, 4, 48), pattern(1, 6, 48), pattern(1, 2, 48), torch.zeros(1, 1, 1, 2)
    changed = hidden.clone()
    changed[0, 1, 2] += 1
    block = model.spatial_blocks[0]
    before, after = (block(states, modulation, text, bias, rotation) for states in (hidden, changed))
    touched = (before != after).any(-1)[0]
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[:, 2] = temporal
    expected[1] = expected[1] | (not temporal)
    assert torch.equal(touched, expected)


def run(model: stdit3.STDiT3, rows: slice = slice(None), tokens: int = 6, **changes: Any) -> Tensor:
    """Two prompts of 5 and 3 tokens, or some of them, cut to a number of tokens."""
    inputs = {
        "latents": pattern(2, *LATENTS),
        "timestep": torch.tensor([900.0, 300.0]),
        "text": pattern(2, 6, 12),
        "text_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]),
    } | changes
    inputs = {name: tensor[rows] for name, tensor in inputs.items()}
    inputs |= {name: inputs[name][:, :tokens] for name in ("text", "text_mask")}
    return model(**inputs, fps=24, height=48, width=56)  # type: ignore[no-any-return]


def test_a_prompt_in_a_batch_is_the_prompt_alone_without_its_padding() -> None:
    model = small_transformer()
    together = run(model)
    for row, tokens in ((0, 5), (1, 3)):
        torch.testing.assert_close(run(model, slice(row, row + 1), tokens)[0], together[row], rtol=0, atol=TOLERANCE)


def test_an_unconditional_row_reads_the_first_tokens_of_the_trained_empty_prompt() -> None:
    model = small_transformer()
    null = model.y_embedder.y_embedding
    marked = run(model, unconditional=torch.tensor([0, 1]))
    assert torch.equal(marked, run(model, text=torch.stack([pattern(2, 6, 12)[0], null])))
    null[3:] = 0  # the second row has three tokens
    torch.testing.assert_close(run(model, unconditional=torch.tensor([0, 1])), marked, rtol=0, atol=TOLERANCE)


def test_in_bf16_the_timestep_is_rounded_as_in_the_original() -> None:
    model = small_transformer().bfloat16()
    assert torch.equal(run(model, timestep=torch.full((2,), 985.96)), run(model, timestep=torch.full((2,), 984.0)))


def test_all_weights_learn_but_the_stored_constants() -> None:
    model = small_transformer()
    with torch.enable_grad():
        run(model).square().mean().backward()  # type: ignore[no-untyped-call]
    still = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert still == {"rope.freqs", "y_embedder.y_embedding"}
