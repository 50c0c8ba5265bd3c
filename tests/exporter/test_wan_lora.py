"""LoRAs in the names of Wan's authors: the weights that diffusers makes of the same file, every spelling, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from foresight.engines.errors import CheckpointError
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.coverage import check_coverage
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.lora import Lora, LoraFile, lora_from_text
from foresight.exporter.models import split_checkpoint
from foresight.exporter.models.wan.lora import LORA_NAMES
from foresight.runtime.policies import NoReuse
from tests.support import load_pipeline
from tests.test_parity import draw
from tests.test_parity_wan import PROMPT, assert_same, run_reference
from zoo import wan

Tensors = dict[str, Tensor]

RANK = 3
ALPHA = 5.0
SCALE = 0.7
SIZES: dict[str, Any] = {"height": 16, "width": 32, "frames": 5, "max_batch": 1}
QUERY, TO_Q = "blocks.0.self_attn.q", "blocks.0.attn1.to_q"
IN_BLOCKS = [
    *(f"{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in "qkvo"),
    *("ffn.0", "ffn.2"),
]
OUTSIDE = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Wan 2.1."""
    return wan.write_random(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the A14B of Wan 2.2."""
    return wan.write_random(tmp_path_factory.mktemp("two"), boundary=0.875)


def read(folder: Path, *loras: Lora, component: str = "transformer") -> Tensors:
    """All weights of a transformer, as the export reads them."""
    checkpoint = Checkpoint("wan", folder)
    checkpoint.loras = tuple(map(LoraFile, loras))
    check_coverage(split_checkpoint("wan", checkpoint, ExportRequest(**SIZES)), checkpoint)
    return {name: checkpoint.tensor(component, name).float() for name in checkpoint.stored(component)}


def save(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def original_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """By the authors' names."""
    return {
        LORA_NAMES.original_name(name): weight.shape
        for name, weight in Checkpoint("", folder).stored("transformer").items()
    }


class Made:
    """Random tensors of a file, by their names behind the modules'."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.shapes = original_shapes(folder)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=self.generator)

    def halves(self, module: str, *, a: str = "lora_A", b: str = "lora_B") -> Tensors:
        out, width = self.shapes[f"{module}.weight"]
        return {f"{module}.{a}.weight": self.draw(RANK, width), f"{module}.{b}.weight": self.draw(out, RANK)}

    def difference(self, name: str, ending: str) -> Tensors:
        """Of the weight of that name."""
        return {f"{name.removesuffix('.weight').removesuffix('.bias')}.{ending}": self.draw(*self.shapes[name])}


def in_blocks(modules: list[str] = IN_BLOCKS) -> list[str]:
    return [f"blocks.{block}.{module}" for block in range(2) for module in modules]


# Against diffusers


def plain(made: Made) -> Tensors:
    """As DiffSynth and ai-toolkit write them."""
    tensors: Tensors = {}
    for module in [*in_blocks(), *OUTSIDE, "head.head"]:
        tensors |= made.halves(module)
    return {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def distilled(made: Made) -> Tensors:
    """As distilled ones are extracted: with biases, and the head's whole difference."""
    tensors: Tensors = {}
    for module in [*in_blocks(), *OUTSIDE]:
        tensors |= made.halves(module, a="lora_down", b="lora_up") | made.difference(f"{module}.bias", "diff_b")
    tensors |= made.difference("head.head.weight", "diff") | made.difference("head.head.bias", "diff_b")
    return {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def with_alphas(made: Made) -> Tensors:
    tensors: Tensors = {}
    for module in in_blocks():
        tensors |= made.halves(module, a="lora_down", b="lora_up") | {f"{module}.alpha": torch.tensor(ALPHA)}
    return {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def kohya(made: Made) -> Tensors:
    """As musubi-tuner writes them."""
    tensors: Tensors = {}
    for module in in_blocks():
        flat = "lora_unet_" + module.replace(".", "_")
        halves = made.halves(module, a="lora_down", b="lora_up")
        tensors |= {name.replace(module, flat): tensor for name, tensor in halves.items()}
        tensors[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return tensors


@pytest.mark.parametrize("make", [plain, distilled, with_alphas, kohya])
def test_weights_are_those_that_diffusers_makes_of_the_same_file(
    one: Path, tmp_path: Path, make: Callable[[Made], Tensors]
) -> None:
    path = save(tmp_path / "a.safetensors", make(Made(one)))
    pipeline = WanPipeline.from_pretrained(one)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    expected = dict(pipeline.transformer.state_dict())
    assert sum(not torch.equal(before[name], expected[name]) for name in before) >= len(in_blocks())
    torch.testing.assert_close(read(one, Lora(path, SCALE)), expected)


def test_two_files_for_two_transformers_are_as_in_diffusers(two: Path, tmp_path: Path) -> None:
    high, low = (
        save(tmp_path / f"{name}.safetensors", plain(Made(two, seed))) for seed, name in enumerate(("high", "low"))
    )
    pipeline = WanPipeline.from_pretrained(two)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(high)
    pipeline.load_lora_weights(low, load_into_transformer_2=True)
    pipeline.fuse_lora(components=["transformer", "transformer_2"], lora_scale=SCALE)
    pipeline.unload_lora_weights()
    loras = (Lora(high, SCALE, "transformer"), Lora(low, SCALE, "transformer_2"))
    for component in ("transformer", "transformer_2"):
        expected = dict(getattr(pipeline, component).state_dict())
        torch.testing.assert_close(read(two, *loras, component=component), expected)
    bundle = Export("wan-a14b", ExportRequest(**SIZES), str(two), tmp_path / "bundle", loras=loras).run()
    assert [lora.component for lora in bundle.manifest.loras] == ["transformer", "transformer_2"]
    ours = load_pipeline(bundle.path)
    noise = draw(ours.manifest.shape.latents)
    settings = {"guidance_scale": 1.0, "num_inference_steps": 10}
    (latents,), (frames,) = run_reference(pipeline, ours.manifest.shape, PROMPT, noise[None], **settings)
    video = ours(PROMPT, steps=10, guidance=1.0, latents=noise, policy=NoReuse())
    assert_same(video, latents, frames, 1e-4)


def test_names_of_every_weight_are_turned_round_as_diffusers_turns_them(one: Path) -> None:
    names = list(Checkpoint("wan", one).stored("transformer"))
    originals = [LORA_NAMES.original_name(name) for name in names]
    assert len(set(originals)) == len(names)
    for name, original in zip(names, originals, strict=True):
        assert list(convert_wan_transformer_to_diffusers({original: torch.zeros(1)})) == [name]


# Spellings

PREFIXES = ["", "diffusion_model.", "model.diffusion_model.", "pipe.dit.", "transformer.", "base_model.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "halves", [("lora_A", "lora_B"), ("lora_A.default", "lora_B.default"), ("lora_down", "lora_up")]
)
def test_every_dotted_spelling_is_the_same_update(
    one: Path, tmp_path: Path, prefix: str, halves: tuple[str, str]
) -> None:
    a, b = Made(one).halves(QUERY).values()
    names = [f"{prefix}{QUERY}.{half}.weight" for half in halves]
    path = save(tmp_path / "a.safetensors", dict(zip(names, (a, b), strict=True)))
    before, after = read(one), read(one, Lora(path))
    torch.testing.assert_close(after[f"{TO_Q}.weight"], before[f"{TO_Q}.weight"] + b @ a)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{TO_Q}.weight"]


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lora_transformer_"])
def test_underscores_are_told_apart_in_every_module(one: Path, tmp_path: Path, prefix: str) -> None:
    made, before = Made(one), read(one)
    modules = {
        name: LORA_NAMES.original_name(name).removesuffix(".weight")
        for name, weight in before.items()
        if weight.ndim == 2 and name.endswith(".weight")
    }
    halves = {name: made.halves(module, a="lora_down", b="lora_up") for name, module in modules.items()}
    flat = {
        f"{prefix}{modules[name].replace('.', '_')}{full.removeprefix(modules[name])}": tensor
        for name, two in halves.items()
        for full, tensor in two.items()
    }
    after = read(one, Lora(save(tmp_path / "a.safetensors", flat)))
    assert len(modules) == len(in_blocks()) + len(OUTSIDE) + 1
    for name, (a, b) in ((name, two.values()) for name, two in halves.items()):
        torch.testing.assert_close(after[name], before[name] + b @ a)


def test_names_of_diffusers_are_merged_as_before(one: Path, tmp_path: Path) -> None:
    a, b = Made(one).halves(QUERY).values()
    tensors = {f"transformer.{TO_Q}.lora_A.weight": a, f"transformer.{TO_Q}.lora_B.weight": b}
    after = read(one, Lora(save(tmp_path / "a.safetensors", tensors)))
    torch.testing.assert_close(after[f"{TO_Q}.weight"], read(one)[f"{TO_Q}.weight"] + b @ a)


# What diffusers leaves out: differences of norms, modulation and patches

DIFFERENCES = {
    "blocks.1.norm3.diff": "blocks.1.norm2.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight",
    "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
    "blocks.1.diff_m": "blocks.1.scale_shift_table",
    "head.modulation.diff": "scale_shift_table",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
    "blocks.0.ffn.0.diff": "blocks.0.ffn.net.0.proj.weight",
    "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
}


def test_whole_differences_are_added_by_the_scale(one: Path, tmp_path: Path) -> None:
    made, before = Made(one), read(one)
    tensors = {f"diffusion_model.{name}": made.draw(*before[own].shape) for name, own in DIFFERENCES.items()}
    after = read(one, Lora(save(tmp_path / "a.safetensors", tensors), 0.5))
    for name, own in DIFFERENCES.items():
        torch.testing.assert_close(after[own], before[own] + 0.5 * tensors[f"diffusion_model.{name}"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(DIFFERENCES.values())


def test_patches_take_a_low_rank_too(one: Path, tmp_path: Path) -> None:
    before = read(one)["patch_embedding.weight"]
    a, b = torch.randn(RANK, *before.shape[1:]), torch.randn(before.shape[0], RANK, 1, 1, 1)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": a,
        "diffusion_model.patch_embedding.lora_up.weight": b,
    }
    after = read(one, Lora(save(tmp_path / "a.safetensors", tensors)))["patch_embedding.weight"]
    torch.testing.assert_close(after, before + (b.flatten(1) @ a.flatten(1)).reshape(before.shape))


# Refusals


def refuse(folder: Path, lora: Lora, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read(folder, lora)
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[str, str]] = {
    "an unknown module": ("blocks.0.self_attn.w", r"1 of its 2 modules are none of this checkpoint's .*attn\.w\)"),
    "a block too many": ("blocks.2.self_attn.q", r"1 of its 2 modules are none of this checkpoint's .*2\.self_attn\.q"),
    "an unknown one of kohya's": ("lora_unet_blocks_0_w", r"none of this checkpoint's \(lora_unet_blocks_0_w\)"),
    "keys of images": ("blocks.0.cross_attn.k_img", r"1 of its 2 modules are of image-to-video models, .*k_img\)"),
    "values of images": ("lora_unet_blocks_0_cross_attn_v_img", r"of image-to-video models, which cannot be exported"),
    "images": ("diffusion_model.img_emb.proj.1", r"of image-to-video models.*img_emb\.proj\.1\); give one for this"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_are_none_of_a_text_to_video_model_are_refused_by_name(
    one: Path, tmp_path: Path, case: str
) -> None:
    module, match = REFUSED[case]
    halves = Made(one).halves(QUERY)
    other = {name.replace(QUERY, module): tensor for name, tensor in halves.items()}
    refuse(one, Lora(save(tmp_path / "a.safetensors", halves | other)), match)


def test_a_difference_of_another_shape_is_refused(one: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"diffusion_model.patch_embedding.diff": torch.zeros(32, 36, 1, 2, 2)})
    refuse(one, Lora(path), r"patch_embedding\.diff has shape \(32, 36, 1, 2, 2\), expected \(32, 4, 1, 2, 2\)")


def test_a_weight_and_its_whole_difference_are_refused_together(one: Path, tmp_path: Path) -> None:
    made = Made(one)
    path = save(tmp_path / "a.safetensors", made.halves(QUERY) | made.difference(f"{QUERY}.weight", "diff"))
    refuse(one, Lora(path), r"updates blocks\.0\.attn1\.to_q\.weight twice")


# Which transformer


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", ""])
def test_of_two_transformers_one_has_to_be_named(two: Path, tmp_path: Path, prefix: str) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in Made(two).halves(QUERY).items()}
    path = save(tmp_path / "a.safetensors", tensors)
    refuse(two, Lora(path), r"which of 2 transformers it is for; give a\.safetensors@transformer or .*@transformer_2")
    for component, other in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
        lora = Lora(path, component=component)
        changed = [
            not torch.equal(read(two, component=c)[f"{TO_Q}.weight"], read(two, lora, component=c)[f"{TO_Q}.weight"])
            for c in (component, other)
        ]
        assert changed == [True, False]


def test_a_file_for_both_transformers_is_given_twice(two: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", Made(two).halves(QUERY))
    both = [Lora(path, component=component) for component in ("transformer", "transformer_2")]
    for component in ("transformer", "transformer_2"):
        after, before = (read(two, *loras, component=component) for loras in (both, ()))
        assert not torch.equal(after[f"{TO_Q}.weight"], before[f"{TO_Q}.weight"])
    assert len({LoraFile(lora).key for lora in (*both, Lora(path))}) == 3


def test_a_file_whose_names_say_the_transformer_needs_no_other_word(two: Path, tmp_path: Path) -> None:
    tensors = {f"transformer_2.{name}": tensor for name, tensor in Made(two).halves(QUERY).items()}
    path = save(tmp_path / "a.safetensors", tensors)
    after, before = (read(two, *loras, component="transformer_2") for loras in ((Lora(path),), ()))
    assert not torch.equal(after[f"{TO_Q}.weight"], before[f"{TO_Q}.weight"])
    refuse(two, Lora(path, component="transformer"), r"its names are for transformer_2, got the component transformer")


def test_a_component_is_one_of_the_checkpoints(one: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", Made(one).halves(QUERY))
    refuse(one, Lora(path, component="transformer_2"), r"got the component transformer_2, expected text_encoder or")


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors@transformer_2", Lora(Path("a.safetensors"), component="transformer_2")),
        ("a.safetensors:0.5@transformer", Lora(Path("a.safetensors"), 0.5, "transformer")),
        ("me@home/a@b.safetensors", Lora(Path("me@home/a@b.safetensors"))),
        ("me@home/a@b.safetensors:2", Lora(Path("me@home/a@b.safetensors"), 2.0)),
    ],
)
def test_a_component_stands_behind_the_file_and_its_scale(text: str, lora: Lora) -> None:
    assert lora_from_text(text) == lora
