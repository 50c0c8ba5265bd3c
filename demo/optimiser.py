"""AdamW over one flat float32 vector, with data-parallel gradients, low-precision working weights and an average.

Networks of a few million parameters spend a noticeable share of a training step on bookkeeping for hundreds of small
tensors. Here the modules' parameters become views of one working vector (bfloat16 or float32), their gradients views
of a second, and all-reduce, clipping, AdamW and the exponential moving average each are one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatAdamW:
    """Owns the float32 master weights of some modules and updates the modules in place.

    Args:
        modules: converted to `dtype` and re-pointed at the working vector. Do not move or cast them afterwards.
            Parameters that ask for no gradient stay as they are.
        dtype: of the working weights; gradients have it too, until they are summed over processes in float32.
        average_decay: decay of the moving average of the master weights, reached gradually from 0.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, average_decay: float = 0.995) -> None:
        self._parameters = _trained(modules)
        self._master = torch.cat([parameter.detach().float().flatten() for parameter in self._parameters])
        if dist.is_initialized():
            dist.broadcast(self._master, 0)
        self._average = self._master.clone()
        self._average_decay = average_decay
        for module in modules:
            module.to(dtype)
        self._working = self._master.to(dtype, copy=True)
        self._gradient = torch.zeros_like(self._working)
        self._point_parameters_at(self._working, self._gradient)
        self._master.requires_grad_(True)
        self._adamw = torch.optim.AdamW([self._master], betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.steps = 0

    def _point_parameters_at(self, working: Tensor, gradient: Tensor) -> None:
        offset = 0
        for parameter in self._parameters:
            end = offset + parameter.numel()
            parameter.data = working[offset:end].view_as(parameter)
            parameter.grad = gradient[offset:end].view_as(parameter)
            offset = end

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float = 1.0) -> None:
        """Applies the gradients that the modules have accumulated, averaged over all processes, and clears them."""
        gradient = self._gradient.to(torch.float32, copy=True)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient.div_(dist.get_world_size())
        gradient.mul_((clip / (gradient.norm() + 1e-6)).clamp(max=1.0))
        self._gradient.zero_()
        self._master.grad = gradient
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        self.steps += 1
        decay = min(self._average_decay, self.steps / (self.steps + 10))
        self._average.lerp_(self._master, 1 - decay)
        self._working.copy_(self._master)

    @torch.no_grad()
    def copy_average_to(self, modules: Sequence[nn.Module]) -> None:
        """Writes the averaged weights into float32 modules of the same structure, given in the same order."""
        offset = 0
        for parameter in _trained(modules):
            end = offset + parameter.numel()
            parameter.copy_(self._average[offset:end].view_as(parameter))
            offset = end

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on later as if never interrupted."""
        return {
            "master": self._master.detach(),
            "average": self._average,
            "adamw": self._adamw.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()` of an optimiser over the same modules."""
        self._master.copy_(state["master"])
        self._average.copy_(state["average"])
        self._adamw.load_state_dict(state["adamw"])
        self.steps = state["steps"]
        self._working.copy_(self._master)


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
