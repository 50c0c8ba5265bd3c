"""The parts of CogVideoX compute what diffusers' models do; its VAE decodes in chunks to the same frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn

from foresight.engines.arrays import numpy_dtype
from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.engines.manifest import Part, TensorSpec
from foresight.engines.onnxruntime import OnnxRuntimeBackend
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.graph import graph_from_module, write_graph
from foresight.exporter.models.base import float_spec, frame_specs
from foresight.exporter.models.cogvideox import check_config, modules
from foresight.exporter.models.cogvideox.vae import (
    ChunkDecoder,
    check_vae,
    chunk_frames,
    chunk_lengths,
    count_latent_frames,
)

Shapes = dict[str, tuple[int | str, ...]]

HEADS, HEAD_DIM, TEXT, TEXT_WIDTH, TIME = 2, 16, 7, 12, 8
DIM = HEADS * HEAD_DIM
OWN_SIZE, OTHER_SIZE = (3, 4, 6, 10), (2, 4, 10, 6)  # one video's latents; the model's own, and another
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def small_transformer(rotary: bool, **config: Any) -> CogVideoXTransformer3DModel:
    """Two blocks with weights large enough for a mistake in any of them to show."""
    torch.manual_seed(0)
    frames, channels, height, width = OWN_SIZE
    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        time_embed_dim=TIME,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=width,
        sample_height=height,
        sample_frames=4 * (frames - 1) + 1,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
        **config,
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def published_rotary(model: CogVideoXTransformer3DModel, latents: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """The tables as the pipeline makes them."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=None)
    frames, _, height, width = latents
    scale = pipeline.vae_scale_factor_spatial
    cos, sin = pipeline._prepare_rotary_positional_embeddings(
        height * scale, width * scale, frames, torch.device("cpu")
    )
    return cos, sin


def block_inputs(rows: int, tokens: int, rotary: bool) -> dict[str, Tensor]:
    """Random inputs of a block, by name."""
    streams = {"hidden": (rows, tokens, DIM), "text": (rows, TEXT, DIM)}
    shapes = streams | {"time": (rows, TIME)} | {f"cached_{name}": shape for name, shape in streams.items()}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    angles = torch.rand(tokens, HEAD_DIM) * 6
    return inputs | ({"rotary_cos": angles.cos(), "rotary_sin": angles.sin()} if rotary else {})


def specs_of(shapes: Shapes) -> tuple[TensorSpec, ...]:
    return tuple(float_spec(name, "fp32", *shape) for name, shape in shapes.items())


class ExportedPart:
    """A module as a graph that ONNX Runtime runs; `operators` counts its nodes."""

    def __init__(
        self, module: nn.Module, example: dict[str, Tensor], inputs: tuple[TensorSpec, ...], outputs: Any, folder: Path
    ) -> None:
        names = [spec.name for spec in outputs]
        dynamic = {
            spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs
        }
        graph = graph_from_module(module, example, names, dynamic, opset=23)
        self.operators = Counter(node.op_type for node in graph.model.graph)
        path, _ = write_graph(graph, module.get_parameter, folder / "part.onnx")
        part = Part(name="part", kind="part", graph=path.name, inputs=inputs, outputs=outputs, max_difference=0)
        self.outputs = outputs
        self.engine = OnnxRuntimeBackend().load_graph(path, part)

    def __call__(self, inputs: dict[str, Tensor], sizes: Mapping[str, int]) -> list[Tensor]:
        results = {spec.name: np.empty(spec.resolve(sizes), numpy_dtype(spec.dtype)) for spec in self.outputs}
        self.engine.run({name: tensor.numpy() for name, tensor in inputs.items()} | results)
        return [torch.from_numpy(result) for result in results.values()]


# The transformer in parts


@pytest.mark.parametrize("latents", [OWN_SIZE, OTHER_SIZE, (1, 4, 2, 6)])
@pytest.mark.parametrize("rotary", [False, True])
def test_the_parts_in_a_row_are_the_transformer(rotary: bool, latents: tuple[int, ...]) -> None:
    model = small_transformer(rotary)
    video, timestep, states = torch.randn(2, *latents), torch.tensor([3.0, 971.0]), torch.randn(2, TEXT, TEXT_WIDTH)
    condition = modules.Condition(model, latents)(states)
    embedding, *tables = condition if rotary else (condition,)
    hidden, text, time = modules.Prologue(model, latents)(video, timestep, embedding)
    for layer in model.transformer_blocks:
        hidden, text, _ = modules.Block(layer)(hidden, text, time, hidden.clone(), text.clone(), *tables)
    output = modules.Epilogue(model, latents)(hidden, time)
    whole = model(video, states, timestep, image_rotary_emb=published_rotary(model, latents)).sample
    torch.testing.assert_close(output, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("latents", [OWN_SIZE, OTHER_SIZE])
def test_positions_are_rounded_to_the_models_dtype_before_they_are_added(latents: tuple[int, ...]) -> None:
    model = nn.Module.to(small_transformer(rotary=False), torch.bfloat16)
    video, states = torch.randn(2, *latents), torch.randn(2, TEXT, TEXT_WIDTH, dtype=torch.bfloat16)
    hidden, _, time = modules.Prologue(model, latents)(video, torch.tensor([3.0, 971.0]), torch.zeros(2, TEXT, DIM))
    assert time.dtype == torch.bfloat16
    assert torch.equal(hidden, model.patch_embed(states, video.bfloat16())[:, TEXT:])


@pytest.mark.parametrize("rotary", [False, True])
def test_the_distance_is_the_mean_over_both_streams(rotary: bool) -> None:
    inputs = block_inputs(3, 20, rotary)
    new_hidden, new_text, distance = modules.Block(small_transformer(rotary).transformer_blocks[0])(**inputs)
    changes = [new_hidden.double() - inputs["cached_hidden"], new_text.double() - inputs["cached_text"]]
    expected = torch.cat(changes, 1).square().mean((1, 2))
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)


def test_each_stream_counts_for_its_share_of_the_tokens() -> None:
    video, text = torch.zeros(2, 30, DIM), torch.zeros(2, 10, DIM)
    assert modules.change_of_both(video, video + 2, text, text).tolist() == [3.0, 3.0]
    assert modules.change_of_both(video, video, text, text + 2).tolist() == [1.0, 1.0]


def test_the_distance_of_large_fp16_values_is_finite() -> None:
    video, text = torch.full((1, 4, DIM), 6e4).half(), torch.zeros(1, 4, DIM).half()
    assert modules.change_of_both(video, -video, text, text).item() == pytest.approx(7.2e9, rel=1e-3)


# Its graphs


@pytest.mark.parametrize("rotary", [False, True])
def test_a_blocks_graph_computes_what_the_original_block_does(rotary: bool, tmp_path: Path) -> None:
    block = modules.Block(small_transformer(rotary).transformer_blocks[1])
    video, text = ("batch", "tokens", DIM), ("batch", TEXT, DIM)
    tables: Shapes = {f"rotary_{name}": ("tokens", HEAD_DIM) for name in ("cos", "sin")} if rotary else {}
    cached: Shapes = {"cached_hidden": video, "cached_text": text}
    inputs = specs_of(cached | tables | {"hidden": video, "text": text, "time": ("batch", TIME)})
    outputs = specs_of({"new_hidden": video, "new_text": text, "distance": ("batch",)})
    part = ExportedPart(block, block_inputs(2, 10, rotary), inputs, outputs, tmp_path)
    assert part.operators["Attention"] == 1
    assert not [name for name in part.operators if "Scatter" in name or "Sequence" in name]
    for rows, tokens in ((1, 15), (3, 8)):
        given = block_inputs(rows, tokens, rotary)
        results = part(given, {"batch": rows, "tokens": tokens})
        for result, expected in zip(results, block.reference(**given), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=TOLERANCE)


def test_the_rotary_tables_are_outputs_of_the_conditions_graph(tmp_path: Path) -> None:
    model, states = small_transformer(rotary=True), torch.randn(2, TEXT, TEXT_WIDTH)
    inputs = specs_of({"text_states": ("batch", TEXT, TEXT_WIDTH)})
    tables: Shapes = {"rotary_cos": (45, HEAD_DIM), "rotary_sin": (45, HEAD_DIM)}
    outputs = specs_of({"text_embedding": ("batch", TEXT, DIM), **tables})
    condition = modules.Condition(model, OWN_SIZE)
    text, cos, sin = ExportedPart(condition, {"text_states": states}, inputs, outputs, tmp_path)(
        {"text_states": states[:1]}, {"batch": 1}
    )
    torch.testing.assert_close(text, model.patch_embed.text_proj(states[:1]), rtol=0, atol=TOLERANCE)
    published = published_rotary(model, OWN_SIZE)
    assert published is not None
    assert torch.equal(cos, published[0]) and torch.equal(sin, published[1])


def test_the_prologues_graph_begins_the_text_with_its_embedding(tmp_path: Path) -> None:
    prologue = modules.Prologue(small_transformer(rotary=False), OWN_SIZE)
    shapes: dict[str, tuple[int, ...]] = {"latents": OWN_SIZE, "timestep": (), "text_embedding": (TEXT, DIM)}
    inputs = specs_of({name: ("batch", *shape) for name, shape in shapes.items()})
    outputs = specs_of({"hidden": ("batch", 45, DIM), "text": ("batch", TEXT, DIM), "time": ("batch", TIME)})
    given = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    results = ExportedPart(prologue, given, inputs, outputs, tmp_path)(given, {"batch": 2})
    for result, expected in zip(results, prologue(**given), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(results[1], given["text_embedding"])


# What cannot be exported


@pytest.mark.parametrize(
    "config", [{"patch_size_t": 2}, {"ofs_embed_dim": 8}, {"use_learned_positional_embeddings": True}]
)
def test_models_of_another_kind_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    name, value = next(iter(config.items()))
    with pytest.raises(
        CheckpointError, match=rf"checkpoint tiny: transformer {name} is {value!r}, expected .*, choose"
    ):
        check_config(Checkpoint("tiny", tmp_path), small_transformer(rotary=True, **config))


@pytest.mark.parametrize("rotary", [False, True])
def test_text_to_video_models_are_not_refused(rotary: bool, tmp_path: Path) -> None:
    check_config(Checkpoint("tiny", tmp_path), small_transformer(rotary))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"temporal_compression_ratio": 4}, r"ratio is 4, expected one of 1, 2, as it has 2 blocks"),
        ({"temporal_compression_ratio": 3}, r"ratio is 3, expected one of 1, 2"),
        (
            {"temporal_compression_ratio": 2, "use_post_quant_conv": True},
            r"use_post_quant_conv is True, expected False",
        ),
    ],
)
def test_a_vae_that_does_not_do_what_it_says_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint tiny: vae .*{reason}"):
        check_vae(Checkpoint("tiny", tmp_path), small_vae((4, 4), **config))


# The VAE in chunks


def small_vae(channels: tuple[int, ...] = (8, 16, 16), layers: int = 1, **config: Any) -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * len(channels),
        up_block_types=["CogVideoXUpBlock3D"] * len(channels),
        block_out_channels=channels,
        latent_channels=4,
        layers_per_block=layers,
        norm_num_groups=4,
        **config,
    ).eval()


def decode_whole(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """The original, before rounding: (3, frames, height, width)."""
    scaled = (latents.transpose(0, 1)[None] / vae.config.scaling_factor).to(vae.dtype)
    return vae.decode(scaled).sample[0]  # type: ignore[no-any-return]


def grey_levels(pixels: Tensor) -> Tensor:
    """As VideoProcessor makes them of the VAE's output, before rounding: (frames, height, width, 3)."""
    return (pixels.double().permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255


def chunks(latents: Tensor) -> Iterator[tuple[bool, Tensor]]:
    for index, chunk in enumerate(torch.split(latents, list(chunk_lengths(len(latents))))):
        yield index == 0, chunk


def named(state: list[Tensor]) -> dict[str, Tensor]:
    return {f"state_{index:03d}": tensor for index, tensor in enumerate(state)}


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("channels", "ratio"), [((8, 16, 16), 4), ((8, 16), 2), ((4, 8, 8), 1)])
def test_chunks_are_decoded_to_the_frames_of_the_whole(
    channels: tuple[int, ...], ratio: int, latent_frames: int
) -> None:
    vae = small_vae(channels, temporal_compression_ratio=ratio)
    latents = torch.randn(latent_frames, 4, 3, 5)
    whole, pixels, frames = decode_whole(vae, latents), [], []
    state: list[Tensor] = []
    for first, chunk in chunks(latents):
        pixels.append(ChunkDecoder(vae, first).pixels(chunk, *state)[0])
        rounded, *state, means = ChunkDecoder(vae, first)(chunk, **named(state))
        torch.testing.assert_close(means, pixels[-1].mean((0, 2, 3)))
        assert len(rounded) == chunk_frames(len(chunk), ratio)
        frames.append(rounded)
    torch.testing.assert_close(torch.cat(pixels, 1), whole, rtol=0, atol=TOLERANCE)
    assert (torch.cat(frames) - grey_levels(whole)).abs().max() <= 1


@pytest.mark.parametrize("latent_frames", [1, 3])
def test_state_and_frames_are_those_of_the_original_decoder(latent_frames: int) -> None:
    vae = small_vae()
    first, following = ChunkDecoder(vae, first=True), ChunkDecoder(vae, first=False)
    state: list[Tensor] = []
    for decoder, length in ((first, latent_frames), (following, 2), (following, 2)):
        latents = torch.randn(length, 4, 3, 5)
        expected = decoder.reference(latents, **named(state))
        frames, *state, means = decoder(latents, **named(state))
        torch.testing.assert_close(frames.float(), expected[0].float(), rtol=0, atol=1)
        torch.testing.assert_close([*state, means], list(expected[1:]), rtol=0, atol=TOLERANCE)
        assert [(len(tensor), tensor.shape[3]) for tensor in state] == decoder.state_sizes()


def test_decoding_in_half_precision_is_close() -> None:
    vae = small_vae()
    latents = torch.randn(3, 4, 3, 5)
    expected = grey_levels(decode_whole(vae, latents))
    frames, *state, _ = ChunkDecoder(nn.Module.to(vae, torch.float16), first=True)(latents)
    assert {tensor.dtype for tensor in state} == {torch.float16}
    assert (frames - expected).abs().max() <= 3


@pytest.mark.slow
def test_the_graphs_of_first_and_later_chunks_decode_a_video(tmp_path: Path) -> None:
    vae = small_vae((4, 4), layers=0, temporal_compression_ratio=2)
    sizes = ChunkDecoder(vae, first=True).state_sizes()
    states: Shapes = {
        f"state_{index:03d}": (channels, 2, "latent_height", scale, "latent_width", scale)
        for index, (channels, scale) in enumerate(sizes)
    }
    frames = []
    state: list[Tensor] = []
    latents = torch.randn(5, 4, 3, 2)
    for first, chunk in chunks(latents):
        length = len(chunk)
        cut: Shapes = {"latents": (length, 4, "latent_height", "latent_width")}
        inputs = specs_of(cut if first else cut | states)
        made, means = frame_specs(chunk_frames(length, 2))
        outputs = (made, *specs_of({f"new_{name}": shape for name, shape in states.items()}), means)
        traced = {"latent_height": 2, "latent_width": 4}
        example = {spec.name: torch.randn(spec.resolve(traced)) for spec in inputs}
        part = ExportedPart(ChunkDecoder(vae, first), example, inputs, outputs, tmp_path)
        result, *state, _ = part(
            {"latents": chunk} | named(state),
            {"latent_height": 3, "latent_width": 2, "height": 6, "width": 4},
        )
        frames.append(result)
    assert (torch.cat(frames) - grey_levels(decode_whole(vae, latents))).abs().max() <= 1


def test_the_odd_frame_is_decoded_with_the_first_chunk() -> None:
    assert [chunk_lengths(frames) for frames in (1, 2, 3, 4, 13)] == [(1,), (2,), (3,), (2, 2), (3, 2, 2, 2, 2, 2)]


@pytest.mark.parametrize(
    ("frames", "ratio", "latent_frames"),
    [(1, 4, 1), (8, 4, 2), (9, 4, 3), (16, 4, 4), (17, 4, 5), (49, 4, 13), (5, 2, 3), (6, 1, 6), (7, 1, 7), (1, 1, 1)],
)
def test_frames_that_the_vae_makes_as_asked(frames: int, ratio: int, latent_frames: int) -> None:
    assert count_latent_frames(frames, ratio) == latent_frames


@pytest.mark.parametrize(
    ("frames", "ratio", "made", "choice"),
    [
        (5, 4, 8, "choose 1 or 8"),
        (13, 4, 16, "choose 9 or 16"),
        (11, 4, 9, "choose 9 or 16"),
        (3, 2, 4, "choose 1 or 4"),
    ],
)
def test_frames_that_the_vae_would_make_more_or_fewer_of_are_refused(
    frames: int, ratio: int, made: int, choice: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"frames: got {frames}, which the VAE decodes to {made}, .*{choice}"):
        count_latent_frames(frames, ratio)
    vae = small_vae((4, 4, 4), layers=0, temporal_compression_ratio=ratio)
    assert decode_whole(vae, torch.randn((frames - 1) // ratio + 1, 4, 2, 2)).shape[1] == made
