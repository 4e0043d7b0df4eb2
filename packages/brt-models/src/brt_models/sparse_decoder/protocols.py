"""Top-k among the paths of the best groups.

N cells, P paths, K choices of a cell, G groups of P / G consecutive paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols import Protocol
from brt.protocols.base import check_at_least, check_scores, in_float32

_NOTHING = 1e-20  # what keeps a sum of zeros from dividing, as DeepSeek has it


@dataclass(frozen=True)
class GroupLimitedTopK(Protocol):
    """Each cell takes its k best paths among those of its best groups.

    Paths lie in ``num_groups`` groups of equal size, on a machine each; a cell goes to at most
    ``groups_taken`` of them. A group is as good as its best path ("max", DeepSeek-V2), or as the
    sum of its best two ("top-2", V3).

    Takes ``[N, P]``; with ``biased`` ``[N, 2 * P]``: the P scores that weights are made of, then
    the P that groups and paths are chosen by (V3 adds a bias there, which evens the loads and
    weights nothing). Weights are differentiable in the first.
    """

    name: ClassVar[str] = "group-limited-top-k"
    paper: ClassVar[str] = (
        "DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.2.2; biased: DeepSeek-V3, "
        "arXiv:2412.19437, section 2.1.2"
    )

    k: int
    num_groups: int = 1
    groups_taken: int = 1
    group_score: Literal["max", "top-2"] = "max"
    biased: bool = False
    renormalise: bool = False
    """Divide the k weights of a cell by their sum; they must not be negative."""
    scale: float = 1.0
    """Multiplies the weights at the end."""

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("k", "num_groups", "groups_taken"):
            check_at_least(self.name, option, getattr(self, option), 1)
        if self.groups_taken > self.num_groups:
            raise ProtocolError(
                f"{self.name}: groups_taken={self.groups_taken} of num_groups={self.num_groups}"
            )
        if self.group_score not in ("max", "top-2"):
            raise ProtocolError(
                f"{self.name}: group_score must be 'max' or 'top-2', got {self.group_score!r}"
            )

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless the scores are floats, and P fits groups and k."""
        check_scores(self.name, scores, num_paths, per_path=2 if self.biased else 1)
        if num_paths % self.num_groups:
            raise ProtocolError(
                f"{self.name}: {num_paths} paths are not {self.num_groups} groups of equal size"
            )
        size = num_paths // self.num_groups
        if self.k > size * self.groups_taken:
            raise ProtocolError(
                f"{self.name}: each cell is to take k={self.k} paths of {self.groups_taken} groups "
                f"of {size}; lower k or raise groups_taken"
            )
        if self.group_score == "top-2" and size < 2:
            raise ProtocolError(
                f"{self.name}: group_score='top-2' needs groups of at least 2 paths"
            )

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = k."""
        scores = in_float32(scores)
        score_NP, by_NP = scores.chunk(2, dim=-1) if self.biased else (scores, scores)
        by_NP = by_NP.detach()
        if self.groups_taken < self.num_groups:
            by_NP = by_NP.masked_fill(~self._in_best_groups(by_NP), float("-inf"))
        choice_NK = by_NP.topk(self.k, dim=-1).indices
        weight_NK = score_NP.gather(1, choice_NK)
        if self.renormalise:
            weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + _NOTHING)
        return Decision(num_paths, choice_NK=choice_NK, weight=weight_NK * self.scale)

    def _in_best_groups(self, by_NP: Tensor) -> Tensor:
        """Which paths lie in the best groups of each cell, bool ``[N, P]``."""
        by_NGS = by_NP.unflatten(1, (self.num_groups, -1))
        if self.group_score == "max":
            group_NG = by_NGS.amax(-1)
        else:
            group_NG = by_NGS.topk(2, dim=-1).values.sum(-1)
        best_NT = group_NG.topk(self.groups_taken, dim=-1).indices
        taken_NG = torch.zeros_like(group_NG, dtype=torch.bool).scatter(1, best_NT, True)
        return taken_NG.repeat_interleave(by_NGS.shape[2], dim=1)

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N * k."""
        return num_cells * self.k
