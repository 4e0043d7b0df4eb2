"""A protocol: as many paths as a cell needs.

N cells, P paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import brt
from brt.protocols import Protocol


@dataclass(frozen=True)
class TopP(Protocol):
    """Each cell takes the fewest paths whose probabilities sum to at least p.

    Scores ``[N, P]`` are logits; weights are the probabilities, not renormalised.
    """

    name: ClassVar[str] = "acme-top-p"
    paper: ClassVar[str] = "Huang et al. 2024, Harder Tasks Need More Experts, section 3.2"

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise brt.ProtocolError(f"acme-top-p: p must lie in (0, 1], got {self.p}")

    def decide(self, scores: Tensor, num_paths: int) -> brt.Decision:
        probability_NP = scores.float().softmax(-1)
        sorted_NP, path_NP = probability_NP.sort(dim=-1, descending=True, stable=True)
        # A path is needed while those before it do not reach p
        before_NP = sorted_NP.cumsum(-1) - sorted_NP
        needed_NP = before_NP < self.p
        mask_NP = torch.zeros_like(needed_NP).scatter(1, path_NP, needed_NP)
        return brt.Decision(num_paths, mask_NP=mask_NP, weight=probability_NP)
