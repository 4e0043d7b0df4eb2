"""Benchmark of a mixture of Swin-MoE, as it stands in the third stage.

Legend: B images, L tokens of one, N tokens, P experts, S rows of an expert, C features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt_models.swin_moe import Mixture, SwinMoEConfig

TOLERANCE = 1e-4  # float32 against float64
NUM_SETS = 4


def mixture(
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 8,
    tokens: int = 144,
    dim: int = 384,
    num_experts: int = 16,
    capacity_factor: float = 1.25,
) -> Workload:
    """Random tokens and weights; Brainstorm took 128 images a GPU, capacity factors 1.25 to 4."""
    config = SwinMoEConfig(num_experts=num_experts, capacity_factor=capacity_factor)
    torch.manual_seed(0)
    layer = Mixture(config, dim).eval().to(device, dtype)
    sets = [(torch.randn(batch, tokens, dim).to(device, dtype),) for _ in range(NUM_SETS)]
    flops = 4.0 * batch * tokens * dim * dim * config.mlp_ratio

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(layer, brt.profile(layer, sets), sample=sets[0])

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    return Workload(
        name="swin-moe",
        shapes=f"B={batch} L={tokens} C={dim} P={num_experts} capacity factor {capacity_factor}",
        device=device,
        dtype=dtype,
        sets=sets,
        reference=IndexLoop(layer, in_double=True),
        tolerance=TOLERANCE if dtype == torch.float32 else 3e-2,
        options={
            "batch": batch, "tokens": tokens, "dim": dim, "num_experts": num_experts,
            "capacity_factor": capacity_factor,
        },
        variants=[
            row("eager", "torch index loop", lambda: IndexLoop(layer)),
            row("peer", "padded bmm", lambda: PaddedProduct(layer)),
            row("brt", "brt eager", lambda: layer),
            row("brt", "brt optimised", optimised),
            row("limit", "one dense pair", lambda: _dense(layer)),
        ],
    )  # fmt: skip


class _Plain(nn.Module):
    """What both hand-written forms share: top-1 gates, and the surest tokens of each expert."""

    def __init__(self, layer: Mixture) -> None:
        super().__init__()
        moe = layer._moe_layer
        self.gate, self.experts = moe.gates[0], moe.experts
        self.protocol = moe.scatter.protocol
        self.num_experts = moe.scatter.num_paths

    def keep(self, x_NC: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(weights [N], tokens that each expert takes)."""
        weight_N, path_N = self.gate(x_NC).softmax(1).max(1)
        rows = self.protocol.rows_per_path(len(x_NC), self.num_experts)  # type: ignore[attr-defined]
        best_N = weight_N.argsort(descending=True, stable=True)
        return weight_N, [best_N[path_N[best_N] == path][:rows] for path in range(self.num_experts)]


class IndexLoop(_Plain):
    """The same layer as people write it; ``in_double`` runs the experts in float64."""

    def __init__(self, layer: Mixture, in_double: bool = False) -> None:
        super().__init__(layer)
        if in_double:
            self.experts = copy.deepcopy(self.experts).double()

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape."""
        x_NC = x_BLC.flatten(0, 1)
        weight_N, index_P = self.keep(x_NC)
        experts = self.experts
        x_NC = x_NC.to(experts.batched_fc1_w.dtype)
        out_NC = torch.zeros_like(x_NC)
        for path, index in enumerate(index_P):
            if len(index):
                up_HC, down_HC = experts.batched_fc1_w[path], experts.batched_fc2_w[path]
                hidden = nn.functional.linear(x_NC[index], up_HC, experts.batched_fc1_bias[path])
                rows = nn.functional.gelu(hidden) @ down_HC + experts.batched_fc2_bias[path]
                out_NC[index] = rows * weight_N[index, None].to(rows.dtype)
        return out_NC.view(x_BLC.shape)


class PaddedProduct(_Plain):
    """Every expert padded to its capacity, and two batched products, as Tutel does on one GPU."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape."""
        x_NC = x_BLC.flatten(0, 1)
        weight_N, index_P = self.keep(x_NC)
        index_PS = nn.utils.rnn.pad_sequence(index_P, batch_first=True, padding_value=len(x_NC))
        x_NC = torch.cat([x_NC, x_NC.new_zeros(1, x_NC.shape[1])])  # the row that padding reads
        experts = self.experts
        hidden = torch.baddbmm(
            experts.batched_fc1_bias[:, None], x_NC[index_PS], experts.batched_fc1_w.mT
        )
        rows = torch.baddbmm(
            experts.batched_fc2_bias[:, None], nn.functional.gelu(hidden), experts.batched_fc2_w
        )
        out_NC = torch.zeros_like(x_NC)
        out_NC[index_PS.flatten()] = rows.flatten(0, 1)
        return (out_NC[:-1] * weight_N[:, None].to(rows.dtype)).view(x_BLC.shape)


def _dense(layer: Mixture) -> Callable[[Tensor], Tensor]:
    experts = layer._moe_layer.experts
    up_HC, down_HC = experts.batched_fc1_w[0], experts.batched_fc2_w[0]
    return lambda x_BLC: nn.functional.gelu(x_BLC @ up_HC.T) @ down_HC
