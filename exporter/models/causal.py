"""What decoders with causal convolutions share: a chunk of frames at a time, and what it leaves for the next.

A convolution over three frames has to know the last two that it saw. These are its state, (channels, 2, h, s, w, s) in
the decoder's dtype, where its frames are s times as high and wide as the latents: so nothing but the latents' height
and width has to be named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...engines.manifest import Dtype, Shape
from .base import Input, PartPlan, StagePlan, float_spec, frame_specs
from .parts import WHOLE

REMEMBERED = 2  # frames that a convolution over three has to know from before


class WithNamedArguments:
    """A function of any number of tensors under a signature that names each, as torch.export needs it."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], names: Sequence[str]) -> None:
        self.function = function
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def __call__(self, *tensors: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        return self.function(*self.__signature__.bind(*tensors, **named).args)


def causal_stage(
    decoder: Callable[[bool, bool], Any],
    shape: Shape,
    dtype: Dtype,
    axis: int,
    chunks: tuple[int, ...],
    frames: tuple[int, int],
) -> StagePlan:
    """The decoder of videos of that shape: the first chunk, and all later ones, which are given a state.

    `decoder` makes the module by whether it is of the first chunk, and of the only one: it has a `reference`, and of
    the first `state_sizes()` says what the convolutions remember, in the order in which they run: channels and s.
    `chunks` are cut from the latents along `axis`, `frames` what the first and a later one become.
    """
    only = len(chunks) == 1
    state = tuple(
        Input(float_spec(f"state_{index:03d}", dtype, channels, REMEMBERED, "latent_height", s, "latent_width", s))
        for index, (channels, s) in enumerate([] if only else decoder(True, False).state_sizes())
    )
    left = tuple(float_spec(f"new_{one.spec.name}", dtype, *one.spec.shape) for one in state)
    scale = shape.height // shape.latents[2]

    def plan(name: str, length: int, count: int, given: tuple[Input, ...]) -> PartPlan:
        module = decoder(not given, only)
        made, means = frame_specs(count)
        chunk = (length if which == axis else shape.latents[which] for which in (0, 1))
        return PartPlan(
            name=name,
            kind=name,
            module=module,
            component="vae",
            prefixes=WHOLE,
            inputs=(Input(float_spec("latents", "fp32", *chunk, "latent_height", "latent_width")), *given),
            outputs=(made, *left, means),
            reference=module.reference,
            check_sizes=tuple(
                {"latent_height": h, "latent_width": w, "height": h * scale, "width": w * scale}
                for h, w in ((4, 2), (3, 5))
            ),
        )

    return StagePlan(
        first=plan("vae_decoder", chunks[0], frames[0], ()),
        next=None if only else plan("vae_decoder_next", chunks[1], frames[1], state),
        axis=axis,
        chunks=chunks,
    )
