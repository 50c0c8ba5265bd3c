"""A finished video, and writing it to a file, into memory, or to an open file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..engines.arrays import Array, HostArray
from ..engines.bundle import refuse_inside_bundle
from ..engines.errors import InvalidRequest, OutputError, quoted
from ..engines.progress import Counter, OnProgress
from .formats import FORMATS, Format, Metadata, find_format
from .trace import Trace
from .whole import holds_only_frames, write_whole

QUOTED = 40  # characters of a prompt, in messages


@dataclass(frozen=True, repr=False)
class Video:
    """One result, owned by the caller.

    `frames` (frames, height, width, 3) uint8 RGB; `latents` the final latents before the VAE, (latent shape) fp32;
    both numpy arrays, or the device's if the request asked for that. There are no frames where it asked for latents
    only. `trace` is shared by the videos that were decided on together.
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
        """Write the frames as the suffix says: .mp4, .gif, .npy, none for a folder of png; a single one as .png, .jpg.

        The file appears whole or not at all. mp4 is H.264 with its index first, in colours tagged BT.709 from a height
        of 720 on, else BT.601. `metadata`, names and texts, is written into all but .npy: texts of each png; the
        comment of the others, as JSON, where `prompt` is also the mp4's title. None is prompt and seed, {} nothing.
        `on_progress` is told the frames written. Raises InvalidRequest for another suffix, for what is no path, and for
        a place inside a bundle; OutputError.
        """
        return save_frames(self._host_frames(), self.fps, path, self._metadata(metadata), on_progress)

    def to_bytes(
        self, kind: str = "mp4", metadata: Metadata | None = None, on_progress: OnProgress | None = None
    ) -> bytes:
        """What a file of that kind has in it: mp4, gif, npy; of a single frame also png and jpg. See `save`."""
        if not isinstance(kind, str) or not kind or f".{kind.lower()}" not in FORMATS:
            known = ", ".join(suffix[1:] for suffix in FORMATS if suffix)
            raise InvalidRequest(f"kind: got {quoted(kind)}, expected one of {known}")
        with tempfile.TemporaryDirectory(prefix="foresight-") as folder, _output_errors():
            path = Path(folder) / f"video.{kind}"
            save_frames(self._host_frames(), self.fps, path, self._metadata(metadata), on_progress)
            return path.read_bytes()

    def write_to(
        self,
        file: BinaryIO,
        kind: str = "mp4",
        metadata: Metadata | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Write `to_bytes` to an open binary file, which stays open. Raises InvalidRequest, OutputError."""
        data = self.to_bytes(kind, metadata, on_progress)
        with _output_errors():
            file.write(data)

    def _host_frames(self) -> HostArray:
        if not len(self.frames):
            raise InvalidRequest("frames: got none, as the request was made with decode False, expected some; ask anew")
        return self.frames if isinstance(self.frames, np.ndarray) else self.frames.get()

    def _metadata(self, metadata: Metadata | None) -> Metadata:
        return {"prompt": self.prompt, "seed": str(self.seed)} if metadata is None else metadata


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
    found, texts = check_output(target, len(frames)), _check_metadata(metadata or {})
    counter = Counter(f"writing {target.name}", len(frames), "frames", on_progress)
    return write_whole(target, lambda temporary: found.write(frames, fps, temporary, texts, counter))


def check_output(path: Path, frames: int | None = None) -> Format:
    """The format of a path's suffix, which takes so many frames. Call it before the work that makes them.

    Raises InvalidRequest for another suffix or a place inside a bundle, OutputError where the library that writes it is
    missing. A folder is refused if anything but frames of an earlier video lies in it: it will be replaced.
    """
    if path.name == "-":
        raise InvalidRequest("output: got '-', expected a file or folder; videos are not written to stdout")
    refuse_inside_bundle(path)
    found = find_format(path.name)
    if not _may_replace(path):
        raise InvalidRequest(f"output: folder {path} holds other things than frames; name one that is new")
    found.check(path.name, frames)
    return found


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


@contextmanager
def _output_errors() -> Iterator[None]:
    """Raises OutputError for what the system says."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"output: {error.strerror or error}; check the free space, and what is written to") from error
