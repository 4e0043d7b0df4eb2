"""Benchmark of a whole SwinV2-MoE on a batch of images.

Legend: B images, H height, W width, C features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt_models.macs import macs_of
from brt_models.swin_moe import Mixture, SwinMoE, SwinMoEConfig
from brt_models.swin_moe.network import Block, Mlp
from brt_models.workloads.swin_moe import IndexLoop, PaddedProduct

TOLERANCE = 1e-4  # float32 against experts in float64
NUM_SETS = 2


def network(
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 4,
    image_size: int = 96,
    embed_dim: int = 96,
    depth: int = 6,
    num_experts: int = 16,
    capacity_factor: float = 1.25,
) -> Workload:
    """Images of noise through the tiny network's shape, in windows of six; weights are random.

    ``depth`` counts the blocks of the third stage: 6 for tiny, 18 for small and base.
    """
    config = replace(
        SwinMoEConfig.v2("tiny", num_experts),
        image_size=image_size,
        window_size=6,
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        moe_blocks=((), (), tuple(range(1, depth, 2)), (1,)),
        num_classes=1000,
        capacity_factor=capacity_factor,
    )
    torch.manual_seed(0)
    model = SwinMoE(config).eval()
    for name, p in model.named_parameters():
        if ".norm" in name and name.endswith("weight"):
            nn.init.ones_(p)  # as trained: blocks that add nothing route all tokens alike
    model = model.to(device, dtype)
    shape = batch, 3, image_size, image_size
    sets = [(torch.randn(shape).to(device, dtype),) for _ in range(NUM_SETS)]
    dense = _with(model, lambda mixture: _dense(config, mixture))
    flops = 2.0 * macs_of(dense, dense, sets[0][0], [[dense]])[0]

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(model, brt.profile(model, sets), sample=sets[0])

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    loop = _with(model, IndexLoop)
    return Workload(
        name="swinv2-moe",
        shapes=f"B={batch} {image_size}x{image_size} pixels, C={embed_dim}, {num_experts} experts, "
        f"capacity factor {capacity_factor}",
        device=device,
        dtype=dtype,
        sets=sets,
        reference=_with(model, _InDouble),
        tolerance=TOLERANCE if dtype == torch.float32 else 5e-2,
        options={
            "batch": batch, "image_size": image_size, "embed_dim": embed_dim, "depth": depth,
            "num_experts": num_experts, "capacity_factor": capacity_factor,
        },
        variants=[
            row("eager", "torch index loop", lambda: loop),
            row("peer", "torch index loop, torch.compile", lambda: torch.compile(loop)),
            row("peer", "padded bmm", lambda: _with(model, PaddedProduct)),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt optimised", optimised),
            row("limit", "the network without experts", lambda: dense),
        ],
    )  # fmt: skip


class _InDouble(nn.Module):
    """The mixture of the reference: experts in float64, routed by the gate as it is."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.loop = IndexLoop(mixture, in_double=True)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.loop(x_BLC).to(x_BLC.dtype)


def _with(model: SwinMoE, make: Callable[[Mixture], nn.Module]) -> SwinMoE:
    """A copy of a network, its weights shared, with other forms of its mixtures."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, dict(shared))
    for block in other.modules():
        if isinstance(block, Block) and isinstance(block.mlp, Mixture):
            block.mlp = make(block.mlp)  # type: ignore[assignment]
    return other


def _dense(config: SwinMoEConfig, mixture: Mixture) -> nn.Module:
    """An MLP in place of a mixture: what each token costs where one expert takes them all."""
    like = mixture._moe_layer.experts.batched_fc1_w
    return Mlp(config, like.shape[2]).eval().to(like.device, like.dtype)
