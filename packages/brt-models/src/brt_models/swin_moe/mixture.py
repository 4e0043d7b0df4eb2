"""The mixture of experts of a block, its parameters named and laid out as Tutel has them.

Legend: N tokens (cells), R routed rows, P experts, C features, H hidden features, D directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt import GatherRouter, ScatterRouter, annotate, losses, ops
from brt.protocols import CapacityTopK
from brt_models.swin_moe.config import SwinMoEConfig

LEAST_TEMPERATURE = 0.01


class LinearGate(nn.Module):
    """Scores by a linear layer, in float32."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] -> [N, P]."""
        return F.linear(x_NC.float(), self.wg.weight.float())


class CosineGate(nn.Module):
    """Scores by the angle between a projection of the token and a direction of each expert.

    Source: Chi et al. 2022, On the Representation Collapse of Sparse MoE, arXiv:2204.09179.
    """

    def __init__(self, dim: int, num_experts: int, size: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([math.log(2.0)]))
        self.cosine_projector = nn.Linear(dim, size)
        self.sim_matrix = nn.Parameter(torch.randn(size, num_experts) * 0.01)

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] -> [N, P]."""
        projector = self.cosine_projector
        x_ND = F.linear(x_NC.float(), projector.weight.float(), projector.bias.float())
        towards_DP = F.normalize(self.sim_matrix.float(), dim=0)
        scale = self.temperature.float().clamp(max=-math.log(LEAST_TEMPERATURE)).exp()
        return F.normalize(x_ND, dim=1) @ towards_DP * scale


class Experts(nn.Module):
    """Weights of all experts; those of the second layer lie input-major."""

    def __init__(self, config: SwinMoEConfig, dim: int) -> None:
        super().__init__()
        num_experts, hidden = config.num_experts, dim * config.mlp_ratio
        self.batched_fc1_w = nn.Parameter(torch.empty(num_experts, hidden, dim))
        # Tutel's shape, but in memory as linear layers have it: nothing is copied to multiply
        down_PCH = torch.empty(num_experts, dim, hidden)
        self.batched_fc2_w = nn.Parameter(down_PCH.transpose(1, 2))
        self.batched_fc1_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.batched_fc2_bias = nn.Parameter(
            torch.zeros(num_experts, dim), requires_grad=config.mlp_bias
        )
        self.dropout = nn.Dropout(config.moe_dropout)
        nn.init.trunc_normal_(self.batched_fc1_w, std=0.02)
        nn.init.trunc_normal_(self.batched_fc2_w, std=0.02)

    def forward(self, rows_RC: Tensor, offsets_P1: Tensor) -> Tensor:
        """Packed rows [R, C] -> [R, C]."""
        dtype = rows_RC.dtype
        hidden_RH = ops.grouped_linear(
            rows_RC, offsets_P1, self.batched_fc1_w.to(dtype), self.batched_fc1_bias.to(dtype)
        )
        hidden_RH = self.dropout(F.gelu(hidden_RH))
        down_PCH = self.batched_fc2_w.transpose(1, 2).to(dtype)
        return ops.grouped_linear(hidden_RH, offsets_P1, down_PCH, self.batched_fc2_bias.to(dtype))


class MoELayer(nn.Module):
    """Gate, scatter, experts, gather."""

    _num_global_experts: Tensor

    def __init__(self, config: SwinMoEConfig, dim: int) -> None:
        super().__init__()
        num_experts = config.num_experts
        gate = (
            CosineGate(dim, num_experts, config.cosine_size)
            if config.cosine_router
            else LinearGate(dim, num_experts)
        )
        self.gates = nn.ModuleList([gate])
        self.experts = Experts(config, dim)
        self.noise_std = config.gate_noise / num_experts
        self.register_buffer("_num_global_experts", torch.tensor(num_experts))
        protocol = CapacityTopK(
            config.top_k,
            config.capacity_factor,
            softmax="before",
            renormalise=config.normalise_gate,
            batch_prioritized=config.batch_prioritized,
        )
        self.scatter = ScatterRouter(protocol, num_experts, result="packed")
        self.gather = GatherRouter()

    def forward(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C] -> ([N, C], the scores [N, P]); a token beyond the capacity gets zero."""
        scores_NP = self.gates[0](x_NC)
        if self.training:
            scores_NP = scores_NP + self.noise_std * torch.randn_like(scores_NP)
        rows_RC, route = self.scatter(x_NC, scores_NP)
        return self.gather(self.experts(rows_RC, route.offsets_P1), route), scores_NP


class Mixture(nn.Module):
    """An MLP of experts, on the tokens of a batch."""

    def __init__(self, config: SwinMoEConfig, dim: int) -> None:
        super().__init__()
        self._moe_layer = MoELayer(config, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape."""
        cells_NC, grid = annotate(x_BLC, (0, 1))
        return grid.restore(self._moe_layer(cells_NC)[0])

    def with_loss(self, x_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """([B, L, C], GShard's balance loss, by first choices before capacity drops any)."""
        cells_NC, grid = annotate(x_BLC, (0, 1))
        out_NC, scores_NP = self._moe_layer(cells_NC)
        scatter = self._moe_layer.scatter
        decision = scatter.protocol(scores_NP, scatter.num_paths)
        loss = losses.load_balance(decision, scores_NP.softmax(1), first_choice_only=True)
        return grid.restore(out_NC), loss
