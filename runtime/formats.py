"""The files that frames can become: mp4, gif, npy, a folder of png, and of a single frame png and jpg."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.arrays import HostArray
from ..engines.errors import InvalidRequest, OutputError, one_line
from ..engines.progress import Counter

Metadata = Mapping[str, str]
Writer = Callable[[HostArray, int, Path, Metadata, Counter], None]
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Library:
    """What a writer needs beyond the base install."""

    name: str
    module: str


@dataclass(frozen=True)
class Format:
    """How frames (frames, height, width, 3) uint8 are written to a path; `most` is how many it takes."""

    write: Writer
    library: Library | None = None
    most: int | None = None

    def check(self, name: str, frames: int | None = None) -> None:
        """Whether so many frames can be written to a file of that name here. Raises InvalidRequest, OutputError."""
        if self.most is not None and frames is not None and frames > self.most:
            raise InvalidRequest(
                f"output: got {name!r} for {frames} frames, expected at most {self.most} in such a file; name an .mp4 "
                "or .gif, or a folder"
            )
        if self.library is None:
            return
        try:
            importlib.import_module(self.library.module)
        except ImportError as error:
            raise OutputError(
                f"output {name}: {self.library.name} is not installed ({one_line(error)}); "
                'pip install "foresight-engines[video]", or write .npy, which needs nothing'
            ) from error


def find_format(name: str) -> Format:
    """The one of a file's name. Raises InvalidRequest for another suffix."""
    found = FORMATS.get(Path(name).suffix.lower())
    if found is None:
        raise InvalidRequest(
            f"output: got {name!r}, expected a name ending in .mp4, .gif, .npy, .png or .jpg of a single frame, or a "
            "folder"
        )
    return found


@dataclass(frozen=True)
class _Colours:
    """A number as files have it, of a standard ITU-T H.273's; and what the conversion calls it."""

    tag: int
    name: str


BT709, BT601, LIMITED_RANGE = _Colours(1, "ITU709"), _Colours(6, "ITU601"), _Colours(1, "MPEG")


def _write_mp4(frames: HostArray, fps: int, path: Path, metadata: Metadata, counter: Counter) -> None:
    import av

    _, height, width, _ = frames.shape
    # 4:2:0 video has even sides only: repeat the last row or column of odd ones
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    standard = BT709 if frames.shape[1] >= 720 else BT601  # as players guess where nothing is said
    # the name is a file's, whatever it looks like; its index goes first, so that it plays while it is fetched
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if metadata:
            container.metadata["title"] = metadata.get("prompt", "").replace("\0", "\N{REPLACEMENT CHARACTER}")
            container.metadata["comment"] = _comment(metadata)
        # mbtree reads memory that nobody has written where frames are small: the same frames gave other files
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "mbtree": "0"})
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = standard.tag
        codec.color_range = LIMITED_RANGE.tag
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=standard.name, dst_color_range=LIMITED_RANGE.name
            )
            container.mux(stream.encode(picture))
            counter.advance()
        container.mux(stream.encode())


def _write_gif(frames: HostArray, fps: int, path: Path, metadata: Metadata, counter: Counter) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.info.update({"comment": _comment(metadata).encode()} if metadata else {})
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    counter.advance(len(frames))


def _write_npy(frames: HostArray, fps: int, path: Path, metadata: Metadata, counter: Counter) -> None:
    with path.open("wb") as file:  # given a name, np.save would add .npy to x.NPY
        np.save(file, frames, allow_pickle=False)
    counter.advance(len(frames))


def _write_pngs(frames: HostArray, fps: int, path: Path, metadata: Metadata, counter: Counter) -> None:
    from PIL import Image

    texts = _png_texts(metadata)
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame-{index:04d}.png", pnginfo=texts)
        counter.advance()


def _write_png(frames: HostArray, fps: int, path: Path, metadata: Metadata, counter: Counter) -> None:
    from PIL import Image

    for frame in frames:
        Image.fromarray(frame).save(path, "png", pnginfo=_png_texts(metadata))
        counter.advance()


def _write_jpeg(frames: HostArray, fps: int, path: Path, metadata: Metadata, counter: Counter) -> None:
    from PIL import Image

    comment = _comment(metadata).encode() if metadata else b""
    for frame in frames:
        Image.fromarray(frame).save(path, "jpeg", quality=JPEG_QUALITY, subsampling=0, comment=comment)
        counter.advance()


def _png_texts(metadata: Metadata) -> Any:
    from PIL import PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    for name, text in metadata.items():
        texts.add_itxt(name, text)
    return texts


def _comment(metadata: Metadata) -> str:
    """One text of several; JSON, so that any text survives."""
    return json.dumps(dict(metadata), ensure_ascii=False)


_AV, _PILLOW = Library("PyAV", "av"), Library("Pillow", "PIL.Image")
FORMATS = {
    ".mp4": Format(_write_mp4, _AV),
    ".gif": Format(_write_gif, _PILLOW),
    ".npy": Format(_write_npy),
    ".png": Format(_write_png, _PILLOW, most=1),
    ".jpg": Format(_write_jpeg, _PILLOW, most=1),
    ".jpeg": Format(_write_jpeg, _PILLOW, most=1),
    "": Format(_write_pngs, _PILLOW),
}
