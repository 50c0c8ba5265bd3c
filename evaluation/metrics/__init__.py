"""Metrics of videos: one registry row each; what needs a library of its own has a file, which imports it when used."""

from __future__ import annotations

from collections.abc import Iterable

from ...engines.errors import InvalidRequest, quoted
from .base import Judged, LoadedMetric, Measure, Metric
from .clip import load_clip
from .fvd import load_fvd
from .lpips import load_lpips
from .pixels import load_psnr, load_ssim

__all__ = ["METRICS", "PSNR", "Judged", "LoadedMetric", "Measure", "Metric", "find_metrics", "load_metrics"]

PSNR = Metric("psnr", "PSNR, dB", True, load_psnr, digits=1)
_ROWS = (
    PSNR,
    Metric("ssim", "SSIM", True, load_ssim),
    Metric("lpips", "LPIPS", False, load_lpips, modules=("lpips",), extra="lpips"),
    Metric(
        "clip",
        "CLIP score",
        True,
        load_clip,
        digits=2,
        compares=False,
        modules=("torchmetrics", "transformers"),
        extra="clip",
    ),
    Metric("fvd", "FVD", False, load_fvd, digits=1, of_set=True, modules=("cdfvd",), extra="fvd"),
)
METRICS = {metric.name: metric for metric in _ROWS}


def find_metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of those names, each once, PSNR among them in any case; their libraries are there.

    Raises InvalidRequest.
    """
    found = {PSNR.name: PSNR}
    for name in names:
        if name not in METRICS:
            raise InvalidRequest(f"metrics: got {quoted(name)}, expected some of {', '.join(METRICS)}")
        found[name] = METRICS[name]
    for metric in found.values():
        metric.check()
    return tuple(found.values())


def load_metrics(metrics: Iterable[Metric]) -> tuple[LoadedMetric, ...]:
    """Ready to measure. Raises InvalidRequest where the weights of one are missing."""
    return tuple(LoadedMetric(metric, metric.load()) for metric in metrics)
