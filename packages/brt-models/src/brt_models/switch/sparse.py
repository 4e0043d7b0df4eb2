"""The feed-forward layers of a Switch Transformer: dense ones, and mixtures of them.

Legend: B sequences, S tokens of one, N tokens (cells), P paths (experts), D model and H hidden
features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import brt
from brt.protocols import Switch
from brt_models.switch.config import SwitchConfig

_ACTIVATION: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class DenseMLP(nn.Module):
    """Two linear layers; also what each expert is."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.act = _ACTIVATION[config.dense_act_fn]()
        self.dropout = nn.Dropout(config.dropout_rate)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        nn.init.normal_(self.wi.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=config.d_ff**-0.5)

    def forward(self, x_ND: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        return self.wo(self.dropout(self.act(self.wi(x_ND))))


class SparseMLP(nn.Module):
    """Each token goes to one expert; section 2.1 of the paper."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.jitter = config.router_jitter_noise
        self.gate = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        protocol = Switch(capacity_factor=None, capacity=config.expert_capacity)
        self.scatter = brt.ScatterRouter(protocol, num_paths=config.num_experts)
        self.experts = nn.ModuleList(DenseMLP(config) for _ in range(config.num_experts))
        self.gather = brt.GatherRouter()
        nn.init.normal_(self.gate.weight, std=config.d_model**-0.5)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, D]`` -> (``[B, S, D]``, the gate's scores ``[B, S, P]``).

        Tokens beyond the capacity get zero.
        """
        gated_BSD = x_BSD
        if self.training and self.jitter:
            gated_BSD = x_BSD.float()
            noise_BSD = torch.rand_like(gated_BSD) * 2 - 1
            gated_BSD = gated_BSD * (1 + self.jitter * noise_BSD)
        scores_BSP = in_float32(gated_BSD, self.gate.weight, self.gate.bias)
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        paths, route = self.scatter(cells_ND, scores_BSP, grid.cells)
        out_ND = self.gather(brt.each(self.experts, paths), route)
        return grid.restore(out_ND), scores_BSP


@torch.fx.wrap  # a trace would forget the context
def in_float32(x_BSD: Tensor, weight_PD: Tensor, bias_P: Tensor | None) -> Tensor:
    """A linear layer in float32, under autocast too: section 2.4, selective precision."""
    with torch.autocast(x_BSD.device.type, enabled=False):
        return nn.functional.linear(
            x_BSD.float(), weight_PD.float(), None if bias_P is None else bias_P.float()
        )
