"""Choices of paths with a given skew.

Legend: N cells, P paths, K choices per cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
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


def traced_choices(
    file: str,
    layer: int,
    first: int,
    num_cells: int,
    num_paths: int,
    k: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Choices ``[N, K]`` of real tokens, from token ``first`` on, and random weights for them.

    ``file`` is an ``.npz`` with an array of expert ids ``[tokens, layers, choices]``: the first
    three-dimensional array of integers in it, or that of a name after ``#`` (``routes.npz#law``).
    The first ``k`` choices of each token are taken; the trace starts over at its end.
    """
    path, _, name = file.partition("#")
    try:
        with np.load(Path(path), allow_pickle=False) as arrays:
            names = [name] if name else list(arrays)
            found = [arrays[each] for each in names if each in arrays]
    except (OSError, ValueError) as error:
        raise BrtError(f"trace {path}: no .npz file of arrays: {error}") from error
    ids = next((a for a in found if a.ndim == 3 and np.issubdtype(a.dtype, np.integer)), None)
    if ids is None or 0 in ids.shape:
        raise BrtError(f"trace {file}: no array of expert ids [tokens, layers, choices] in it")
    if not 0 <= layer < ids.shape[1] or k > ids.shape[2] or int(ids[:, layer].max()) >= num_paths:
        raise BrtError(
            f"trace {file}: ids are {list(ids.shape)}, up to {int(ids.max())}; asked for layer "
            f"{layer}, k={k}, p={num_paths}"
        )
    tokens = np.arange(first, first + num_cells) % len(ids)
    choice_NK = torch.from_numpy(ids[tokens, layer, :k].astype(np.int64))
    return choice_NK, torch.rand(num_cells, k, generator=generator).softmax(-1)
