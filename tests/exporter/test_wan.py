"""The parts of Wan compute what diffusers' models do, in the dtypes that it keeps them in; its VAE frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.coverage import check_coverage
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.models import split_checkpoint
from foresight.exporter.models.base import TORCH_DTYPES, Split
from foresight.exporter.models.wan.modules import rotary_tables
from foresight.exporter.models.wan.vae import FrameDecoder, count_latent_frames
from tests.support import load_pipeline
from zoo import wan, write_published

SIZES: dict[str, Any] = {"height": 16, "width": 32, "frames": 5, "max_batch": 1}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, like Wan 2.1."""
    return wan.write_random(tmp_path_factory.mktemp("checkpoints") / "wan", layers=1)


def split(folder: Path, **request: Any) -> Split:
    return split_checkpoint("wan", Checkpoint("wan", folder), ExportRequest(**SIZES | request))


def configure(folder: Path, file: str, **settings: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


# The transformer in parts


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_diffusers_keeps_in_fp32_stays_there(checkpoint: Path, dtype: str) -> None:
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=TORCH_DTYPES[dtype])
    expected = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert len(set(expected.values())) == 2
    taken = split(checkpoint, dtype=dtype)
    for plan in taken.parts:
        if plan.component == "transformer":
            stored = [name for name, _ in plan.reads(Checkpoint("wan", checkpoint))]
            for name, parameter in zip(stored, plan.module.parameters(), strict=True):
                assert parameter.dtype == expected.pop(name), name
    assert not expected


def test_rotary_tables_hold_each_angle_of_the_original_once_and_unrounded(checkpoint: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    latents = (4, 3, 6, 10)
    whole_cos, whole_sin = model.rope(torch.empty(1, *latents))
    cos, sin = rotary_tables(model.half(), latents)
    for whole, table in ((whole_cos, cos), (whole_sin, sin)):
        assert torch.equal(table.repeat_interleave(2, -1), whole[0, :, 0]) and table.dtype == torch.float32


def test_the_states_of_padding_are_zeros(checkpoint: Path) -> None:
    module = UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    encoder = split(checkpoint).text_encoder.module
    encoder.encoder = module
    ids, mask = torch.randint(2, 100, (2, 9)), (torch.arange(9)[None] < torch.tensor([[9], [4]])).long()
    states = encoder(ids, mask)
    assert torch.equal(states[0], module(ids[:1], mask[:1]).last_hidden_state[0])
    assert states[1, :4].abs().min() > 0 and not states[1, 4:].any()


# The VAE


@pytest.mark.parametrize("residual", [False, True])
def test_frames_decoded_one_by_one_are_those_of_the_whole(residual: bool, tmp_path: Path) -> None:
    folder = wan.write_random(tmp_path / "wan", residual=residual, vae={"num_res_blocks": 1})
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    latents = torch.randn(4, 4, 3, 5)
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    whole = vae.decode(latents[None] * std + mean).sample
    made: list[torch.Tensor] = []
    state: list[torch.Tensor] = []
    for index in range(4):
        pixels, *state = FrameDecoder(vae, first=not index).pixels(latents[:, index : index + 1], *state)
        made.append(pixels)
    assert [frames.shape[2] for frames in made] == [1, 2, 2, 2]
    torch.testing.assert_close(torch.cat(made, 2).clamp(-1, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (81, 21), (121, 31)])
def test_frames_are_counted_as_the_pipeline_counts_them(frames: int, latents: int) -> None:
    assert count_latent_frames(frames, 4) == latents


def test_frames_that_the_vae_cannot_make_are_refused_with_those_it_can() -> None:
    with pytest.raises(InvalidRequest, match="expected one more than a multiple of 4; choose 77 or 81"):
        count_latent_frames(80, 4)


def test_the_vae_may_be_in_another_dtype_than_the_rest(checkpoint: Path, bundles: Path) -> None:
    asked = ExportRequest(**SIZES | {"frames": 3}, vae_dtype="fp16")
    bundle = Export("wan-1.3b", asked, str(checkpoint), bundles / "wan-mixed").run()
    manifest = open_bundle(bundle.path).manifest
    in_half = {part.name for part in manifest.parts if manifest.dtype_of(part) == "fp16"}
    assert in_half == {"vae_decoder", "vae_decoder_next"}
    left = {spec.dtype for spec in manifest.decoder[0].first.outputs if spec.name.startswith("new_")}
    assert (left, manifest.dtype, manifest.blocks[0].inputs[0].dtype) == ({"fp16"}, "fp32", "fp32")
    assert load_pipeline(bundle.path)("a dog", steps=2).frames.any()


# Sizes and schedule


@pytest.mark.parametrize(
    ("model", "sizes", "shape", "shift"),
    [
        ("wan-1.3b", {}, (480, 832, 81), 3.0),
        ("wan-14b", {"height": 720, "width": 1280}, (720, 1280, 81), 5.0),
        ("wan-14b", {"height": 1280, "width": 720, "frames": 81}, (1280, 720, 81), 5.0),
        ("wan-ti2v-5b", {}, (704, 1280, 121), 5.0),
    ],
)
def test_published_models_have_their_sizes_and_the_shift_recommended_for_them(
    model: str, sizes: dict[str, Any], shape: tuple[int, ...], shift: float, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(model, write_published(model, tmp_path))
    made = split_checkpoint("wan", checkpoint, ExportRequest(**sizes))
    assert (made.shape.height, made.shape.width, made.shape.frames) == shape
    assert made.flow_shift is not None and made.flow_shift.value == made.scheduler().config.flow_shift == shift
    assert not made.cautions


def test_a_shift_that_is_asked_for_or_no_published_one_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_published("wan-14b", tmp_path)
    large = {"height": 720, "width": 1280, "frames": 81}
    assert split(folder, **large, flow_shift=7.5).scheduler().config.flow_shift == 7.5
    configure(folder, "scheduler/scheduler_config.json", flow_shift=8.0)
    assert split(folder, **large).scheduler().config.flow_shift == 8.0


def test_other_sizes_are_told_from_the_nearest_known_ones(tmp_path: Path) -> None:
    cautions = split(write_published("wan-1.3b", tmp_path), height=832, width=448, frames=81).cautions
    assert [caution.split(";")[0] for caution in cautions] == ["width: 448, the checkpoint was trained on 480"]


def test_a_vae_of_no_published_model_has_the_size_that_diffusers_gives_it(checkpoint: Path) -> None:
    made = split(checkpoint, height=None, width=None, frames=None)
    assert (made.shape.height, made.shape.width, made.shape.frames, made.cautions) == (480, 832, 81, ())


@pytest.mark.parametrize(("stored", "tokens"), [(None, 512), (10**30, 512), (226, 226)])
def test_prompts_are_padded_to_what_the_tokenizer_says_and_at_most_to_what_the_pipeline_does(
    stored: int | None, tokens: int, tmp_path: Path
) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1)
    configure(folder, "tokenizer/tokenizer_config.json", model_max_length=stored)
    if stored is None:
        (folder / "tokenizer" / "tokenizer_config.json").unlink()
    made = split(folder)
    assert made.text.max_tokens == made.text_encoder.inputs[0].spec.shape[1] == tokens


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 20}, "height: got 20, expected a multiple of 8 pixels"),
        ({"width": 64}, "width: got 64, expected at most 32 pixels"),
        ({"frames": 9}, "frames: got 9, expected at most 7"),
        ({"resolution": "480p"}, "resolution: got '480p', but Wan has no table of sizes"),
    ],
)
def test_sizes_that_the_model_cannot_have_are_refused(tmp_path: Path, sizes: dict[str, Any], message: str) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1, transformer={"rope_max_seq_len": 4})
    with pytest.raises(InvalidRequest, match=message):
        split(folder, **sizes)


# What is refused


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_dim", 8),
        ("added_kv_proj_dim", 32),
        ("pos_embed_seq_len", 514),
        ("out_channels", 8),
        ("qk_norm", "rms_norm"),
        ("patch_size", [2, 2, 2]),
    ],
)
def test_what_the_modules_do_not_compute_is_refused_by_the_setting(
    checkpoint: Path, setting: str, value: Any, tmp_path: Path
) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1)
    with pytest.raises(CheckpointError, match=rf"^checkpoint wan: transformer {setting} is [^\n]*image[^\n]*$"):
        split(configure(folder, "transformer/config.json", **{setting: value}))


EXPERTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no boundary": ("model_index.json", {"boundary_ratio": None}, r"boundary_ratio is None beside a transformer_2"),
    "beyond all": ("model_index.json", {"boundary_ratio": 1.5}, r"boundary_ratio is 1\.5 beside a transformer_2"),
    "no second": ("model_index.json", {"transformer_2": [None, None]}, r"is 0\.5 without a transformer_2"),
    "another kind": (
        "model_index.json",
        {"transformer_2": ["diffusers", "WanVACETransformer3DModel"]},
        r"is a WanVACE",
    ),
    "another one": ("transformer_2/config.json", {"ffn_dim": 52}, r"transformer and transformer_2 differ in ffn_dim"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1, boundary=0.5)
    file, settings, match = EXPERTS[case]
    with pytest.raises(CheckpointError, match=match):
        split(configure(folder, file, **settings))


def test_experts_have_one_graph_and_weights_of_their_own(tmp_path: Path) -> None:
    made = split(wan.write_random(tmp_path / "wan", layers=2, boundary=0.5))
    (low,) = made.later_experts
    assert low.below == 500
    assert [block.kind for block in low.blocks] == [block.kind for block in made.blocks]
    assert low.blocks[0].module is made.blocks[0].module
    assert {plan.component for plan in (low.condition, low.prologue, *low.blocks, low.epilogue)} == {"transformer_2"}
    names = [plan.name for plan in made.parts]
    assert len(names) == len(set(names))


def test_a_second_transformer_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1, boundary=0.5)
    path = folder / "transformer_2/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["blocks.0.attn1.to_q.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"checkpoint wan: transformer_2: .*blocks\.0\.attn1\.to_q\.weight"):
        check_coverage(split(folder), Checkpoint("wan", folder))


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_one_quantised_expert_is_refused_as_that(component: str, tmp_path: Path) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1, boundary=0.5)
    configure(folder, f"{component}/config.json", quantization_config={"quant_method": "torchao"})
    with pytest.raises(CheckpointError, match=rf"checkpoint wan: {component} is quantised"):
        check_coverage(split(folder), Checkpoint("wan", folder))


@pytest.mark.parametrize(("setting", "value"), [("latents_mean", [0.0] * 16), ("latents_std", None)])
def test_a_vae_whose_statistics_are_of_other_latents_is_refused(setting: str, value: Any, tmp_path: Path) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1)
    with pytest.raises(CheckpointError, match=rf"vae {setting} has (16|0) numbers, expected 4"):
        split(configure(folder, "vae/config.json", **{setting: value}))


@pytest.mark.parametrize(
    ("setting", "value"), [("scale_factor_spatial", 8), ("scale_factor_temporal", 4), ("out_channels", 12)]
)
def test_a_vae_that_contradicts_itself_is_refused(setting: str, value: int, tmp_path: Path) -> None:
    folder = wan.write_random(tmp_path / "wan", layers=1)
    with pytest.raises(CheckpointError, match=rf"vae {setting} is {value}, expected "):
        split(configure(folder, "vae/config.json", **{setting: value}))
