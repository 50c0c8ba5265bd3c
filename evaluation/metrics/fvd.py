"""FVD, Unterthiner et al. 2018, by cd-fvd, with I3D: how far a set of videos is from those without reuse.

It compares how features are distributed, and needs hundreds of videos to say something.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable

from .base import Judged, Measure, weights_of


def load_fvd() -> Measure:
    """The network, on the GPU where there is one; its weights are in cd-fvd's own folder."""
    import torch
    from cdfvd.fvd import cdfvd

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with weights_of("fvd"), contextlib.redirect_stdout(io.StringIO()):  # it prints, and stdout is for results
        judge = cdfvd("i3d", n_real="full", n_fake="full", device=device)

    def measure(videos: Iterable[Judged]) -> float:
        judge.empty_real_stats()
        judge.empty_fake_stats()
        for video in videos:
            judge.add_real_stats(video.reference[None])
            judge.add_fake_stats(video.frames[None])
        return float(judge.compute_fvd_from_stats())

    return measure
