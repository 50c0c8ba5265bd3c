"""Two lists of blocks as one, for caches that know models of one list."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn


class PairedBlock(nn.Module):
    """A spatial block and the temporal one after it.

    Hidden states are (videos x frames, patches, width) before and after; in between they are (videos x patches, frames,
    width), and the first pair adds the frames' positions there.
    """

    def __init__(self, spatial: nn.Module, temporal: nn.Module, frames: int, positions: Tensor | None) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self._frames, self._positions = frames, positions

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """What the two return, one after the other. `timestep` has a row for every frame of every video."""
        assert timestep is not None, "all models with two lists have one"
        hidden_states = self.spatial(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, None, None
        )
        rows, patches, width = hidden_states.shape
        videos, frames = rows // self._frames, self._frames
        over_time = hidden_states.reshape(videos, frames, patches, width).permute(0, 2, 1, 3)
        over_time = over_time.reshape(videos * patches, frames, width)
        if self._positions is not None:
            over_time = over_time + self._positions
        timesteps = timestep[::frames].repeat_interleave(patches, dim=0)
        over_time = self.temporal(over_time, None, None, None, timesteps, None, None)
        made: Tensor = over_time.reshape(videos, patches, frames, width).permute(0, 2, 1, 3)
        return made.reshape(rows, patches, width)


def paired(spatial: nn.ModuleList, temporal: nn.ModuleList, frames: int, positions: Tensor) -> nn.ModuleList:
    """A list of as many blocks as each of the two has, known to the caches of diffusers."""
    TransformerBlockRegistry.register(
        model_class=PairedBlock,
        metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
    )
    return nn.ModuleList(
        PairedBlock(one, other, frames, positions if index == 0 and frames > 1 else None)
        for index, (one, other) in enumerate(zip(spatial, temporal, strict=True))
    )
