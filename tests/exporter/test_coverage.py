"""Every weight that a component stores is read, known to be of no use, or refused by name; so are quantised ones."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from foresight.engines.errors import CheckpointError
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.coverage import check_coverage, check_names
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.models import split_checkpoint
from foresight.exporter.registry import REGISTRY
from foresight.exporter.weights import Stored
from zoo import FAMILIES, PUBLISHED, family_of, write_published

Tensors = dict[str, torch.Tensor]

FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
QUERY = "transformer_blocks.0.attn1.to_q.weight"
WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.fixture
def copied(single_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(single_checkpoint, tmp_path / "copied"))


def check(folder: Path) -> None:
    """What an export and its dry run do first."""
    checkpoint = Checkpoint("copied", folder)
    check_coverage(split_checkpoint("latte", checkpoint, ExportRequest()), checkpoint)


def change(folder: Path, component: str, edit: Callable[[Tensors], Any], **metadata: str) -> None:
    weights = load_file(folder / FILES[component])
    edit(weights)
    save_file(weights, folder / FILES[component], metadata={"format": "pt"} | metadata)


def configure(folder: Path, component: str, **settings: Any) -> None:
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(CheckpointError, match=r"^checkpoint copied: [^\n]+$") as caught:
        check(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("component", FILES)
def test_a_weight_that_nothing_reads_is_refused_by_name(copied: Path, component: str) -> None:
    change(copied, component, lambda weights: weights.update({"mystery.weight": torch.zeros(2)}))
    refused(copied, component, "1 unknown (mystery.weight)", "download it again, or give the checkpoint")


@pytest.mark.parametrize(
    ("component", "setting", "layer"),
    [
        ("transformer", "num_layers", "transformer_blocks.1."),
        ("text_encoder", "num_layers", "encoder.block.1."),
        ("vae", "layers_per_block", "decoder.up_blocks.0.resnets.2."),
    ],
)
def test_more_layers_than_the_configuration_has_are_refused(
    copied: Path, component: str, setting: str, layer: str
) -> None:
    def grow(weights: Tensors) -> None:
        number = layer.rstrip(".").rpartition(".")[2]
        before = layer.removesuffix(f"{number}.") + f"{int(number) - 1}."
        weights |= {name.replace(before, layer): weight.clone() for name, weight in weights.items() if before in name}

    change(copied, component, grow)
    assert "unknown" in refused(copied, component, layer)


def test_weights_that_do_not_fit_the_configuration_are_named_with_both_shapes(copied: Path) -> None:
    configure(copied, "text_encoder", d_ff=65)
    refused(copied, "DenseReluDense.wi_0.weight has shape (64, 32), expected (65, 32) by its config.json", "2 more")


@pytest.mark.parametrize(
    ("family", "setting", "value", "told"),
    [
        ("latte", "in_channels", 33, "33, expected 4, as vae latent_channels"),
        ("latte", "out_channels", 3, "3, expected 8, as twice its in_channels"),
        ("latte", "caption_channels", 24, "24, expected 32, as text_encoder d_model"),
        ("cogvideox", "in_channels", 33, "33, expected 16, as vae latent_channels"),
        ("cogvideox", "text_embed_dim", 24, "24, expected 32, as text_encoder d_model"),
        ("open_sora", "caption_channels", 24, "24, expected 32, as text_encoder d_model"),
        ("wan", "text_dim", 24, "24, expected 32, as text_encoder d_model"),
    ],
)
def test_components_that_do_not_fit_together_are_refused_by_the_setting(
    family: str, setting: str, value: int, told: str, tmp_path: Path
) -> None:
    folder = FAMILIES[family].write_random(tmp_path / "mixed", transformer={setting: value})
    with pytest.raises(CheckpointError, match=rf"^checkpoint [^\n]*mixed: transformer {setting} is {told} is; [^\n]*$"):
        Export(FAMILIES[family].example.model, ExportRequest(), str(folder), tmp_path / "bundle")


def to_int8(name: str, scale: str | None = None) -> Callable[[Tensors], None]:
    def edit(weights: Tensors) -> None:
        largest = weights[name].abs().amax(1)
        weights[name] = (weights[name] / largest[:, None] * 127).round().to(torch.int8)
        if scale:
            weights[name.replace("weight", scale)] = largest

    return edit


def to_fp8(name: str, scale: str | None = None) -> Callable[[Tensors], None]:
    def edit(weights: Tensors) -> None:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        if scale:
            weights[name.replace("weight", scale)] = torch.ones(())

    return edit


@pytest.mark.parametrize(
    ("component", "edit", "sign"),
    [
        ("text_encoder", to_int8(WO, "SCB"), "DenseReluDense.wo.SCB"),
        ("text_encoder", to_int8(WO), f"1 weights are I8, {WO}"),
        ("text_encoder", to_int8(WO, "weight.absmax"), "weight.absmax"),
        ("text_encoder", to_int8(WO, "weight.quant_state.bitsandbytes__nf4"), "quant_state.bitsandbytes__nf4"),
        ("transformer", to_fp8(QUERY, "scale_weight"), "attn1.to_q.scale_weight"),
        ("transformer", to_fp8(QUERY, "weight_scale"), "attn1.to_q.weight_scale"),
        ("transformer", to_fp8(QUERY, "weight_scale_inv"), "attn1.to_q.weight_scale_inv"),
        ("transformer", lambda weights: weights.update(scaled_fp8=torch.zeros(2)), "scaled_fp8"),
        ("transformer", lambda weights: weights.update({QUERY: weights[QUERY].to(torch.int32)}), "I32"),
        ("vae", lambda weights: weights.update({"decoder.conv_in.qweight": torch.zeros(2)}), "conv_in.qweight"),
    ],
)
def test_quantised_weights_are_refused_by_what_shows_it(
    copied: Path, component: str, edit: Callable[[Tensors], Any], sign: str
) -> None:
    change(copied, component, edit)
    refused(copied, f"{component} is quantised (", sign, "save it in fp16 or bf16")


@pytest.mark.parametrize("component", FILES)
def test_a_quantization_config_is_refused_whatever_the_weights_are(copied: Path, component: str) -> None:
    configure(copied, component, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(copied, f"{component} is quantised (its config.json has a quantization_config)", "dequantise")


def test_quantisation_that_is_told_beside_the_weights_is_refused(copied: Path) -> None:
    change(copied, "transformer", lambda weights: None, _quantization_metadata='{"format": "float8_e4m3fn"}')
    refused(copied, "transformer is quantised", "_quantization_metadata")
    change(copied, "transformer", lambda weights: None)
    (copied / "transformer/quantize_config.json").write_text('{"bits": 4}')
    refused(copied, "transformer is quantised (it comes with quantize_config.json)")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_that_were_cast_are_read_as_they_are(copied: Path, dtype: torch.dtype) -> None:
    expected = {}
    for component, file in FILES.items():
        weights = {name: weight.to(dtype) for name, weight in load_file(copied / file).items()}
        save_file(weights, copied / file)
        expected[component] = weights
    check(copied)
    checkpoint = Checkpoint("copied", copied)
    for plan in split_checkpoint("latte", checkpoint, ExportRequest()).parts:
        for (name, _), (stored, _) in zip(plan.module.named_parameters(), plan.reads(checkpoint), strict=True):
            value = expected[plan.component].get(stored)
            assert value is not None and torch.equal(plan.parameter(checkpoint, name), value.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("component", FILES)
def test_weights_that_are_not_finite_are_named(copied: Path, tmp_path: Path, component: str, value: float) -> None:
    names: list[str] = []

    def spoil(weights: Tensors) -> None:
        names.extend(name for name, weight in weights.items() if weight.dim() > 1)
        weights[names[0]].flatten()[-1] = value

    change(copied, component, spoil)
    with pytest.raises(CheckpointError, match=f"{component} {re.escape(names[0])} has values that are not finite"):
        Export("latte", ExportRequest(), str(copied), tmp_path / "bundle").run()
    assert not (tmp_path / "bundle").exists()


def test_weights_that_16_bits_cannot_hold_are_named_with_the_remedy(copied: Path, tmp_path: Path) -> None:
    change(copied, "transformer", lambda weights: weights["proj_out.weight"].mul_(1e9))
    with pytest.raises(
        CheckpointError, match=r"proj_out\.weight .* too large for torch\.float16, .*; export with dtype"
    ):
        Export("latte", ExportRequest(dtype="fp16"), str(copied), tmp_path / "bundle").run()


def test_weights_that_a_configuration_names_itself_are_refused(copied: Path) -> None:
    configure(copied, "text_encoder", transformers_weights="other.safetensors")
    refused(copied, "text_encoder names the file of its weights", "save_pretrained")


def test_an_adapter_beside_the_weights_is_refused(copied: Path) -> None:
    (copied / "text_encoder/adapter_config.json").write_text("{}")
    refused(copied, "text_encoder has an adapter beside its weights", "merge it")


@pytest.mark.parametrize("where", ["output", "cache"])
def test_a_disk_that_is_too_small_is_said(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    job = Export("latte", ExportRequest(), str(copied), tmp_path / "bundle")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    if where == "output":
        assert "choose another output" in job.plan().cautions[-1]
    else:
        monkeypatch.setattr(Checkpoint, "download_bytes", 2**30)
        monkeypatch.setattr("foresight.exporter.plan.on_one_disk", lambda cache, output: False)
        assert any("the download takes 1024 MiB" in caution for caution in job.plan().cautions)


# What is of no use


def test_a_whole_t5_is_read_for_its_encoder(copied: Path) -> None:
    config = T5Config.from_dict(json.loads((copied / "text_encoder/config.json").read_text()))
    whole = T5ForConditionalGeneration(config).state_dict()
    assert {"lm_head.weight", "encoder.embed_tokens.weight"} < whole.keys()
    save_file({name: weight.clone() for name, weight in whole.items()}, copied / FILES["text_encoder"])
    check(copied)


def test_tables_that_are_computed_may_be_stored(copied: Path) -> None:
    tables = {"pos_embed.pos_embed": torch.zeros(1, 4), "temp_pos_embed": torch.zeros(1, 4)}
    change(copied, "transformer", lambda weights: weights.update(tables))
    check(copied)


def test_a_vae_needs_no_encoder(copied: Path) -> None:
    def cut(weights: Tensors) -> None:
        for name in [name for name in weights if name.startswith(("encoder.", "quant_conv."))]:
            del weights[name]

    change(copied, "vae", cut)
    check(copied)


@pytest.mark.parametrize("stored", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_the_embedding_is_the_one_that_transformers_takes(copied: Path, stored: tuple[str, ...]) -> None:
    def rename(weights: Tensors) -> None:
        table = weights.pop("shared.weight")
        weights |= {f"{name}.weight": table + index for index, name in enumerate(stored)}

    change(copied, "text_encoder", rename)
    model = T5EncoderModel.from_pretrained(copied / "text_encoder")
    checkpoint = Checkpoint("copied", copied)
    check(copied)
    plan = split_checkpoint("latte", checkpoint, ExportRequest()).text_encoder
    read = plan.parameter(checkpoint, "encoder.shared.weight")
    assert torch.equal(read, model.encoder.embed_tokens.weight)


@pytest.mark.parametrize("name", [name for name, row in REGISTRY.items() if row.comes_with_a_clone])
def test_the_shipped_checkpoints_are_read_whole(name: str, tmp_path: Path) -> None:
    job = Export(name, output=tmp_path / "bundle")
    assert not job.plan().cautions
    job.check()


def full_model(name: str, component: str) -> dict[str, torch.Tensor]:
    """Everything that a published component stores, without values."""
    config = PUBLISHED[name].files[f"{component}/config.json"]
    with init_empty_weights():
        if component == "text_encoder":
            index = PUBLISHED[name].files.get("model_index.json", {})
            encoder = getattr(transformers, index.get(component, ["", "T5EncoderModel"])[1])
            return dict(encoder(encoder.config_class.from_dict(config)).state_dict())
        return dict(family_of(name).original(component, config).state_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_hold_what_is_read_and_nothing_unknown(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(name, write_published(name, tmp_path))
    split = split_checkpoint(REGISTRY[name].family, checkpoint, ExportRequest())
    for component in FILES:
        wanted = dict(split.also_stored.get(component, {}))
        parts = [plan for plan in split.parts if plan.component == component]
        for plan in parts:
            wanted |= dict(plan.reads(_Nothing("published", tmp_path)))
        full = {key: Stored("whole", "F32", tuple(value.shape)) for key, value in full_model(name, component).items()}
        check_names(component, wanted, full, split.unneeded.get(component, ()))


class _Nothing(Checkpoint):
    """Stores every weight under its present name."""

    def has_tensor(self, component: str, name: str) -> bool:
        return True


# The rule


def stored(*names: str) -> dict[str, Stored]:
    return {name: Stored("file", "F32", (1,)) for name in names}


def test_missing_and_unknown_weights_are_told_together() -> None:
    check_names("transformer", {"a": (1,), "b": (1,)}, stored("a", "b"))
    with pytest.raises(CheckpointError, match=r"1 missing \(b\) and 1 unknown \(c\), expected the 2"):
        check_names("transformer", {"a": (1,), "b": (1,)}, stored("a", "c"))


def test_names_that_a_family_knows_are_no_weights_of_another_model() -> None:
    check_names("vae", {"decoder.a": (1,)}, stored("decoder.a", "encoder.b"), ("encoder.*",))
    with pytest.raises(CheckpointError, match=r"1 unknown \(coder.b\)"):
        check_names("vae", {"decoder.a": (1,)}, stored("decoder.a", "coder.b"), ("encoder.*",))
