"""LoRA merged at export: the weights and videos that diffusers makes of the same file, and refusals by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.coverage import check_coverage
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.lora import Lora, LoraFile, lora_from_text
from foresight.exporter.models import split_checkpoint
from foresight.runtime.policies import NoReuse
from tests.support import load_pipeline
from tests.test_parity import assert_same, draw
from tests.test_parity_cogvideox import PROMPT, run_reference
from zoo import FAMILIES, cogvideox

Tensors = dict[str, Tensor]

RANK = 3
QUERY = "transformer_blocks.0.attn1.to_q"
KEY = "transformer_blocks.1.attn1.to_k"
T5_QUERY = "encoder.block.0.layer.0.SelfAttention.q"


def matrices(shape: tuple[int, ...], rank: int = RANK, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A and B for a weight of that shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)


class Tiny:
    """A checkpoint of a family, and the weights that an export reads of it."""

    def __init__(self, family: str, model: str, folder: Path) -> None:
        self.family, self.model, self.folder = family, model, folder

    def weight(self, name: str, component: str = "transformer", *loras: Lora) -> Tensor:
        """As the export reads it."""
        checkpoint = Checkpoint("tiny", self.folder)
        checkpoint.loras = tuple(map(LoraFile, loras))
        check_coverage(split_checkpoint(self.family, checkpoint, ExportRequest()), checkpoint)
        return checkpoint.tensor(component, f"{name}.weight").float()


@pytest.fixture(scope="module")
def tiny(examples: Callable[[str], Path]) -> Tiny:
    return Tiny("latte", "latte", examples("latte"))


def save(path: Path, tensors: Tensors, **remarks: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=remarks or None)
    return path


@pytest.fixture
def pair(tiny: Tiny) -> tuple[Tensor, Tensor]:
    return matrices(tuple(tiny.weight(QUERY).shape))


# Spellings

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensors]] = {
    "diffusers": lambda a, b: {f"transformer.{QUERY}.lora_A.weight": a, f"transformer.{QUERY}.lora_B.weight": b},
    "peft": lambda a, b: {
        f"base_model.model.{QUERY}.lora_A.weight": a,
        f"base_model.model.{QUERY}.lora_B.weight": b,
    },
    "peft, named": lambda a, b: {
        f"base_model.model.{QUERY}.lora_A.default.weight": a,
        f"base_model.model.{QUERY}.lora_B.default.weight": b,
    },
    "comfy": lambda a, b: {
        f"diffusion_model.{QUERY}.lora_down.weight": a,
        f"diffusion_model.{QUERY}.lora_up.weight": b,
    },
    "old": lambda a, b: {f"transformer.{QUERY}.lora.down.weight": a, f"transformer.{QUERY}.lora.up.weight": b},
    "kohya": lambda a, b: {
        f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight": a,
        f"lora_unet_{QUERY.replace('.', '_')}.lora_up.weight": b,
        f"lora_unet_{QUERY.replace('.', '_')}.alpha": torch.tensor(float(RANK)),
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_update(
    tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path, spelling: str
) -> None:
    a, b = pair
    path = save(tmp_path / "one.safetensors", SPELLINGS[spelling](a, b))
    merged = tiny.weight(QUERY, "transformer", Lora(path, 0.5))
    torch.testing.assert_close(merged, tiny.weight(QUERY) + 0.5 * b @ a)
    assert torch.equal(tiny.weight(KEY, "transformer", Lora(path)), tiny.weight(KEY))


def test_alpha_counts_by_the_rank(tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    a, b = pair
    tensors = SPELLINGS["diffusers"](a, b) | {f"transformer.{QUERY}.alpha": torch.tensor(6.0)}
    merged = tiny.weight(QUERY, "transformer", Lora(save(tmp_path / "a.safetensors", tensors)))
    torch.testing.assert_close(merged, tiny.weight(QUERY) + 6 / RANK * b @ a)


REMARKS: dict[str, tuple[dict[str, Any], float]] = {
    "alpha": ({"transformer.r": RANK, "transformer.lora_alpha": 6}, 6 / RANK),
    "by name": ({"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn1.to_q": 12}}, 12 / RANK),
    "of the root of the rank": ({"transformer.lora_alpha": 6, "transformer.use_rslora": True}, 6 / math.sqrt(RANK)),
    "another component's": ({"text_encoder.lora_alpha": 6}, 1.0),
}


@pytest.mark.parametrize("case", REMARKS)
def test_what_its_trainer_wrote_down_counts(tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path, case: str) -> None:
    a, b = pair
    settings, factor = REMARKS[case]
    path = save(tmp_path / "a.safetensors", SPELLINGS["diffusers"](a, b), lora_adapter_metadata=json.dumps(settings))
    torch.testing.assert_close(tiny.weight(QUERY, "transformer", Lora(path)), tiny.weight(QUERY) + factor * b @ a)


def test_a_config_beside_the_file_counts(tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    a, b = pair
    path = save(tmp_path / "adapter_model.safetensors", SPELLINGS["peft"](a, b))
    before = LoraFile(Lora(path)).key
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 9}))
    torch.testing.assert_close(tiny.weight(QUERY, "transformer", Lora(path)), tiny.weight(QUERY) + 9 / RANK * b @ a)
    assert LoraFile(Lora(path)).key != before


def test_several_add_up_in_any_order(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny.weight(QUERY)
    loras, total = [], plain.clone()
    for seed, scale in ((0, 0.5), (1, -2.0)):
        a, b = matrices(tuple(plain.shape), seed=seed)
        loras.append(Lora(save(tmp_path / f"{seed}.safetensors", SPELLINGS["diffusers"](a, b)), scale))
        total += scale * b @ a
    torch.testing.assert_close(tiny.weight(QUERY, "transformer", *loras), total)
    torch.testing.assert_close(tiny.weight(QUERY, "transformer", *reversed(loras)), total)


def test_the_text_encoder_is_updated_too(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny.weight(T5_QUERY, "text_encoder")
    a, b = matrices(tuple(plain.shape))
    names = [f"text_encoder.{T5_QUERY}.lora_{half}.weight" for half in "AB"]
    path = save(tmp_path / "t5.safetensors", dict(zip(names, (a, b), strict=True)))
    torch.testing.assert_close(tiny.weight(T5_QUERY, "text_encoder", Lora(path)), plain + b @ a)


def test_a_patch_embedding_is_updated_too(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny.weight("pos_embed.proj")
    out, *rest = plain.shape
    a, b = torch.randn(RANK, *rest), torch.randn(out, RANK, 1, 1)
    names = [f"transformer.pos_embed.proj.lora_{half}.weight" for half in "AB"]
    path = save(tmp_path / "conv.safetensors", dict(zip(names, (a, b), strict=True)))
    expected = plain + (b.flatten(1) @ a.flatten(1)).reshape(plain.shape)
    torch.testing.assert_close(tiny.weight("pos_embed.proj", "transformer", Lora(path)), expected)


def test_whole_differences_are_added_by_the_scale(tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    difference = pair[1] @ pair[0]
    path = save(tmp_path / "a.safetensors", {f"diffusion_model.{QUERY}.diff": difference})
    torch.testing.assert_close(
        tiny.weight(QUERY, "transformer", Lora(path, 0.5)), tiny.weight(QUERY) + 0.5 * difference
    )


def test_a_file_that_names_no_component_is_for_the_one_that_is_given(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny.weight(T5_QUERY, "text_encoder")
    a, b = matrices(tuple(plain.shape))
    path = save(tmp_path / "a.safetensors", {f"{T5_QUERY}.lora_{h}.weight": t for h, t in (("A", a), ("B", b))})
    merged = tiny.weight(T5_QUERY, "text_encoder", Lora(path, component="text_encoder"))
    torch.testing.assert_close(merged, plain + b @ a)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_every_family_can_be_updated(family: str, examples: Callable[[str], Path], tmp_path: Path) -> None:
    model = FAMILIES[family].example.model
    checkpoint = Checkpoint("tiny", examples(family))
    stored = checkpoint.stored("transformer")
    name = next(name for name, weight in stored.items() if "attn" in name and len(weight.shape) == 2)
    module = name.removesuffix(".weight")
    a, b = matrices(stored[name].shape)
    tensors = {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    tiny = Tiny(family, model, examples(family))
    lora = Lora(save(tmp_path / "one.safetensors", tensors))
    torch.testing.assert_close(tiny.weight(module, "transformer", lora), tiny.weight(module) + b @ a)


# Through the whole export


def test_a_video_is_the_one_that_diffusers_makes_of_the_same_file(tmp_path: Path) -> None:
    folder = cogvideox.write_random(tmp_path / "cogvideox")
    write_by_peft(folder, tmp_path / "lora")
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    reference = CogVideoXPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    request = ExportRequest(max_batch=1)
    plain, merged = (
        load_pipeline(Export("cogvideox-2b", request, str(folder), tmp_path / name, loras=loras).run().path)
        for name, loras in (("plain", ()), ("merged", (Lora(path, 0.7),)))
    )
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 5}
    latents = draw(plain.manifest.shape.latents)
    before, _ = run_reference(reference, plain.manifest.shape, latents, PROMPT, **settings)
    reference.load_lora_weights(path.parent)
    reference.fuse_lora(lora_scale=0.7)
    expected = run_reference(reference, plain.manifest.shape, latents, PROMPT, **settings)
    video = merged(PROMPT, negative_prompt="", steps=5, guidance=3.0, latents=latents, policy=NoReuse())
    assert_same(video, *expected)
    assert abs(before - expected[0]).max() > 0.05  # it does make a difference
    assert plain.manifest.loras == () and merged.manifest.loras[0].scale == 0.7


def write_by_peft(folder: Path, target: Path) -> None:
    """A LoRA of some modules of a checkpoint's transformer, saved as diffusers' trainers do."""
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q", "to_v", "to_out.0", "proj_out"])
    pipeline.transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    layers = get_peft_model_state_dict(pipeline.transformer)
    metadata = {**vars(config), "target_modules": sorted(config.target_modules or ())}
    CogVideoXPipeline.save_lora_weights(
        target,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={name: metadata[name] for name in ("r", "lora_alpha", "target_modules")},
    )


def test_another_file_or_scale_is_another_export(tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    paths = [
        save(tmp_path / name, SPELLINGS["diffusers"](factor * pair[0], pair[1]))
        for name, factor in (("a.safetensors", 1), ("b.safetensors", 2))
    ]
    asked = [(), (Lora(paths[0]),), (Lora(paths[0], 0.5),), (Lora(paths[1]),)]
    exports = [Export(tiny.model, checkpoint=str(tiny.folder), loras=loras) for loras in asked]
    assert len({export.key for export in exports}) == len(asked)
    assert exports[1].plan().loras == ("a.safetensors, scale 1",)


def test_a_shipped_model_with_a_lora_has_no_profiles(tmp_path: Path, demo_bundle: Path) -> None:
    stored = Checkpoint("demo", Export("latte-demo").checkpoint.folder).stored("transformer")
    a, b = matrices(stored[f"{QUERY}.weight"].shape)
    path = save(tmp_path / "a.safetensors", SPELLINGS["diffusers"](a, b))
    assert Export("latte-demo").profiles
    assert Export("latte-demo", loras=(Lora(path),)).profiles == ()


# Refusals


def refuse(tiny: Tiny, path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Export(tiny.model, checkpoint=str(tiny.folder), loras=(Lora(path),)).plan()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("lora ")
    assert str(caught.value).count(f"{path.name} {path.name}") == 0


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensors], str]] = {
    "an unknown module": (
        lambda a, b: {f"transformer.other.lora_{h}.weight": t for h, t in (("A", a), ("B", b))},
        r"1 of its 1 modules are none of this checkpoint's \(transformer\.other\)",
    ),
    "one half": (lambda a, b: {f"transformer.{QUERY}.lora_A.weight": a}, r"has no lora_B, expected both"),
    "another shape": (
        lambda a, b: {f"transformer.{QUERY}.lora_A.weight": a[:, :-1], f"transformer.{QUERY}.lora_B.weight": b},
        r"which do not make \(\d+, \d+\)",
    ),
    "other ranks": (
        lambda a, b: {f"transformer.{QUERY}.lora_A.weight": a[:2], f"transformer.{QUERY}.lora_B.weight": b},
        r"which do not make",
    ),
    "DoRA": (
        lambda a, b: SPELLINGS["diffusers"](a, b) | {f"transformer.{QUERY}.lora_magnitude_vector": b[:, 0]},
        r"got DoRA \(transformer",
    ),
    "LoHa": (lambda a, b: {f"transformer.{QUERY}.hada_w1_a": a}, r"got LoHa"),
    "LoKr": (lambda a, b: {f"transformer.{QUERY}.lokr_w1": a}, r"got LoKr"),
    "a bias": (
        lambda a, b: SPELLINGS["diffusers"](a, b) | {f"transformer.{QUERY}.lora_B.bias": b[:, 0]},
        r"got biases",
    ),
    "a difference of another shape": (
        lambda a, b: {f"diffusion_model.{QUERY}.diff": b},
        r"to_q\.diff has shape \(\d+, 3\), expected \(\d+, \d+\)",
    ),
    "a difference of what is not there": (
        lambda a, b: {f"diffusion_model.{QUERY}.other.diff_b": b[:, 0]},
        r"1 of its 1 modules are none of this checkpoint's \(diffusion_model\..*other\.diff_b\)",
    ),
    "a whole weight": (lambda a, b: {f"diffusion_model.{QUERY}.set_weight": b}, r"got .*set_weight, expected lora_A"),
    "integers": (
        lambda a, b: SPELLINGS["diffusers"]((100 * a).to(torch.int8), b),
        r"is quantised \(.* is I8\)",
    ),
    "fp8": (lambda a, b: SPELLINGS["diffusers"](a.to(torch.float8_e4m3fn), b), r"is quantised \(.* is F8_E4M3\)"),
    "two of them": (
        lambda a, b: {
            f"{QUERY}.lora_{half}.{name}.weight": t for name in ("x", "y") for half, t in (("A", a), ("B", b))
        },
        r"holds several LoRAs",
    ),
    "one weight under two names": (
        lambda a, b: SPELLINGS["diffusers"](a, b) | SPELLINGS["comfy"](a, b),
        r"updates transformer_blocks\.0\.attn1\.to_q\.weight twice",
    ),
    "a weight that is stored and not read": (
        lambda a, b: {f"vae.encoder.conv_in.lora_{h}.weight": t for h, t in (("A", a), ("B", b))},
        r"1 of its 1 modules are none of this checkpoint's",
    ),
    "several alphas": (
        lambda a, b: SPELLINGS["diffusers"](a, b) | {f"transformer.{QUERY}.alpha": torch.ones(2)},
        r"to_q\.alpha has shape \(2,\), expected one number",
    ),
    "a whole model": (lambda a, b: {f"transformer.{QUERY}.weight": b}, r"expected lora_A and lora_B"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_not_be_merged_whole_is_refused(
    tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path, case: str
) -> None:
    make, match = BAD[case]
    refuse(tiny, save(tmp_path / "bad.safetensors", make(*pair)), match)


NUMBERS = "expected a number and a table of patterns and numbers"
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"has use_dora, expected a plain LoRA"),
    "turned around": ({"fan_in_fan_out": True}, r"has fan_in_fan_out"),
    "alpha that is no number": ({"lora_alpha": "high"}, rf"has lora_alpha 'high' and .*{NUMBERS}"),
    "patterns in a list": ({"alpha_pattern": ["to_q"]}, rf"alpha_pattern \['to_q'\], {NUMBERS}"),
    "a pattern that is none": ({"alpha_pattern": {"(": 4}}, NUMBERS),
    "a pattern of no number": ({"alpha_pattern": {"to_q": None}}, NUMBERS),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, r"was begun with pissa_niter_4"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_mean_another_sum_are_refused(
    tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path, case: str
) -> None:
    settings, match = SETTINGS[case]
    path = save(tmp_path / "adapter_model.safetensors", SPELLINGS["peft"](*pair))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    refuse(tiny, path, match)


def test_what_is_no_file_of_a_lora_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    refuse(tiny, tmp_path / "none.safetensors", r"none\.safetensors is not there")
    (tmp_path / "folder").mkdir()
    refuse(tiny, tmp_path / "folder", r"got a folder, expected safetensors")
    for name, content, match in (
        ("pickle.bin", b"\x80\x02}q", r"got a \.bin, expected safetensors"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", r"is a Git LFS pointer"),
        ("empty.safetensors", b"", r"is empty"),
        ("torn.safetensors", b"\x10\0\0\0\0\0\0\0{}", r"cannot read torn\.safetensors"),
    ):
        (tmp_path / name).write_bytes(content)
        refuse(tiny, tmp_path / name, match)
    refuse(tiny, save(tmp_path / "nothing.safetensors", {}), r"holds no weights")


def test_values_that_are_not_finite_are_refused_when_they_are_read(
    tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    a, b = pair
    a[0, 0] = math.nan
    path = save(tmp_path / "nan.safetensors", SPELLINGS["diffusers"](a, b))
    with pytest.raises(CheckpointError, match=r"lora nan\.safetensors: what it adds to .*to_q\.weight is not finite"):
        tiny.weight(QUERY, "transformer", Lora(path))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a:b/c.safetensors", "a:b/c.safetensors", 1.0),
        ("a:b/c.safetensors:-1e-1", "a:b/c.safetensors", -0.1),
    ],
)
def test_a_scale_stands_after_the_last_colon(text: str, path: str, scale: float) -> None:
    assert lora_from_text(text) == Lora(Path(path), scale)


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_is_a_finite_number(scale: str) -> None:
    with pytest.raises(InvalidRequest, match=r"lora: got a scale of .* for a\.safetensors, expected a finite number"):
        lora_from_text(f"a.safetensors:{scale}")


def test_a_file_that_was_trained_on_another_model_says_so(
    tiny: Tiny, pair: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    other = {f"transformer.layers.{i}.q.lora_{h}.weight": t for i in range(9) for h, t in zip("AB", pair, strict=True)}
    path = save(tmp_path / "other.safetensors", SPELLINGS["diffusers"](*pair) | other)
    assert len(load_file(path)) == 20
    refuse(tiny, path, r"9 of its 10 modules .*, …\), expected all; it was made for another model")
