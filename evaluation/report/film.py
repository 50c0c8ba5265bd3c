"""The frames of a report: encoded for the page, beside those without reuse and the difference."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.arrays import HostArray
from ..quality import psnr
from .wording import decibels

LOSSLESS_PIXELS = 2**19  # per video: up to here frames are kept as they are, in PNG
LOSSY_PIXELS = 2**22  # per video: beyond that frames are scaled down, in JPEG
LOSSY_SIDE = 384  # pixels of a frame's longer side
JPEG_QUALITY = 85
PLAYER_SIDE, STRIP_SIDE = 352, 128  # CSS pixels of the longer side
MAX_GAIN = 64  # of the pictures of differences


@dataclass(frozen=True)
class _Encoding:
    """How the page holds frames: `width` x `height` pixels, in PNG if `lossless`, else in JPEG."""

    width: int
    height: int
    lossless: bool

    def shown(self, side: int) -> int:
        """Width in CSS pixels: whole enlargements of small frames, `side` for the longer side of others."""
        longer = max(self.width, self.height)
        return self.width * (side // longer) if longer <= side else round(self.width * side / longer)

    def uri(self, frame: HostArray) -> str:
        """A (height, width, 3) uint8 frame as a data URI."""
        from PIL import Image

        image = Image.fromarray(frame)
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if self.lossless:
            image.save(buffer, "png", optimize=True)
        else:
            image.save(buffer, "jpeg", quality=JPEG_QUALITY, optimize=True)
        kind = "png" if self.lossless else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _encoding(frames: HostArray, most: int) -> _Encoding:
    count, height, width, _ = frames.shape
    pixels = count * height * width
    if pixels <= LOSSLESS_PIXELS and max(height, width) <= LOSSY_SIDE:
        return _Encoding(width, height, lossless=True)
    scale = min(1.0, LOSSY_SIDE / max(height, width), math.sqrt(most / pixels))
    return _Encoding(max(1, round(width * scale)), max(1, round(height * scale)), lossless=False)


def film(frames: HostArray, fps: int, reference: HostArray | None = None, pixels: int = LOSSY_PIXELS) -> dict[str, Any]:
    """Per frame a cell of pictures below each other: the frame, with a reference also its, and their difference.

    Both (frames, height, width, 3) uint8, shown with at most so many pixels a video.
    """
    encoding = _encoding(frames, pixels)
    if reference is None:
        labels = ["Video"]
        cells = [{"caption": str(index), "images": [encoding.uri(frame)]} for index, frame in enumerate(frames)]
    else:
        gain = _gain(frames, reference)
        labels = ["This video", "Without reuse", f"Difference × {gain}"]
        pairs = enumerate(zip(frames, reference, strict=True))
        cells = [_compared_cell(index, frame, other, gain, encoding) for index, (frame, other) in pairs]
    return {
        "labels": labels,
        "cells": cells,
        "fps": fps,
        "width": encoding.width,
        "height": encoding.height,
        "player": encoding.shown(PLAYER_SIDE),
        "strip": encoding.shown(STRIP_SIDE),
        "note": _encoding_note(frames, encoding),
    }


def _compared_cell(index: int, frame: HostArray, other: HostArray, gain: int, encoding: _Encoding) -> dict[str, Any]:
    enlarged = np.minimum(_difference(frame, other).astype(np.uint16) * gain, 255).astype(np.uint8)
    return {
        "caption": f"{index}: {decibels(psnr(frame[None], other[None]))}",
        "images": [encoding.uri(picture) for picture in (frame, other, enlarged)],
    }


def _encoding_note(frames: HostArray, encoding: _Encoding) -> str:
    if encoding.lossless:
        return ""
    height, width = frames.shape[1:3]
    same = (encoding.width, encoding.height) == (width, height)
    scaled = "" if same else f"scaled from {width} × {height} to {encoding.width} × {encoding.height} and "
    return f"To keep the page small, its frames are {scaled}compressed as JPEG; all numbers are of the original frames."


def _difference(frame: HostArray, other: HostArray) -> HostArray:
    return np.maximum(frame, other) - np.minimum(frame, other)


def _gain(frames: HostArray, reference: HostArray) -> int:
    """The power of two by which 99.9 % of the differences stay in range."""
    pairs = zip(frames, reference, strict=True)
    counts = sum(np.bincount(_difference(frame, other).ravel(), minlength=256) for frame, other in pairs)
    level = int(np.searchsorted(np.cumsum(counts), 0.999 * frames.size))
    return min(MAX_GAIN, 1 << int(math.log2(255 / max(level, 1))))
