"""Synthetic routing with structure, for tests of placement.

Legend: T tokens, L layers, K choices, E experts, N cells, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import brt
import brt_dist

Ints = NDArray[np.int64]


def clustered(
    num_tokens: int = 600,
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int = 1,
    clusters: int = 4,
    noise: float = 0.2,
    seed: int = 0,
) -> Ints:
    """Tokens of a cluster take the experts of a cluster, hidden by a shuffle of each layer."""
    rng = np.random.default_rng(seed)
    cluster_T = rng.integers(clusters, size=num_tokens)
    choice_TLK = np.empty((num_tokens, num_layers, top_k), np.int64)
    for layer in range(num_layers):
        of_E = rng.permutation(num_experts)
        likes_TE = rng.random((num_tokens, num_experts))
        likes_TE += np.arange(num_experts) % clusters == cluster_T[:, None]
        stray_T = rng.random(num_tokens) < noise
        likes_TE[stray_T] = rng.random((int(stray_T.sum()), num_experts))
        choice_TLK[:, layer] = of_E[np.argsort(-likes_TE, axis=1)[:, :top_k]]
    return choice_TLK


@st.composite
def traces(draw: st.DrawFn) -> tuple[Ints, int]:
    """A trace, some choices of which are none, and a number of ranks; every edge size."""
    num_experts = draw(st.integers(1, 9))
    num_ranks = draw(st.integers(1, num_experts))
    top_k = draw(st.integers(1, min(3, num_experts)))
    shape = (draw(st.integers(0, 25)), draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    likes = rng.random((*shape, num_experts)) * rng.random(num_experts)
    choice_TLK = np.argsort(-likes, axis=2)[:, :, :top_k]
    choice_TLK[rng.random(choice_TLK.shape) < draw(st.sampled_from((0.0, 0.3)))] = -1
    return choice_TLK, num_ranks


class Mixture(nn.Module):
    """A mixture whose router decides about the cells that it is given."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), num_paths=num_experts)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_experts))
        self.gather = brt.GatherRouter()

    def forward(self, x_ND: Tensor) -> Tensor:
        paths, route = self.scatter(x_ND, self.gate(x_ND).softmax(-1))
        return self.gather([e(path) for e, path in zip(self.experts, paths, strict=True)], route)


class Mixtures(nn.Module):
    """Two mixtures, one after the other."""

    def __init__(self, dim: int = 8, num_experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Mixture(dim, num_experts), Mixture(dim, num_experts))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.layers(x_ND)


def planned_equals_one_process(rank: int, placement: dict[str, list[int]]) -> None:
    """The model, spread by a placement, gives what one process gives."""
    model = Mixtures()
    x_ND = torch.randn(9, 8, generator=torch.Generator().manual_seed(rank))
    expected = model(x_ND)
    brt_dist.parallelize(model, placement=placement)
    torch.testing.assert_close(model(x_ND), expected)
