"""PSNR and SSIM of videos, see ../quality.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..quality import psnr, ssim
from .base import Judged, Measure


def load_psnr() -> Measure:
    """In dB; infinite where a video is identical."""

    def measure(videos: Iterable[Judged]) -> float:
        return statistics.fmean(psnr(video.frames, video.reference) for video in videos)

    return measure


def load_ssim() -> Measure:
    """1 is identical."""

    def measure(videos: Iterable[Judged]) -> float:
        return statistics.fmean(ssim(video.frames, video.reference) for video in videos)

    return measure
