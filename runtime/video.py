"""A finished video, and writing it: mp4, gif, npy, or a folder of png."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engines.arrays import Array, HostArray
from ..engines.bundle import refuse_inside_bundle
from ..engines.errors import InvalidRequest, OutputError, one_line, quoted
from ..engines.progress import Counter, OnProgress
from .trace import Trace
from .whole import holds_only_frames, write_whole

QUOTED = 40  # characters of a prompt, in messages
Metadata = Mapping[str, str]
Writer = Callable[[HostArray, int, Path, Metadata, Counter], None]


@dataclass(frozen=True)
class _Colours:
    """A number as files have it, of a standard ITU-T H.273's; and what the conversion calls it."""

    tag: int
    name: str


BT709, BT601, LIMITED_RANGE = _Colours(1, "ITU709"), _Colours(6, "ITU601"), _Colours(1, "MPEG")


@dataclass(frozen=True, repr=False)
class Video:
    """One result, owned by the caller.

    `frames` (frames, height, width, 3) uint8 RGB; `latents` the final latents before the VAE, (latent shape) fp32;
    both numpy arrays, or the device's if the request asked for that. `trace` is shared by the videos of one batch.
    """

    frames: Array
    latents: Array
    fps: int
    prompt: str
    seed: int
    trace: Trace

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        seconds = frames / self.fps
        return (
            f"<Video of {self.prompt[:QUOTED]!r}{'…' if len(self.prompt) > QUOTED else ''}, seed {self.seed}: {frames} "
            f"frames of {height} x {width}, {seconds:.1f} s, {100 * self.trace.share_skipped:.0f} % of blocks skipped>"
        )

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Metadata | None = None,
        on_progress: OnProgress | None = None,
    ) -> Path:
        """Write the frames as the suffix says: .mp4, .gif, .npy, or none for a folder of png files.

        The file appears whole or not at all. mp4 is H.264 with its index first, in colours tagged BT.709 from a height
        of 720 on, else BT.601. `metadata`, names and texts, is written into all but .npy: texts of each png; the
        comment of mp4 and gif, as JSON, where `prompt` is also the mp4's title. None is prompt and seed, {} nothing.
        `on_progress` is told the frames written. Raises InvalidRequest for another suffix, for what is no path, and for
        a place inside a bundle; OutputError.
        """
        if metadata is None:
            metadata = {"prompt": self.prompt, "seed": str(self.seed)}
        frames = self.frames if isinstance(self.frames, np.ndarray) else self.frames.get()
        return save_frames(frames, self.fps, path, metadata, on_progress)


def save_frames(
    frames: HostArray,
    fps: int,
    path: str | os.PathLike[str],
    metadata: Metadata | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write frames (frames, height, width, 3) uint8, with no metadata unless some is given; see Video.save."""
    try:
        target = Path(path)
    except TypeError as error:
        raise InvalidRequest(
            f"output: got {type(path).__name__}, expected a path such as 'video.mp4'; the frames are in video.frames"
        ) from error
    write, texts = check_output(target), _check_metadata(metadata or {})
    counter = Counter(f"writing {target.name}", len(frames), "frames", on_progress)
    return write_whole(target, lambda temporary: write(frames, fps, temporary, texts, counter))


def check_output(path: Path) -> Writer:
    """The writer for a path's suffix. Call it before the work that makes the frames.

    Raises InvalidRequest for another suffix or a place inside a bundle, OutputError where the library that writes it is
    missing. A folder is refused if anything but frames of an earlier video lies in it: it will be replaced.
    """
    if path.name == "-":
        raise InvalidRequest("output: got '-', expected a file or folder; videos are not written to stdout")
    refuse_inside_bundle(path)
    if path.suffix.lower() not in WRITERS:
        raise InvalidRequest(f"output: got {path.name!r}, expected a name ending in .mp4, .gif, .npy, or a folder")
    if not _may_replace(path):
        raise InvalidRequest(f"output: folder {path} holds other things than frames; name one that is new")
    if path.suffix.lower() in LIBRARIES:
        _check_library(path, *LIBRARIES[path.suffix.lower()])
    return WRITERS[path.suffix.lower()]


def _check_metadata(metadata: Metadata) -> dict[str, str]:
    """Names that every format takes, and texts in valid Unicode. Raises InvalidRequest."""
    for name in metadata:
        if not (isinstance(name, str) and name.isascii() and name.isidentifier() and len(name) < 80):
            raise InvalidRequest(f"metadata: got the name {quoted(name)}, expected one like 'prompt', of ASCII letters")
    return {name: str(text).encode("utf-8", "replace").decode() for name, text in metadata.items()}


def _may_replace(path: Path) -> bool:
    try:
        return not path.is_dir() or holds_only_frames(path)
    except FileNotFoundError:  # somebody else replaces it at this moment
        return True
    except OSError as error:
        raise OutputError(f"output {path}: {error.strerror or error}; name a folder that can be read") from error


def _check_library(path: Path, library: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise OutputError(
            f"output {path.name}: {library} is not installed ({one_line(error)}); "
            'pip install "foresight-engines[video]", or write .npy, which needs nothing'
        ) from error


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
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
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
    from PIL import Image, PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    for name, text in metadata.items():
        texts.add_itxt(name, text)
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame-{index:04d}.png", pnginfo=texts)
        counter.advance()


def _comment(metadata: Metadata) -> str:
    """One text of several; JSON, so that any text survives."""
    return json.dumps(dict(metadata), ensure_ascii=False)


# What a writer needs beyond the base install: a library, and its module.
LIBRARIES = {".mp4": ("PyAV", "av"), ".gif": ("Pillow", "PIL.Image"), "": ("Pillow", "PIL.Image")}
WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".npy": _write_npy, "": _write_pngs}
