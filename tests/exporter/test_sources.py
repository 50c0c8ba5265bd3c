"""Where several files of weights lie side by side, those are read that the component's own library reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, LatteTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.exporter.checkpoint import Checkpoint, find_checkpoint
from foresight.exporter.export import Export, ExportRequest
from tests.support import Outcome, copy_bundle, edit_manifest

CLASSES: dict[str, Any] = {
    "transformer": LatteTransformer3DModel,
    "vae": AutoencoderKL,
    "text_encoder": T5EncoderModel,
}
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PROBE = {
    "transformer": "proj_out.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
}


@pytest.fixture
def copied(single_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(single_checkpoint, tmp_path / "copied"))


def whole(folder: Path, component: str, variant: str = "") -> Path:
    return folder / component / f"{STEMS[component]}{variant and f'.{variant}'}.safetensors"


def write(folder: Path, component: str, number: float, variant: str | None = None, sharded: bool = False) -> None:
    """Weights of which the probe has that one number everywhere, by the library's own save_pretrained."""
    model = CLASSES[component].from_pretrained(folder.parent / "original" / component)
    with torch.no_grad():
        dict(model.named_parameters())[PROBE[component]].fill_(number)
    size = "10KB" if sharded else "5GB"
    target = folder.parent / "written"
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target, variant=variant, max_shard_size=size)
    for file in target.glob("*.safetensors*"):
        shutil.move(file, folder / component / file.name)


@pytest.fixture
def empty(copied: Path) -> Path:
    """A checkpoint that has no weights yet; the original lies beside it."""
    shutil.copytree(copied, copied.parent / "original")
    for file in copied.rglob("*.safetensors"):
        file.unlink()
    return copied


def probe(folder: Path, component: str, variant: str | None = None) -> float:
    return float(Checkpoint("copied", folder, variant=variant).tensor(component, PROBE[component]).flatten()[0])


@pytest.mark.parametrize("component", CLASSES)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_an_index_and_a_whole_file_the_librarys_own_choice_is_read(
    empty: Path, component: str, variant: str | None
) -> None:
    write(empty, component, 1.0, variant, sharded=True)
    assert list((empty / component).glob("*.index*.json"))
    write(empty, component, 2.0, variant)
    loaded = CLASSES[component].from_pretrained(empty / component, variant=variant)
    expected = float(dict(loaded.named_parameters())[PROBE[component]].detach().flatten()[0])
    assert probe(empty, component, variant) == expected == (2.0 if component == "text_encoder" else 1.0)


@pytest.mark.parametrize("component", CLASSES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_is_read_where_it_is_asked_for(empty: Path, component: str, sharded: bool) -> None:
    write(empty, component, 1.0, sharded=sharded)
    write(empty, component, 2.0, "fp16", sharded=sharded)
    assert (probe(empty, component), probe(empty, component, "fp16")) == (1.0, 2.0)


def test_components_without_the_variant_are_read_as_ever(copied: Path) -> None:
    whole(copied, "vae").rename(whole(copied, "vae", "fp16"))
    job = Export("latte", ExportRequest(), str(copied), copied.parent / "bundle", variant="fp16")
    assert job.plan().variant == "fp16"


def test_a_file_of_the_other_library_is_not_preferred(empty: Path) -> None:
    write(empty, "transformer", 1.0)
    shutil.copy(whole(empty, "transformer"), empty / "transformer/model.safetensors")
    write(empty, "transformer", 2.0)
    assert probe(empty, "transformer") == 2.0


def test_a_variant_alone_is_refused_with_the_option_that_reads_it(
    copied: Path, foresight_cli: Callable[..., Outcome]
) -> None:
    for component in CLASSES:
        whole(copied, component).rename(whole(copied, component, "fp16"))
    export = ("export", "--model", "latte", "--checkpoint", copied, "--output", copied.parent / "bundle", "--dry-run")
    refused = foresight_cli(*export)
    assert refused.code == 1 and "give variant fp16" in refused.err
    planned = foresight_cli(*export, "--variant", "fp16")
    assert planned.code == 0 and "variant fp16" in planned.out


def test_the_variant_that_was_read_is_recorded(copied: Path) -> None:
    whole(copied, "vae").rename(whole(copied, "vae", "fp16"))
    source = Export("latte", ExportRequest(), str(copied), variant="fp16").source
    assert (source.variant, source.revision) == ("fp16", None)


def test_revision_and_variant_are_shown(
    single_bundle: Path, tmp_path: Path, foresight_cli: Callable[..., Outcome]
) -> None:
    folder = copy_bundle(single_bundle, tmp_path / "bundle")
    edit_manifest(folder, lambda manifest: manifest["source"].update(revision="v1 (0123abc)", variant="fp16"))
    assert "revision v1 (0123abc), variant fp16, SHA-256" in foresight_cli("inspect", folder).out


@pytest.mark.parametrize("variant", ["fp8", "ema"])
def test_a_variant_that_nothing_has_is_refused(copied: Path, variant: str) -> None:
    with pytest.raises(CheckpointError, match=f"no component has the variant {variant}.*leave variant out"):
        Export("latte", ExportRequest(), str(copied), copied.parent / "bundle", variant=variant).plan()


def test_a_variant_in_another_format_is_refused(copied: Path) -> None:
    (copied / "text_encoder/pytorch_model.fp16.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"fp16 only in files that are not read, expected model.fp16.safetensors"):
        Checkpoint("copied", copied, variant="fp16").stored("text_encoder")


def test_the_hash_is_of_the_files_that_are_read(empty: Path) -> None:
    for component in CLASSES:
        write(empty, component, 1.0)
    before = Checkpoint("a", empty).sha256
    for component in CLASSES:
        write(empty, component, 2.0, "fp16")
    assert Checkpoint("a", empty).sha256 == before != Checkpoint("a", empty, variant="fp16").sha256


# Index and shards


def shard(folder: Path) -> tuple[Path, dict[str, Any]]:
    file = whole(folder, "transformer")
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    table = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(table.values()):
        save_file({name: weights[name] for name in names if table[name] == shard}, file.with_name(shard))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index, {"metadata": {}, "weight_map": table}


def test_an_index_whose_shards_are_not_all_there_is_refused_by_the_one_that_is_missing(copied: Path) -> None:
    index, _ = shard(copied)
    index.with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has 1 of the 2 shards that .*, not diffusion.*-00002-of-00002"):
        Checkpoint("copied", copied).stored("transformer")


def test_an_index_that_names_a_weight_that_no_shard_holds_is_refused(copied: Path) -> None:
    index, content = shard(copied)
    content["weight_map"]["phantom.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names 1 weights that its shards do not hold \(phantom.weight\)"):
        Checkpoint("copied", copied).stored("transformer")


def test_a_shard_that_holds_what_the_index_does_not_name_is_refused(copied: Path) -> None:
    index, content = shard(copied)
    del content["weight_map"]["proj_out.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"holds 1 weights that .* does not place there \(proj_out.bias\)"):
        Checkpoint("copied", copied).stored("transformer")


def test_an_index_that_leads_elsewhere_is_refused(copied: Path) -> None:
    index, content = shard(copied)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], "../vae/x.safetensors")}))
    with pytest.raises(CheckpointError, match="has no table of weights and files"):
        Checkpoint("copied", copied).stored("transformer")


def test_shards_without_an_index_are_refused(copied: Path) -> None:
    index, _ = shard(copied)
    index.unlink()
    with pytest.raises(CheckpointError, match="has shards of weights .* and no index of them"):
        Checkpoint("copied", copied).stored("transformer")


# Files that are none


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/0123abc")


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9524621280\n")


def nothing(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (dangling, r"is a link to \.\./\.\./blobs/0123abc, which is not there; .*download it again"),
        (pointer, "is a Git LFS pointer, not the file itself; run `git lfs install` and `git lfs pull`"),
        (nothing, "is empty; .*download it again"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        whole(Path(), "vae"),
        whole(Path(), "text_encoder"),
        Path("transformer/config.json"),
        Path("tokenizer/tokenizer.json"),
    ],
)
def test_what_is_no_file_is_found_before_anything_is_written(
    copied: Path, damage: Callable[[Path], None], told: str, name: Path, foresight_cli: Callable[..., Outcome]
) -> None:
    damage(copied / name)
    with pytest.raises(CheckpointError, match=rf"^checkpoint [^\n]*{name.name} {told}"):
        Export("latte", ExportRequest(), str(copied), copied.parent / "bundle").plan()


def test_a_dangling_link_is_not_passed_over_for_the_next_file(empty: Path) -> None:
    write(empty, "text_encoder", 1.0, sharded=True)
    whole(empty, "text_encoder").symlink_to("../../blobs/0123abc")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link to"):
        probe(empty, "text_encoder")


def test_a_folder_has_no_revision(copied: Path) -> None:
    with pytest.raises(InvalidRequest, match="revision: got 'v1' for the folder .*leave it out"):
        find_checkpoint(str(copied), revision="v1")
