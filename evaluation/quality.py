"""How close a video with reuse is to the same request without: PSNR and SSIM, in numpy alone.

Both are the definitions that video papers report, so that results compare with published ones; scikit-image, which
has them too, would bring scipy along into every server that only wants two numbers.
"""

from __future__ import annotations

import math

import numpy as np

from ..engines.arrays import HostArray
from ..engines.errors import InvalidRequest

PEAK = 255.0
WINDOW = 7  # pixels a side
LUMINANCE_FLOOR = (0.01 * PEAK) ** 2  # C1 and C2 of Wang et al. 2004, with their K1 and K2
CONTRAST_FLOOR = (0.03 * PEAK) ** 2


def psnr(frames: HostArray, reference: HostArray) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error of the whole video; more is closer.

    Both (frames, height, width, 3) uint8, which are only read. Identical videos give `math.inf`, which JSON cannot
    hold. Pass one frame as `frames[i : i + 1]`. Raises InvalidRequest where shapes or dtypes do not fit.
    """
    _check(frames, reference)
    squared = sum(_squared_error(frame, other) for frame, other in zip(frames, reference, strict=True))
    return 10 * math.log10(PEAK**2 * frames.size / squared) if squared else math.inf


def ssim(frames: HostArray, reference: HostArray) -> float:
    """Structural similarity, the mean over frames and channels; 1 is identical.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, with a uniform
    window of 7 x 7 pixels that lies wholly inside the frame, and sample covariances: what scikit-image computes by
    default. In frames narrower or lower than that the window is as wide or high as the frame; where it is a single
    pixel only the colours are compared, there being no structure.

    Both (frames, height, width, 3) uint8, which are only read. Raises InvalidRequest where shapes or dtypes do not
    fit.
    """
    _check(frames, reference)
    return float(np.mean([_frame_ssim(frame, other) for frame, other in zip(frames, reference, strict=True)]))


def _check(frames: HostArray, reference: HostArray) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0 or frames.dtype != np.uint8:
        raise InvalidRequest(f"frames: got {frames.dtype} {frames.shape}, expected uint8 (frames, height, width, 3)")
    if reference.shape != frames.shape or reference.dtype != frames.dtype:
        raise InvalidRequest(
            f"reference: got {reference.dtype} {reference.shape}, expected {frames.dtype} {frames.shape} as the frames "
            "that are compared with it"
        )


def _squared_error(frame: HostArray, reference: HostArray) -> int:
    difference = np.subtract(frame, reference, dtype=np.int32)
    return int(np.sum(difference * difference, dtype=np.int64))


def _frame_ssim(frame: HostArray, reference: HostArray) -> float:
    """Of two (height, width, channels) frames.

    A variance is a small difference of large sums, so sums stay integers; the largest, 2 (7 x 7 x 255)², fits int32.
    """
    x, y = frame.astype(np.int32), reference.astype(np.int32)
    pixels = min(WINDOW, frame.shape[0]) * min(WINDOW, frame.shape[1])
    sample = max(pixels * (pixels - 1), 1)
    sum_x, sum_y = _window_sums(x), _window_sums(y)
    variances = (pixels * _window_sums(x * x + y * y) - sum_x * sum_x - sum_y * sum_y) / sample
    covariance = (pixels * _window_sums(x * y) - sum_x * sum_y) / sample
    mean_x, mean_y = sum_x / pixels, sum_y / pixels
    luminance = (2 * mean_x * mean_y + LUMINANCE_FLOOR) / (mean_x**2 + mean_y**2 + LUMINANCE_FLOOR)
    structure = (2 * covariance + CONTRAST_FLOOR) / (variances + CONTRAST_FLOOR)
    return float(np.mean(luminance * structure))


def _window_sums(values: HostArray) -> HostArray:
    """The sum over every window that lies inside, of (height, width, channels) int32."""
    sums = values
    for axis in (0, 1):
        lines = np.moveaxis(sums, axis, 0)
        window = min(WINDOW, len(lines))
        positions = len(lines) - window + 1
        total = lines[:positions].copy()
        for offset in range(1, window):
            total += lines[offset : offset + positions]
        sums = np.moveaxis(total, 0, axis)
    return sums
