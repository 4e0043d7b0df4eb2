"""Choices of paths with a given skew.

Legend: N cells, P paths, K choices per cell.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from brt.errors import BrtError

Skew = Literal["uniform", "zipf", "one"]


def skewed_scores(num_cells: int, num_paths: int, skew: Skew, generator: torch.Generator) -> Tensor:
    """Scores ``[N, P]`` whose top-k loads are even, Zipf 1.0, or all on the first path.

    Adding Gumbel noise to log-probabilities and taking the k best draws k paths without
    replacement.
    """
    if skew not in get_args(Skew):
        raise BrtError(f"skew {skew!r}; there are {', '.join(get_args(Skew))}")
    uniform_NP = torch.rand(num_cells, num_paths, generator=generator).clamp_(1e-9, 1 - 1e-7)
    noise_NP = -torch.log(-torch.log(uniform_NP))
    share_P = torch.zeros(num_paths)
    if skew == "zipf":
        share_P = -torch.log(torch.arange(1.0, num_paths + 1))
    elif skew == "one":
        share_P[0] = 1e3
    return noise_NP + share_P


def choices(scores_NP: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best paths of each cell, and the softmax of their scores."""
    best = scores_NP.topk(k, dim=-1)
    return best.indices, best.values.softmax(-1)
