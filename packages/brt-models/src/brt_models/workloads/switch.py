"""Benchmark of a Switch Transformer's sparse layer.

Legend: B sequences, S tokens of one, N tokens, P experts, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind, Unavailable
from brt_models.switch import SparseMLP, SwitchConfig

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def sparse_layer(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_experts: int = 8,
    d_model: int = 768,
    d_ff: int = 3072,
    batch: int = 4,
    tokens: int = 64,
) -> Workload:
    """A sparse layer of base-8, random weights; no capacity, since transformers has none."""
    torch.manual_seed(0)
    config = SwitchConfig(num_experts=num_experts, d_model=d_model, d_ff=d_ff, expert_capacity=None)
    layer = Layer(SparseMLP(config)).to(device, dtype).eval()
    sets = [(torch.randn(batch, tokens, d_model).to(device, dtype),) for _ in range(4)]
    flops = 4.0 * batch * tokens * d_model * d_ff

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(layer, brt.profile(layer, sets), sample=sets[0])

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    return Workload(
        name="switch-layer",
        shapes=f"B={batch} S={tokens} D={d_model} H={d_ff} P={num_experts}",
        device=device,
        dtype=dtype,
        sets=sets,
        reference=IndexLoop(layer.mlp, in_double=True),
        tolerance=TOLERANCE.get(dtype, 3e-2),
        options={
            "num_experts": num_experts, "d_model": d_model, "d_ff": d_ff, "batch": batch,
            "tokens": tokens,
        },
        variants=[
            row("eager", "torch index loop", lambda: IndexLoop(layer.mlp)),
            row("peer", "transformers", lambda: _transformers(layer.mlp)),
            row("brt", "brt eager", lambda: layer),
            row("brt", "brt optimised", optimised),
            row("limit", "one dense pair", lambda: _dense(layer.mlp)),
        ],
    )  # fmt: skip


class Layer(nn.Module):
    """A sparse layer without the scores that training needs."""

    def __init__(self, mlp: SparseMLP) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``."""
        out_BSD: Tensor = self.mlp(x_BSD)[0]
        return out_BSD


class IndexLoop(nn.Module):
    """The same layer as people write it; ``in_double`` runs the experts in float64."""

    def __init__(self, mlp: SparseMLP, in_double: bool = False) -> None:
        super().__init__()
        self.gate = mlp.gate
        self.experts = mlp.experts if not in_double else copy.deepcopy(mlp.experts).double()
        self.in_double = in_double

    def forward(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``."""
        x_ND = x_BSD.flatten(0, 1)
        probs_NP = nn.functional.linear(x_ND.float(), self.gate.weight.float()).softmax(1)
        weight_N, path_N = probs_NP.max(1)
        if self.in_double:
            x_ND, weight_N = x_ND.double(), weight_N.double()
        out_ND = torch.zeros_like(x_ND)
        for path, expert in enumerate(self.experts):
            index = (path_N == path).nonzero()[:, 0]
            if len(index):
                rows_RD = expert(x_ND[index]) * weight_N[index, None]
                out_ND[index] = rows_RD.to(x_ND.dtype)
        return out_ND.view(x_BSD.shape).to(x_BSD.dtype)


def _transformers(mlp: SparseMLP) -> Callable[[Tensor], Tensor]:
    """transformers' own layer with the very same weights."""
    try:
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import (
            SwitchTransformersSparseMLP,
        )
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    experts: list[Any] = list(mlp.experts)
    d_ff, d_model = experts[0].wi.weight.shape
    config = SwitchTransformersConfig(
        d_model=d_model, d_ff=d_ff, num_experts=len(experts), expert_capacity=2**31 - 1
    )
    with torch.device("meta"):
        theirs: Any = SwitchTransformersSparseMLP(config).eval()
    theirs.router.classifier.weight = mlp.gate.weight
    for path, expert in enumerate(experts):
        theirs.experts[f"expert_{path}"].wi.weight = expert.wi.weight
        theirs.experts[f"expert_{path}"].wo.weight = expert.wo.weight
    return theirs


def _dense(mlp: SparseMLP) -> Callable[[Tensor], Tensor]:
    expert = mlp.experts[0]
    return lambda x_BSD: expert(x_BSD.flatten(0, 1))
