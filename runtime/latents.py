"""The initial noise of a request: drawn from its seeds, or given by its caller."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.errors import InvalidRequest
from .sampler import Noise


def check_latents(latents: Array, expected: tuple[int, ...], arrays: Arrays) -> Array:
    """A view of the caller's array: (prompts, *latent shape) as `expected`, fp32, finite. Raises InvalidRequest.

    For one prompt the latent shape alone will do. Arrays that are not numpy's are taken over by DLPack.
    """
    on_host = isinstance(latents, np.ndarray)
    with nullcontext() if on_host else arrays.active():
        given = latents if on_host else _taken_over(latents, arrays)
        if given.shape == expected[1:] and expected[0] == 1:
            given = given[None]
        if given.shape != expected or given.dtype != np.float32:
            raise InvalidRequest(
                f"latents: got {given.dtype} {given.shape}, expected float32 {expected}, as the bundle was exported"
            )
        if not bool((np if on_host else arrays.xp).isfinite(given).all()):
            raise InvalidRequest("latents: got values that are not finite, expected normal noise")
        return given


def initial_latents(given: Array | None, noise: Noise, arrays: Arrays) -> Array:
    """Initial noise (prompts, *latent shape) fp32 on the device: the first that is drawn, or the caller's."""
    drawn = noise.draw()
    if given is None:
        return drawn
    return arrays.from_host(given) if isinstance(given, np.ndarray) else given


def _taken_over(latents: Array, arrays: Arrays) -> Array:
    try:
        return arrays.xp.from_dlpack(latents)
    except (AttributeError, BufferError, TypeError, ValueError, RuntimeError) as error:
        got = f"a {type(latents).__name__}"
        raise InvalidRequest(f"latents: got {got}, expected a float32 array, numpy's or by DLPack") from error
