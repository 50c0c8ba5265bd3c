"""PSNR and SSIM: the published definitions, also where frames are small or alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from foresight import InvalidRequest
from foresight.evaluation.quality import psnr, ssim

Frames = npt.NDArray[np.uint8]


def pair(frames: int, height: int, width: int, noise: float = 20.0) -> tuple[Frames, Frames]:
    """A smooth video and a noisy copy of it."""
    random = np.random.default_rng(frames * height * width)
    ramp = np.linspace(0, 255, frames * height * width * 3).reshape(frames, height, width, 3)
    noisy = ramp + random.normal(0, noise, ramp.shape)
    return ramp.astype(np.uint8), np.clip(noisy, 0, 255).astype(np.uint8)


def scikit_ssim(frames: Frames, reference: Frames, window: int) -> float:
    values = [
        structural_similarity(a, b, win_size=window, channel_axis=-1) for a, b in zip(frames, reference, strict=True)
    ]
    return float(np.mean(values))


SIZES = [(1, 7, 7), (3, 16, 16), (2, 31, 20), (2, 8, 65), (4, 64, 48)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", [1.0, 20.0, 200.0])
def test_ssim_is_what_scikit_image_computes(size: tuple[int, int, int], noise: float) -> None:
    frames, reference = pair(*size, noise)
    assert ssim(frames, reference) == pytest.approx(scikit_ssim(frames, reference, 7), abs=1e-6)


@pytest.mark.parametrize("side", [3, 5])
def test_frames_smaller_than_the_window_are_one_window(side: int) -> None:
    frames, reference = pair(2, side, side)
    assert ssim(frames, reference) == pytest.approx(scikit_ssim(frames, reference, side), abs=1e-6)


def test_frames_lower_than_the_window_are_compared_in_windows_as_high_as_they_are() -> None:
    frames, reference = pair(2, 4, 30)
    assert 0 < ssim(frames, reference) < 1


def test_single_pixels_are_compared_by_colour() -> None:
    black, grey = np.zeros((1, 1, 1, 3), np.uint8), np.full((1, 1, 1, 3), 128, np.uint8)
    assert ssim(black, black) == 1
    assert ssim(black, grey) < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_psnr_is_what_scikit_image_computes(size: tuple[int, int, int]) -> None:
    frames, reference = pair(*size)
    assert psnr(frames, reference) == pytest.approx(peak_signal_noise_ratio(reference, frames), abs=1e-9)


def test_psnr_is_of_the_whole_video_not_a_mean_over_frames() -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    reference = frames.copy()
    reference[1] = 10
    assert psnr(frames, reference) == pytest.approx(10 * math.log10(255**2 / 50))


def test_identical_videos_have_infinite_psnr_and_ssim_one() -> None:
    frames, _ = pair(2, 16, 16)
    assert psnr(frames, frames) == math.inf
    assert ssim(frames, frames) == 1


def test_both_are_symmetric() -> None:
    frames, reference = pair(2, 16, 16)
    assert psnr(frames, reference) == psnr(reference, frames)
    assert ssim(frames, reference) == pytest.approx(ssim(reference, frames), abs=1e-15)


def test_neither_changes_its_arguments() -> None:
    frames, reference = pair(2, 16, 16)
    before = frames.copy(), reference.copy()
    psnr(frames, reference)
    ssim(frames, reference)
    np.testing.assert_array_equal(frames, before[0])
    np.testing.assert_array_equal(reference, before[1])


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("frames", "reference", "names"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8), r"\(3, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.int16), "int16"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    metric: Callable[[Frames, Frames], float], frames: Frames, reference: Frames, names: str
) -> None:
    with pytest.raises(InvalidRequest, match=names):
        metric(frames, reference)
