"""Where results go is checked before the work; what is written is what was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.commands.outputs import Targets, read_latents, read_prompts, read_trace, save_array
from foresight.engines.errors import InvalidRequest, OutputError
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Foresight
from tests.support import copy_bundle, snapshot


@pytest.mark.parametrize(
    ("name", "file"),
    [("frames", "f.npz"), ("latents", "f"), ("report", "r.htm"), ("trace", "t.txt"), ("output", "video.avi")],
)
def test_a_wrong_suffix_is_refused_before_the_work(tmp_path: Path, name: str, file: str) -> None:
    argument = {"frames": "save_frames", "latents": "save_latents"}.get(name, name)
    with pytest.raises(InvalidRequest, match=rf"^{argument}: got '{file}', expected a name ending in"):
        Targets(**{name: tmp_path / file}).check()


def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path: Path) -> None:
    Targets(*(tmp_path / name for name in ("v.NPY", "f.NPY", "l.Npy", "r.HTML", "t.JSON"))).check()


@pytest.mark.parametrize("name", ["output", "frames", "latents", "report", "trace"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    suffix = {"output": ".mp4", "report": ".html", "trace": ".json"}.get(name, ".npy")
    with pytest.raises(OutputError, match="choose a place that is writable"):
        Targets(**{name: tmp_path / "file" / f"x{suffix}"}).check()


@pytest.mark.parametrize(
    ("name", "file", "module"),
    [
        ("output", "v.mp4", "av"),
        ("output", "v.gif", "PIL.Image"),
        ("output", "frames", "PIL.Image"),
        ("report", "r.html", "jinja2"),
        ("report", "r.html", "PIL.Image"),
    ],
)
def test_a_missing_library_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OutputError, match=rf"^{name}.* is not installed .*pip install"):
        Targets(**{name: tmp_path / "new" / file}).check()
    assert not list(tmp_path.iterdir())


def test_checking_leaves_no_file(tmp_path: Path) -> None:
    Targets(output=tmp_path / "video.mp4", trace=tmp_path / "trace.json").check()
    assert not list(tmp_path.iterdir())


def test_two_results_under_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        Targets(frames=tmp_path / "same.npy", latents=tmp_path / "same.npy").check()


def test_several_videos_are_numbered() -> None:
    targets = Targets(output=Path("a/video.mp4"), frames=Path("frames.npy"))
    assert targets.numbered(2, 5) == Targets(output=Path("a/video-002.mp4"), frames=Path("frames-002.npy"))


def test_a_single_video_keeps_its_name() -> None:
    assert Targets(output=Path("video.mp4")).numbered(0, 1) == Targets(output=Path("video.mp4"))


def test_everything_wanted_is_written_and_nothing_else(pipeline: VideoPipeline, tmp_path: Path) -> None:
    video = pipeline("a red circle", steps=4, policy=Foresight(warmup=2, gamma=2))
    targets = Targets(
        output=tmp_path / "video.gif",
        frames=tmp_path / "frames.npy",
        latents=tmp_path / "latents.npy",
        trace=tmp_path / "trace.json",
    )
    written = targets.write(video)
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert np.load(tmp_path / "frames.npy").tobytes() == video.frames.tobytes()
    assert np.load(tmp_path / "latents.npy").tobytes() == video.latents.tobytes()


def test_a_trace_is_plain_json_of_the_request(pipeline: VideoPipeline, tmp_path: Path) -> None:
    video = pipeline("a red circle", steps=4, policy=Foresight(warmup=2, gamma=2))
    Targets(trace=tmp_path / "trace.json").write(video)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == json.loads(json.dumps(video.trace.to_dict(), allow_nan=False))
    assert len(trace["steps"]) == 4 and trace["policy"]["gamma"] == 2 and trace["bundle"] == pipeline.bundle.id


def test_latents_survive_being_written_and_read(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    save_array(tmp_path / "latents.npy", latents)
    assert read_latents(tmp_path / "latents.npy").tobytes() == latents.tobytes()


BAD_LATENTS = {
    "missing": None,
    "empty": b"",
    "text": b"nothing of the kind",
    "truncated": b"\x93NUMPY\x01\x00v\x00",
    "broken zip": b"PK\x03\x04broken",
    "pickle": b"\x80\x04N.",
}


@pytest.mark.parametrize("kind", BAD_LATENTS)
def test_latents_that_cannot_be_read_are_an_invalid_request(tmp_path: Path, kind: str) -> None:
    content = BAD_LATENTS[kind]
    if content is not None:
        (tmp_path / "latents.npy").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"latents .*: cannot be read"):
        read_latents(tmp_path / "latents.npy")


def test_several_arrays_are_no_latents(tmp_path: Path) -> None:
    np.savez(tmp_path / "latents.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(InvalidRequest, match="holds several arrays"):
        read_latents(tmp_path / "latents.npz")


def test_objects_are_no_latents(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_latents(tmp_path / "latents.npy")


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfa red circle\r\na blue square\r\n", ["a red circle", "a blue square"]),
        ("one\u2028still one\ntwo\x0bstill\x0ctwo\nthree\x85still\x1cthree".encode(), 3),
        ("\ufeffone\n\ufeff\ufefftwo\r\n\ufeff\nth\ufeffree".encode(), ["one", "two", "th\ufeffree"]),
        (b"one\rstill one\n\n \t\n  two  ", ["one\rstill one", "two"]),
        ("\u2028inside\u2029\n".encode(), ["\u2028inside\u2029"]),
    ],
)
def test_lines_of_a_prompt_file_end_at_line_feeds_alone(tmp_path: Path, content: bytes, prompts: Any) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    found = read_prompts(tmp_path / "prompts.txt")
    assert len(found) == prompts if isinstance(prompts, int) else found == prompts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_prompts_in_another_encoding_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prompts.txt").write_text("ein grüner Kreis\n", encoding=encoding)
    with pytest.raises(InvalidRequest, match=r"prompts .*: got .*, expected UTF-8.*; save it as UTF-8"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_trace_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text('{"blocks": []}', encoding="utf-8-sig")
    assert read_trace(tmp_path / "trace.json") == {"blocks": []}


def test_no_result_is_written_into_a_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(bundle, tmp_path / "bundle")
    (tmp_path / "link").symlink_to(copy)
    before = snapshot(copy)
    for place in (copy, copy / "engines", copy / "new" / "folder", tmp_path / "link", copy / ".." / "bundle"):
        for field, name in {"output": "x.mp4", "frames": "x.npy", "report": "x.html", "trace": "x.json"}.items():
            with pytest.raises(InvalidRequest, match=r"output: got .*, which lies in the bundle .*"):
                Targets(**{field: place / name}).check()
    assert snapshot(copy) == before
    Targets(output=tmp_path / "x.mp4").check()


def test_stdout_is_no_place_for_a_video() -> None:
    with pytest.raises(InvalidRequest, match="output: got '-'"):
        Targets(output=Path("-")).check()


def test_a_header_of_latents_can_ask_for_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "latents.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1, 4_000_000_000, 4000)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_latents(tmp_path / "latents.npy")
