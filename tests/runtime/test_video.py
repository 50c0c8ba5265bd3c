"""What is written can be read back, and appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from foresight.engines.errors import InvalidRequest, OutputError
from foresight.engines.progress import Progress
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.video import check_output, save_frames
from foresight.runtime.whole import write_whole


def moving_square(count: int = 5, height: int = 32, width: int = 48) -> Any:
    frames = np.zeros((count, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[8:24, 4 + 4 * index : 20 + 4 * index] = (250, 60, 10)
    return frames


def read_mp4(path: Path) -> tuple[Any, float]:
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def test_an_mp4_has_the_frames_and_the_rate(tmp_path: Path) -> None:
    frames = moving_square()
    read, rate = read_mp4(save_frames(frames, 8, tmp_path / "video.mp4"))
    assert read.shape == frames.shape and rate == 8
    assert np.abs(read.astype(int) - frames).mean() < 6


def test_the_same_frames_are_the_same_mp4_whatever_memory_held_before(tmp_path: Path) -> None:
    """Small frames: of those, encoders read further than they have written."""
    chance = np.random.default_rng(0)
    frames = moving_square(8, 32, 32)
    made = set()
    for number in range(60):
        junk = [np.full(chance.integers(100, 60_000), chance.integers(256), np.uint8) for _ in range(60)]
        del junk
        path = tmp_path / f"{number}.mp4"
        save_frames(frames, 8, path)
        made.add(path.read_bytes())
    assert len(made) == 1


def test_an_mp4_of_odd_sides_is_made_even(tmp_path: Path) -> None:
    read, _ = read_mp4(save_frames(moving_square(height=31, width=47), 8, tmp_path / "video.mp4"))
    assert read.shape[1:] == (32, 48, 3)


def test_a_gif_has_the_frames_and_the_rate(tmp_path: Path) -> None:
    frames = moving_square()
    with Image.open(save_frames(frames, 8, tmp_path / "video.gif")) as image:
        assert getattr(image, "n_frames", 1) == len(frames)
        assert image.info["duration"] == pytest.approx(125, abs=5)
        for index, frame in enumerate(frames):
            image.seek(index)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).mean() < 3


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_single_frame_is_a_video_too(tmp_path: Path, suffix: str) -> None:
    path = save_frames(moving_square(1), 8, tmp_path / f"video{suffix}")
    if suffix == ".mp4":
        assert len(read_mp4(path)[0]) == 1
    else:
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == 1


def test_an_npy_has_the_very_frames(tmp_path: Path) -> None:
    frames = moving_square()
    assert np.load(save_frames(frames, 8, tmp_path / "video.npy")).tobytes() == frames.tobytes()


def test_a_folder_has_the_very_frames_as_png(tmp_path: Path) -> None:
    frames = moving_square()
    folder = save_frames(frames, 8, tmp_path / "video")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"frame-{index:04d}.png" for index in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        assert np.asarray(Image.open(folder / name)).tobytes() == frame.tobytes()


@pytest.mark.parametrize("name", ["video.avi", "video.mp4.bak", "video.MOV", "video.webp"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"output: got '{name}', expected a name ending in"):
        save_frames(moving_square(), 8, tmp_path / name)
    assert not list(tmp_path.iterdir())


MISSING = {"video.mp4": ("PyAV", "av"), "video.gif": ("Pillow", "PIL.Image"), "video": ("Pillow", "PIL.Image")}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_library_is_named_with_its_remedy_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    library, module = MISSING[name]
    monkeypatch.setitem(sys.modules, module, None)
    remedy = r'pip install "foresight-engines\[video\]", or write \.npy'
    with pytest.raises(OutputError, match=rf"^output {name}: {library} is not installed .*{remedy}"):
        check_output(tmp_path / name)


def test_an_npy_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, module in MISSING.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert save_frames(moving_square(), 8, tmp_path / "video.npy").is_file()


@pytest.mark.parametrize("thing", [io.BytesIO(), b"video.mp4", None, 3])
def test_what_is_no_path_is_refused(thing: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"output: got {type(thing).__name__}, expected a path"):
        save_frames(moving_square(), 8, thing)


@pytest.mark.parametrize("name", ["video.MP4", "video.Gif", "video.NPY"])
def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path: Path, name: str) -> None:
    written = save_frames(moving_square(), 8, tmp_path / "capitals" / name)
    assert written.read_bytes() == save_frames(moving_square(), 8, tmp_path / name.lower()).read_bytes()
    assert [path.name for path in written.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "video.npy", "video"])
def test_an_older_result_is_replaced(tmp_path: Path, name: str) -> None:
    save_frames(moving_square(6), 8, tmp_path / name)
    save_frames(moving_square(2), 8, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "video":
        assert len(list((tmp_path / name).iterdir())) == 2


def test_a_folder_with_other_things_in_it_loses_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("years of work")
    with contextlib.suppress(OutputError, InvalidRequest):
        save_frames(moving_square(2), 8, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter-1.tex").read_text() == "years of work"


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npy", ""])
def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output .*; check the path"):
        save_frames(moving_square(), 8, tmp_path / "file" / f"video{suffix}")


def test_a_write_that_fails_leaves_the_older_result_and_nothing_else(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "video.npy").write_text("older")
    with pytest.raises(OutputError, match="No space left on device"):
        write_whole(tmp_path / "video.npy", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("video.npy", "older")]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "video.npy", interrupt)
    assert not list(tmp_path.iterdir())


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (250, 60, 10), (30, 200, 180), (9, 9, 90)]
# H.273: luma's share of red and of blue
MATRICES = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}


def rgb_from_yuv(luma: Any, blue: Any, red: Any, matrix: int) -> Any:
    """Colours as a player shows them that goes by the tags; limited range."""
    share_of_red, share_of_blue = MATRICES[matrix]
    luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r = luma + 2 * (1 - share_of_red) * red
    b = luma + 2 * (1 - share_of_blue) * blue
    g = (luma - share_of_red * r - share_of_blue * b) / (1 - share_of_red - share_of_blue)
    return 255 * np.clip(np.stack([r, g, b], -1), 0, 1)


@pytest.mark.parametrize(("height", "tag"), [(64, 6), (718, 6), (719, 1), (720, 1)])
def test_the_colours_of_an_mp4_are_right_where_its_tags_are_followed(tmp_path: Path, height: int, tag: int) -> None:
    frames = np.repeat(np.array(COLOURS, np.uint8), 32, 0)[None, None].repeat(height, 1)
    path = save_frames(frames, 8, tmp_path / "video.mp4")
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (tag, tag, tag, 1)
        planes = next(container.decode(video=0)).to_ndarray().astype(float)
    rows, width = height + height % 2, frames.shape[2]
    blue, red = planes[rows:].reshape(2, rows // 2, width // 2)
    middle = np.arange(16, width, 32)
    seen = rgb_from_yuv(planes[20, middle], blue[10, middle // 2], red[10, middle // 2], tag)
    assert np.abs(seen - COLOURS).max() < 5
    assert b"colr" in path.read_bytes()


def test_the_index_of_an_mp4_comes_first(tmp_path: Path) -> None:
    content = save_frames(moving_square(), 8, tmp_path / "video.mp4").read_bytes()
    boxes, at = [], 0
    while at < len(content):
        boxes.append(content[at + 4 : at + 8])
        at += int.from_bytes(content[at : at + 4], "big")
    assert boxes.index(b"moov") < boxes.index(b"mdat")


PROMPTS = ["a dog", 'ü \N{LINE SEPARATOR}"quoted"\n\tund\\', "nul \0, \x1b, \N{DOG FACE}\u200d", "long " * 2000]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_prompt_and_seed_are_in_the_file(tmp_path: Path, prompt: str) -> None:
    metadata = {"prompt": prompt, "seed": "7"}
    with av.open(str(save_frames(moving_square(2), 8, tmp_path / "video.mp4", metadata))) as container:
        assert json.loads(container.metadata["comment"]) == metadata
        assert container.metadata["title"] == prompt.replace("\0", "\ufffd")
    with Image.open(save_frames(moving_square(2), 8, tmp_path / "video.gif", metadata)) as image:
        assert json.loads(image.info["comment"]) == metadata
    folder = save_frames(moving_square(2), 8, tmp_path / "video", metadata)
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert {name: str(text) for name, text in image.info.items()} == metadata


def test_no_metadata_is_none(tmp_path: Path) -> None:
    with av.open(str(save_frames(moving_square(2), 8, tmp_path / "video.mp4"))) as container:
        assert {"comment", "title"}.isdisjoint(container.metadata)
    with Image.open(save_frames(moving_square(2), 8, tmp_path / "video.gif")) as image:
        assert "comment" not in image.info


@pytest.mark.parametrize("name", ["", "two words", "ü", "x" * 80, 3])
def test_a_name_that_no_format_takes_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"metadata: got the name .*, expected one like 'prompt'"):
        save_frames(moving_square(2), 8, tmp_path / "video.mp4", {name: "text"})


def test_a_name_that_looks_like_an_address_is_a_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b%03d.mp4", "-y.mp4", "100%.mp4"):
        assert len(read_mp4(save_frames(moving_square(), 8, name).absolute())[0]) == 5


def test_a_video_saves_its_own_frames_at_its_own_rate(pipeline: VideoPipeline, tmp_path: Path) -> None:
    video = pipeline("a red circle", steps=2)
    read, rate = read_mp4(video.save(tmp_path / "deep" / "er" / "video.mp4"))
    assert read.shape == video.frames.shape and rate == video.fps


def test_a_video_names_its_prompt_and_seed_unless_told_otherwise(pipeline: VideoPipeline, tmp_path: Path) -> None:
    video = pipeline("a red circle", steps=1, seed=5)
    with Image.open(video.save(tmp_path / "said.gif")) as image:
        assert json.loads(image.info["comment"]) == {"prompt": "a red circle", "seed": "5"}
    with Image.open(video.save(tmp_path / "silent.gif", {})) as image:
        assert "comment" not in image.info


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.npy", "v"])
def test_writing_tells_how_many_frames_are_written(tmp_path: Path, name: str) -> None:
    told: list[Progress] = []
    save_frames(np.zeros((5, 16, 16, 3), np.uint8), 8, tmp_path / name, on_progress=told.append)
    assert {(progress.phase, progress.total, progress.unit) for progress in told} == {(f"writing {name}", 5, "frames")}
    done = [progress.done for progress in told]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 5


def test_the_library_writes_into_no_bundle_either(bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="which lies in the bundle"):
        save_frames(np.zeros((1, 16, 16, 3), np.uint8), 8, bundle / "v.npy")
    assert not (bundle / "v.npy").exists()


@pytest.mark.parametrize("kind", ["mp4", "gif", "npy", "GIF"])
def test_bytes_are_those_of_a_file(pipeline: VideoPipeline, tmp_path: Path, kind: str) -> None:
    video = pipeline("a red circle", steps=1)
    assert video.to_bytes(kind) == video.save(tmp_path / f"video.{kind}").read_bytes()
    file = io.BytesIO()
    video.write_to(file, kind, {})
    assert file.getvalue() == video.save(tmp_path / f"silent.{kind}", {}).read_bytes() and not file.closed


@pytest.mark.parametrize("kind", ["", "avi", ".mp4", None, "a/../mp4"])
def test_bytes_of_another_kind_are_refused(pipeline: VideoPipeline, kind: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"kind: got .*, expected one of mp4, gif, npy, png, jpg, jpeg"):
        pipeline("a red circle", steps=1).to_bytes(kind)


def test_a_file_that_cannot_be_written_to_is_an_output_error(pipeline: VideoPipeline) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="^output: No space left on device; check the free space"):
        pipeline("a red circle", steps=1).write_to(Full())


@pytest.mark.parametrize(("name", "off"), [("image.png", 0), ("image.jpg", 6), ("image.JPEG", 6)])
def test_a_single_frame_is_an_image(tmp_path: Path, name: str, off: float) -> None:
    frames, texts = moving_square(1), {"prompt": "a\nsquare ü"}
    with Image.open(save_frames(frames, 8, tmp_path / name, texts)) as image:
        assert np.abs(np.asarray(image).astype(int) - frames[0]).mean() <= off
        said = image.info.get("prompt") or json.loads(image.info["comment"])["prompt"]
    assert said == texts["prompt"]


@pytest.mark.parametrize("name", ["image.png", "image.jpg"])
def test_several_frames_are_no_image_and_that_is_known_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"output: got '{name}' for 2 frames, expected at most 1"):
        check_output(tmp_path / name, 2)
