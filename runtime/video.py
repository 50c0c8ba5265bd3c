"""A finished video, and writing it: mp4, gif, npy, or a folder of png."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engines.arrays import Array, HostArray
from ..engines.errors import InvalidRequest, OutputError, one_line
from .trace import Trace

FRAME_NAME = re.compile(r"frame-\d{4,}\.png")


@dataclass(frozen=True)
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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the frames as the suffix says: .mp4, .gif, .npy, or none for a folder of png files.

        The file appears whole or not at all. Raises InvalidRequest for another suffix or what is no path, OutputError.
        """
        return save_frames(self.frames if isinstance(self.frames, np.ndarray) else self.frames.get(), self.fps, path)


def save_frames(frames: HostArray, fps: int, path: str | os.PathLike[str]) -> Path:
    """Write frames (frames, height, width, 3) uint8; see Video.save."""
    try:
        target = Path(path)
    except TypeError as error:
        raise InvalidRequest(
            f"output: got {type(path).__name__}, expected a path such as 'video.mp4'; the frames are in video.frames"
        ) from error
    write = check_output(target)
    return write_whole(target, lambda temporary: write(frames, fps, temporary))


def check_output(path: Path) -> Callable[[HostArray, int, Path], None]:
    """The writer for a path's suffix. Call it before the work that makes the frames.

    Raises InvalidRequest for another suffix, OutputError where the library that writes it is missing. A folder is
    refused if anything but frames of an earlier video lies in it: it will be replaced.
    """
    if path.suffix.lower() not in WRITERS:
        raise InvalidRequest(f"output: got {path.name!r}, expected a name ending in .mp4, .gif, .npy, or a folder")
    if path.is_dir() and not all(FRAME_NAME.fullmatch(entry.name) for entry in path.iterdir()):
        raise InvalidRequest(f"output: folder {path} holds other things than frames; name one that is new")
    if path.suffix.lower() in LIBRARIES:
        _check_library(path, *LIBRARIES[path.suffix.lower()])
    return WRITERS[path.suffix.lower()]


def _check_library(path: Path, library: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise OutputError(
            f"output {path.name}: {library} is not installed ({one_line(error)}); "
            'pip install "foresight-engines[video]", or write .npy, which needs nothing'
        ) from error


def write_whole(target: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary path beside `target`, then rename it. Raises OutputError; leaves no remains."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            write(temporary)
            if target.is_dir() and temporary.is_dir():
                shutil.rmtree(target)
            os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"output {target}: {error.strerror or error}; check the path, its permissions and the free space"
        ) from error
    return target


def _write_mp4(frames: HostArray, fps: int, path: Path) -> None:
    import av

    _, height, width, _ = frames.shape
    # 4:2:0 video has even sides only: repeat the last row or column of odd ones
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(frames: HostArray, fps: int, path: Path) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _write_npy(frames: HostArray, fps: int, path: Path) -> None:
    with path.open("wb") as file:  # given a name, np.save would add .npy to x.NPY
        np.save(file, frames, allow_pickle=False)


def _write_pngs(frames: HostArray, fps: int, path: Path) -> None:
    from PIL import Image

    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame-{index:04d}.png")


# What a writer needs beyond the base install: a library, and its module.
LIBRARIES = {".mp4": ("PyAV", "av"), ".gif": ("Pillow", "PIL.Image"), "": ("Pillow", "PIL.Image")}
WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".npy": _write_npy, "": _write_pngs}
