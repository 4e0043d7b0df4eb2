"""Synthetic routing with structure, for tests of placement.

Legend: T tokens, L layers, K choices, E experts.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

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
