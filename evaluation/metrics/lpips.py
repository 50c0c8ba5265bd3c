"""LPIPS, Zhang et al. 2018, by its authors' package `lpips`, with AlexNet: frame by frame, 0 is identical."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from ...engines.arrays import HostArray
from ...engines.errors import InvalidRequest
from .base import Judged, Measure, weights_of

SMALLEST = 31  # pixels a side, below which AlexNet's last layers have nothing to look at


def load_lpips() -> Measure:
    """The network, on the GPU where there is one. AlexNet's weights are torchvision's, from torch's hub cache."""
    import lpips
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with weights_of("lpips"):
        network = lpips.LPIPS(net="alex", verbose=False).to(device)

    def of_frame(frame: HostArray) -> Any:
        """(1, 3, height, width) fp32 in -1 to 1, as the network takes them."""
        return torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1

    def of_video(video: Judged) -> float:
        height, width = video.frames.shape[1:3]
        if min(height, width) < SMALLEST:
            raise InvalidRequest(
                f"metrics: got frames of {height} x {width} for lpips, expected at least {SMALLEST} x {SMALLEST}; "
                "leave it out"
            )
        pairs = zip(video.frames, video.reference, strict=True)
        with torch.no_grad():
            return statistics.fmean(float(network(of_frame(frame), of_frame(other))) for frame, other in pairs)

    def measure(videos: Iterable[Judged]) -> float:
        return statistics.fmean(map(of_video, videos))

    return measure
