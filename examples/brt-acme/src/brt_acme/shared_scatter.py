"""A router: a scatter with a shared expert.

N cells, P paths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import brt
from brt.protocols import Protocol


class SharedScatter(brt.ScatterRouter):
    """A scatter whose last path takes every cell, with weight 1, beside what the protocol decides.

    The protocol sees scores ``[N, P - 1]``; the shared path needs none.
    """

    def __init__(self, protocol: Protocol, num_paths: int, **options: Any) -> None:
        super().__init__(_Shared(protocol), num_paths, **options)


class _Shared(Protocol):
    name = "acme-shared"
    paper = "Dai et al. 2024, DeepSeekMoE, section 3.2"

    def __init__(self, routed: Protocol) -> None:
        self.routed = routed

    def check(self, scores: Tensor, num_paths: int) -> None:
        self.routed.check(scores, num_paths - 1)

    def decide(self, scores: Tensor, num_paths: int) -> brt.Decision:
        routed = self.routed.decide(scores, num_paths - 1).to_mask()
        assert routed.mask_NP is not None
        shared_N1 = torch.ones_like(routed.mask_NP[:, :1])
        weight = routed.weight
        if weight is None:
            weight = routed.mask_NP.float()
        return brt.Decision(
            num_paths,
            mask_NP=torch.cat([routed.mask_NP, shared_N1], 1),
            weight=torch.cat([weight, torch.ones_like(weight[:, :1])], 1),
        )
