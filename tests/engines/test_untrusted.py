"""Files of an untrusted bundle are judged before they are read, and whatever is in them ends in an error of ours."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.engines.backend import choose_backend
from foresight.engines.bundle import COMPILED, MANIFEST, open_bundle, verify_files
from foresight.engines.compiled import list_compiled
from foresight.engines.errors import IntegrityError
from foresight.runtime.pipeline import load
from tests.support import Json, copy_bundle, edit_manifest, read_manifest, vouch_for

WEIGHTS = "epilogue.data"


@pytest.fixture
def copied(single_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return copy_bundle(single_bundle, tmp_path / "copied")


def check(folder: Path) -> None:
    verify_files(open_bundle(folder))


# The manifest


def link_to_nowhere_that_ends(file: Path) -> None:
    file.symlink_to("/dev/zero")


def link_to_a_good_one(file: Path) -> None:
    file.symlink_to(file.parent / "other.json")


def dangling_link(file: Path) -> None:
    file.symlink_to("nowhere")


def pipe(file: Path) -> None:
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.mkdir()


def large(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 34)  # no disk is taken, but to read it takes 16 GiB


@pytest.mark.parametrize("make", [link_to_nowhere_that_ends, link_to_a_good_one, dangling_link, pipe, folder, large])
def test_a_manifest_that_is_no_plain_small_file_is_refused_unread(copied: Path, make: Callable[[Path], None]) -> None:
    (copied / MANIFEST).rename(copied / "other.json")
    make(copied / MANIFEST)
    with pytest.raises(IntegrityError, match=r"manifest\.json is (a link|no regular file|larger than 16 MiB)"):
        open_bundle(copied)


@pytest.mark.parametrize("make", [link_to_nowhere_that_ends, pipe, folder])
def test_a_file_that_is_no_plain_one_is_refused_unread(copied: Path, make: Callable[[Path], None]) -> None:
    (copied / WEIGHTS).unlink()
    make(copied / WEIGHTS)
    with pytest.raises(IntegrityError, match=r"epilogue\.data is (a link|no regular file)"):
        check(copied)


def put(*place: Any, value: Any) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        at: Any = manifest
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value

    return change


def same_graph_twice(manifest: Json) -> None:
    manifest["prologue"]["graph"] = manifest["epilogue"]["graph"]


def file_of_no_use(manifest: Json) -> None:
    manifest["files"]["spare.data"] = manifest["files"][WEIGHTS]


def tokenizer_is_weights(manifest: Json) -> None:
    manifest["text"]["tokenizer"] = WEIGHTS
    del manifest["files"]["tokenizer.json"]


EXCESSES: dict[str, Callable[[Json], None]] = {
    "height": put("shape", "height", value=1 << 40),
    "frames": put("shape", "frames", value=10**9),
    "latents": put("shape", "latents", value=[4, 1, 1 << 20, 1 << 20]),
    "batch": put("shape", "max_batch", value=10**6),
    "range": put("ranges", "batch", value=[1, 1 << 40]),
    "steps": put("sampler", "max_steps", value=10**7),
    "tokens": put("text", "max_tokens", value=10**9),
    "padding": put("text", "pad_id", value=-1),
    "fps": put("defaults", "fps", value=10**6),
    "guidance": put("defaults", "guidance", value=1e20),
    "text": put("defaults", "prompt", value="a" * 100_000),
    "escape": put("model", value="\x1b[2J"),
    "name": put("prologue", "name", value="p" * 1000),
    "dimensions": put("prologue", "outputs", 0, "shape", value=["batch"] * 9),
    "bytes": put("files", WEIGHTS, "bytes", value=-1),
    "graph": put("files", "epilogue.onnx", "bytes", value=1 << 40),
    "hash": put("files", WEIGHTS, "sha256", value="../.."),
    "cautions": put("cautions", value=["a"] * 100_000),
    "largest": put("shape", "height", value=(1 << 63) - 1),
    "one graph for two parts": same_graph_twice,
    "a file of no use": file_of_no_use,
    "a tokenizer that is a graph's weights": tokenizer_is_weights,
}


@pytest.mark.parametrize("excess", EXCESSES)
def test_a_manifest_beyond_all_bounds_is_refused(copied: Path, excess: str) -> None:
    edit_manifest(copied, EXCESSES[excess])
    with pytest.raises(IntegrityError, match=r"manifest\.json is not one of a bundle") as caught:
        open_bundle(copied)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


# What lies beside the files


def test_what_a_hub_puts_beside_the_files_is_left_alone(copied: Path) -> None:
    (copied / ".cache" / "huggingface").mkdir(parents=True)
    (copied / ".cache" / "huggingface" / "epilogue.data.metadata").write_text("etag")
    (copied / ".gitattributes").write_text("*.data filter=lfs")
    (copied / "README.md").write_text("---\nlicense: mit\n---")
    check(copied)


@pytest.mark.parametrize("name", ["epilogue.data", MANIFEST])
def test_links_of_a_hub_s_cache_are_refused_with_the_command_that_gets_files(
    copied: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "blobs").mkdir()
    (copied / name).rename(tmp_path / "blobs" / "0a1b")
    (copied / name).symlink_to("../blobs/0a1b")
    with pytest.raises(IntegrityError, match=r"hf download REPOSITORY --local-dir FOLDER"):
        check(copied)


def test_a_pointer_of_git_lfs_is_said_to_be_one(copied: Path) -> None:
    (copied / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 4\n")
    with pytest.raises(IntegrityError, match=r"epilogue\.data has \d+ bytes, .* run git lfs pull"):
        check(copied)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_engines_behind_a_link_are_refused(copied: Path, tmp_path: Path, inside: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if inside:
        (copied / COMPILED).mkdir()
    link = copied / COMPILED / "tensorrt-0123456789ab" if inside else copied / COMPILED
    link.symlink_to(elsewhere)
    opened = open_bundle(copied)
    for attempt in (verify_files, list_compiled, choose_backend):
        with pytest.raises(IntegrityError, match=rf"{COMPILED}\S* is a link"):
            attempt(opened)


# The sampler's table


def npz(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def columns(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}


def claims(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def bomb(path: Path) -> None:
    npz(path, **(columns(path) | {"timesteps": claims((1 << 23,), bytes(1 << 26))}))


def claim(path: Path) -> None:
    npz(path, **(columns(path) | {"timesteps": claims((1 << 40,))}))


def negative(path: Path) -> None:
    npz(path, **(columns(path) | {"timesteps": claims((-1, -8), bytes(64))}))


def extra_member(path: Path) -> None:
    npz(path, **(columns(path) | {"more": claims((1,), bytes(8))}))


def no_header(path: Path) -> None:
    npz(path, **(columns(path) | {"timesteps": b"\x93NUMPY\x01\x00\xff\xff("}))


def damaged_member(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[200:300] = bytes(100)
    path.write_bytes(raw)


def unknown_packing(path: Path) -> None:
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")
    path.write_bytes(raw[: at + 10] + b"\x63\x00" + raw[at + 12 :])


@pytest.mark.parametrize("damage", [bomb, claim, negative, extra_member, no_header, damaged_member, unknown_packing])
def test_a_sampler_is_judged_before_it_is_unpacked(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied / "sampler.npz")
    with pytest.raises(IntegrityError, match=r"sampler\.npz: is not a sampler table"):
        load(vouch_for(copied, "sampler.npz"))


# The tokenizer


def edit_tokenizer(folder: Path, **change: Any) -> Path:
    tokenizer = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return vouch_for(folder, "tokenizer.json")


def test_a_tokenizer_that_panics_is_an_error_of_ours(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pattern = {"type": "Replace", "pattern": {"Regex": "^(a+)+$"}, "content": ""}
    pipeline = load(edit_tokenizer(copied, normalizer=pattern), threads=1)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: cannot make tokens of a prompt"):
        pipeline("a" * 40 + "b", steps=1)
    assert capfd.readouterr().out == ""


def test_a_tokenizer_that_makes_no_tokens_is_an_error_of_ours(copied: Path) -> None:
    pattern = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    pipeline = load(edit_tokenizer(copied, normalizer=pattern, post_processor=None), threads=1)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: makes no tokens"):
        pipeline("a dog", steps=1)


# Anything at all

FUZZ = """
    import os, random, resource, sys
    from pathlib import Path
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)
    import foresight
    from tests.support import vouch_for

    folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = sorted(file.name for file in folder.iterdir())
    small = [name for name in names if not name.endswith(".data")]
    original = {name: (folder / name).read_bytes() for name in names}
    for seed in range(first, last):
        chance = random.Random(seed)
        name = chance.choice(small if chance.random() < 0.8 else names)
        raw = bytearray(original[name])
        if chance.random() < 0.25:
            del raw[chance.randrange(len(raw)):]
        else:
            for _ in range(chance.choice((1, 1, 2, 8))):
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        print(seed, name, end=" ", file=sys.stderr, flush=True)
        (folder / name).write_bytes(raw)
        if name != "manifest.json":
            vouch_for(folder, name)
        try:
            video = foresight.load(folder, threads=1)("a red circle", steps=2)
            print("ran", file=sys.stderr)
        except foresight.ForesightError as error:
            assert "\\n" not in str(error), str(error)
            print("refused", type(error).__name__, str(error)[:300], file=sys.stderr)
        for changed in (name, "manifest.json"):
            (folder / changed).write_bytes(original[changed])
    print("done", file=sys.stderr)
"""


def fuzz(folder: Path, first: int, last: int) -> str:
    command = [sys.executable, "-c", textwrap.dedent(FUZZ), str(folder), str(first), str(last)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=root)
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else str(done.returncode)
    assert done.returncode == 0, f"ended by {how}: {done.stderr[-2000:]}"
    assert done.stdout == "", "something was printed"
    assert done.stderr.endswith("done\n")
    return done.stderr


def test_whatever_is_flipped_or_cut_off_ends_in_an_error_of_ours_or_a_video(copied: Path) -> None:
    told = fuzz(copied, 0, 40)
    assert " ran\n" in told
    assert " refused IntegrityError" in told


@pytest.mark.slow
def test_so_do_300_of_them(copied: Path) -> None:
    fuzz(copied, 40, 300)


def test_the_damaged_bundles_are_sound_before(copied: Path) -> None:
    assert read_manifest(copied)["schema"]
    check(copied)
