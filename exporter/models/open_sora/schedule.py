"""Rectified flow as Open-Sora 1.2 samples it: a straight path from noise to video, walked in steps of its own sizes.

The stored scheduler configuration of diffusers plays no part: what the original computes follows from the size of the
video alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TIMESTEPS = 1000
BASE_PIXELS = 512 * 512
CHUNK_FRAMES = 17  # written into the original's transform, whatever the VAE
CHUNK_LATENTS = 5


def timestep_ratio(height: int, width: int, frames: int, dtype: torch.dtype) -> Tensor:
    """How far timesteps are moved towards noise, more for larger and longer videos; one number in `dtype`.

    Height and width are the pixels asked for. The original computes in the model's dtype, so in bf16 854 pixels are
    856; for fp16, in which that many pixels are infinity, this computes in fp32. Videos shorter than one chunk of the
    VAE, for which the original has no ratio, count a latent for every four frames.
    """
    if dtype == torch.float16:
        dtype = torch.float32
    high, wide, length = (torch.tensor(number, dtype=dtype) for number in (height, width, frames))
    latents = length // CHUNK_FRAMES * CHUNK_LATENTS if frames >= CHUNK_FRAMES else (length / 4).ceil()
    return (high * wide / BASE_PIXELS).sqrt() * latents.sqrt()


def rounded_pixels(pixels: int, dtype: torch.dtype) -> float:
    """A side as the model is told of it: rounded to its dtype."""
    return float(torch.tensor(pixels, dtype=dtype))


class RectifiedFlow:
    """Steps from noise (timestep 1000) to video (0); the model's output is the velocity, video minus noise.

    The interface is that of a diffusers scheduler.
    """

    init_noise_sigma = 1.0

    def __init__(self, height: int, width: int, frames: int, dtype: torch.dtype) -> None:
        """For videos of `frames` frames of height x width pixels, by a model in `dtype`."""
        self.ratio = timestep_ratio(height, width, frames, dtype)
        self.timesteps = torch.empty(0)

    def transform(self, even: Tensor) -> Tensor:
        """Move evenly distributed times from 0 (video) to 1 (noise) towards noise; in training and in sampling."""
        excess = (self.ratio - 1).float()  # rounded to the model's dtype before it is fp32
        return self.ratio.float() * even / (1 + excess * even)

    def set_timesteps(self, steps: int) -> None:
        """Set `timesteps`, (steps,) fp32 from 1000 downwards."""
        even = torch.tensor([1 - step / steps for step in range(steps)], dtype=torch.float32)
        self.timesteps = TIMESTEPS * self.transform(even)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """A sample at `timestep`, of the same shape: as much of it left as the way from there to the video is done."""
        share = timestep.to(sample.dtype) / TIMESTEPS
        return (1 - share) * sample + share * noise

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False
    ) -> tuple[Tensor, ...]:
        """The sample of the next timestep, as a tuple of one; shapes and dtypes are the sample's.

        `timestep` is one of `timesteps`. The last step reaches 0.
        """
        index = int((self.timesteps == timestep).nonzero()[0])
        later: Any = self.timesteps[index + 1] if index + 1 < len(self.timesteps) else 0
        return (sample + model_output * ((timestep - later) / TIMESTEPS),)
