"""Checkpoints are read whatever way their safetensors are cut; what cannot be exported is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import load_file, save_file

from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.exporter.checkpoint import Checkpoint, find_checkpoint
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.models import split_checkpoint
from foresight.exporter.registry import REGISTRY
from zoo import open_sora

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def read_all(folder: Path, request: ExportRequest | None = None) -> dict[str, torch.Tensor]:
    """Every weight an export would read, by part and parameter."""
    checkpoint = Checkpoint("copied", folder)
    split = split_checkpoint("latte", checkpoint, request or ExportRequest())
    return {
        f"{plan.name} {name}": plan.parameter(checkpoint, name)
        for plan in split.parts
        for name, _ in plan.module.named_parameters()
    }


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_hold_what_the_whole_file_holds(checkpoint: Path, copied: Path) -> None:
    shutil.rmtree(copied / "transformer")
    LatteTransformer3DModel.from_pretrained(checkpoint / "transformer").save_pretrained(
        copied / "transformer", max_shard_size="60KB"
    )
    assert len(list((copied / "transformer").glob("*.safetensors"))) > 3
    whole, sharded = read_all(checkpoint), read_all(copied)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_no_two_parts_share_a_weight_by_mistake(checkpoint: Path) -> None:
    blocks = {name: weight for name, weight in read_all(checkpoint).items() if name.endswith("attn1.to_q.weight")}
    assert len(blocks) == 4
    assert len({weight.numpy().tobytes() for weight in blocks.values()}) == 4


def test_half_precision_is_rounded_from_what_is_stored(checkpoint: Path) -> None:
    single, half = read_all(checkpoint), read_all(checkpoint, ExportRequest(dtype="fp16"))
    assert all(torch.equal(half[name], single[name].to(half[name].dtype)) for name in single)


def test_the_feed_forward_of_t5_stays_in_single_precision(checkpoint: Path) -> None:
    half = read_all(checkpoint, ExportRequest(dtype="fp16"))
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name, w in half.items() if w.dtype == torch.float32}
    assert kept == {"wo"}


def test_old_names_of_the_vaes_attention_are_understood(checkpoint: Path, copied: Path) -> None:
    weights = load_file(copied / VAE)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {name.replace(new, old): weight for name, weight in weights.items()}
    save_file(weights, copied / VAE)
    new_names, old_names = read_all(checkpoint), read_all(copied)
    assert all(torch.equal(new_names[name], old_names[name]) for name in new_names)


# The hash


@pytest.mark.parametrize("file", [TRANSFORMER, "transformer/config.json", "tokenizer/tokenizer.json"])
def test_the_hash_changes_with_any_file_that_is_read(copied: Path, file: str) -> None:
    before = Checkpoint("a", copied).sha256
    with (copied / file).open("ab") as opened:
        opened.write(b" ")
    assert Checkpoint("a", copied).sha256 != before


def test_the_hash_does_not_depend_on_name_or_place(checkpoint: Path, copied: Path) -> None:
    assert Checkpoint("a", checkpoint).sha256 == Checkpoint("b", copied).sha256


def test_the_hash_ignores_what_no_export_reads(copied: Path) -> None:
    before = Checkpoint("a", copied).sha256
    (copied / "README.md").write_text("about this checkpoint")
    assert Checkpoint("a", copied).sha256 == before


# What is refused, by reading everything an export would read


def other_pipeline(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="CogVideoXPipeline")


def other_transformer(folder: Path) -> None:
    edit_json(folder / "model_index.json", transformer=["diffusers", "DiTTransformer2DModel"])


def other_norm(folder: Path) -> None:
    edit_json(folder / "transformer/config.json", norm_type="ada_norm_zero")


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def index_that_is_no_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def index_that_is_no_object(folder: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def index_without_components(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LattePipeline"}))


def index_with_an_odd_entry(folder: Path) -> None:
    edit_json(folder / "model_index.json", transformer="LatteTransformer3DModel")


def no_config(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()


def config_of_wrong_types(folder: Path) -> None:
    edit_json(folder / "transformer/config.json", num_layers="two")


def no_weights(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()


def only_bin_weights(folder: Path) -> None:
    weights = folder / ENCODER
    weights.with_name("pytorch_model.bin").write_bytes(pickle.dumps({}))
    weights.unlink()


def truncated_weights(folder: Path) -> None:
    os.truncate(folder / VAE, (folder / VAE).stat().st_size // 2)


def truncated_header(folder: Path) -> None:
    os.truncate(folder / TRANSFORMER, 5)


def empty_weights(folder: Path) -> None:
    (folder / ENCODER).write_bytes(b"")


def one_weight_missing(folder: Path) -> None:
    weights = load_file(folder / TRANSFORMER)
    del weights["temporal_transformer_blocks.1.ff.net.2.bias"]
    save_file(weights, folder / TRANSFORMER)


def wrong_shape(folder: Path) -> None:
    weights = load_file(folder / TRANSFORMER)
    weights["proj_out.weight"] = weights["proj_out.weight"][:-1].clone()
    save_file(weights, folder / TRANSFORMER)


def config_of_another_size(folder: Path) -> None:
    edit_json(folder / "transformer/config.json", attention_head_dim=16, cross_attention_dim=80)


def shard(folder: Path) -> list[Path]:
    weights = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    names, stem = sorted(weights), folder / "transformer" / "diffusion_pytorch_model"
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [Path(f"{stem}-0000{index}-of-00002.safetensors") for index in (1, 2)]
    table: dict[str, Any] = {}
    for file, half in zip(files, halves, strict=True):
        save_file({name: weights[name] for name in half}, file)
        table |= dict.fromkeys(half, file.name)
    Path(f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return files


def shard_missing(folder: Path) -> None:
    shard(folder)[1].unlink()


def shard_truncated(folder: Path) -> None:
    os.truncate(shard(folder)[0], 1000)


def shards_without_a_table(folder: Path) -> None:
    shard(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        other_pipeline,
        other_transformer,
        other_norm,
        no_index,
        index_that_is_no_json,
        index_that_is_no_object,
        index_without_components,
        index_with_an_odd_entry,
        no_config,
        config_of_wrong_types,
        no_weights,
        only_bin_weights,
        truncated_weights,
        truncated_header,
        empty_weights,
        one_weight_missing,
        wrong_shape,
        config_of_another_size,
        shard_missing,
        shard_truncated,
        shards_without_a_table,
    ],
)
def test_a_checkpoint_that_cannot_be_exported_is_refused(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=r"^checkpoint copied: [^\n]+$") as caught:
        read_all(copied)
    assert caught.value.exit_code == 1


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def unknown_scheduler(folder: Path) -> None:
    edit_json(folder / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])


def unnamed_scheduler(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["scheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def stochastic_scheduler(folder: Path) -> None:
    edit_json(folder / "model_index.json", scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])


def clipping_scheduler(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", clip_sample=True)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "damage",
    [
        no_tokenizer,
        broken_tokenizer,
        no_scheduler,
        unknown_scheduler,
        unnamed_scheduler,
        stochastic_scheduler,
        clipping_scheduler,
    ],
)
def test_a_missing_tokenizer_or_scheduler_is_refused_before_the_long_work(
    copied: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    class LongWorkBegan(Exception):
        pass

    def stop(done: int, total: int, name: str) -> None:
        raise LongWorkBegan

    damage(copied)
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        Export("latte", ExportRequest(), str(copied), tmp_path / "bundle").run(stop)


@pytest.mark.parametrize("size", [{"height": 10}, {"width": 6}, {"frames": 2}, {"frames": 5}])
def test_sizes_the_model_cannot_make_are_refused(checkpoint: Path, size: dict[str, int]) -> None:
    name = next(iter(size))
    with pytest.raises(InvalidRequest, match=rf"^{name}: got {size[name]}, expected"):
        split_checkpoint("latte", Checkpoint("tiny", checkpoint), ExportRequest(**size))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "field", [{"dtype": "fp8"}, {"dtype": "int8"}, {"height": 0}, {"width": -8}, {"frames": 0}, {"max_batch": 0}]
)
def test_requests_that_make_no_sense_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(field))):
        ExportRequest(**field)


# Where it is looked for


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c", ""])
def test_a_folder_that_is_not_there_is_a_checkpoint_error(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        find_checkpoint(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "bad name/with blanks", "a/--b"])
def test_a_hub_id_that_is_not_to_be_had_is_a_checkpoint_error(name: str, tmp_path: Path) -> None:
    program = (
        "import sys; from foresight.exporter.checkpoint import find_checkpoint; from foresight import CheckpointError\n"
        "try: find_checkpoint(sys.argv[1])\n"
        "except CheckpointError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, name], capture_output=True, text=True, env=environment, check=False
    )
    assert "neither a folder nor to be had from the hub" in done.stdout, done.stderr


def cached_on_the_hub(cache: Path, source: Path, place: str) -> None:
    """Put a folder where the hub's own library keeps what it has downloaded of `place`, owner/name or more."""
    owner, name, *inner = place.split("/", 2)
    repository = cache / f"models--{owner}--{name}"
    shutil.copytree(source, repository / "snapshots" / ("0" * 40) / "/".join(inner), dirs_exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)


def test_components_that_are_published_apart_make_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_sora.write_random(tmp_path / "whole", text={"num_layers": 1})
    places = REGISTRY["open-sora"].checkpoint
    assert not isinstance(places, str)
    for component, place in places.items():
        cached_on_the_hub(tmp_path / "cache", folder / component, place)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found = find_checkpoint(places)
    assert found.sha256 == Checkpoint("whole", folder).sha256
    assert (
        Export("open-sora", ExportRequest(frames=17, height=8, width=12), output=tmp_path / "bundle").plan().blocks == 4
    )
