"""The stacked weights of a rank's experts.

Legend: P experts of the layer, G of this rank, R rows, D model and H hidden features (up has 2H
rows where it is gated).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt import ops
from brt.ops.grouped_linear import activate
from brt_dist.errors import ParallelError
from brt_dist.spread import Spread

Activation = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class StackedExperts:
    """The experts of this rank, as `brt.ExpertRouter` takes their weights."""

    up_PHD: Tensor
    up_bias_PH: Tensor | None
    down_PDH: Tensor
    down_bias_PD: Tensor | None
    activation: Activation

    def run(self, rows_RD: Tensor, load_G: Tensor) -> Tensor:
        """What the experts make of rows that lie by expert."""
        num_held = self.up_PHD.shape[0]
        if num_held == 0:
            # Of no rows, the same as on other ranks: shape, dtype under autocast, a backward
            return self._of_one().run(rows_RD, load_G.new_zeros(1))
        offsets = F.pad(load_G[:num_held].cumsum(0), (1, 0)).to(rows_RD.device)
        name = self.activation if isinstance(self.activation, str) else "none"
        fused = "none" if name == "swiglu" else name
        hidden_RH = ops.grouped_linear(rows_RD, offsets, self.up_PHD, self.up_bias_PH, fused)
        if name == "swiglu":
            gate_RH, up_RH = hidden_RH.chunk(2, 1)
            hidden_RH = activate(gate_RH, "silu") * up_RH
        elif not isinstance(self.activation, str):
            hidden_RH = self.activation(hidden_RH)
        return ops.grouped_linear(hidden_RH, offsets, self.down_PDH, self.down_bias_PD)

    def _of_one(self) -> StackedExperts:
        def one(stacked: Tensor | None) -> Tensor | None:
            if stacked is None:
                return None
            # Not zeros alone, so that the gradient of the empty parameter is empty, not None
            return torch.cat([stacked, stacked.new_zeros(1, *stacked.shape[1:])])

        up, down = one(self.up_PHD), one(self.down_PDH)
        assert up is not None
        assert down is not None
        return StackedExperts(
            up, one(self.up_bias_PH), down, one(self.down_bias_PD), self.activation
        )


def share_of(stacked: Tensor, spread: Spread) -> nn.Parameter:
    """A parameter of this rank's experts."""
    if stacked.shape[0] != spread.num_experts:
        raise ParallelError(
            f"stacked weights must hold {spread.num_experts} experts, got {list(stacked.shape)}"
        )
    own = stacked.detach()[list(spread.held)].clone()
    if stacked.ndim == 3 and stacked.stride(1) < stacked.stride(2):
        own = own.transpose(1, 2).contiguous().transpose(1, 2)  # it lies so for a reason
    wants = stacked.requires_grad or not isinstance(stacked, nn.Parameter)
    return nn.Parameter(own, requires_grad=wants)
