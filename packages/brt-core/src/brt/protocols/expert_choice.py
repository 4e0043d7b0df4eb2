"""Every path takes the cells that score highest on it.

N cells, P paths, C cells of a path, G groups of S cells (N = G * S).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import Protocol, check_scores, softmax
from brt.protocols.capacity import as_ratio, ceil_div


@dataclass(frozen=True)
class ExpertChoice(Protocol):
    """Each path takes the C cells that score highest on it, so that all loads are equal.

    ``C = ceil(capacity_factor * S / P)`` in each group of S cells: scores are ``[G, S, P]``, or
    ``[N, P]`` for one group. A cell may be taken by no path, or by many; on average by
    ``capacity_factor`` of them. The weights are the scores given, or their softmax over the paths.
    Whether a cell is taken depends on the cells after it: not for autoregressive decoding.

    C is a size, and symbolic where N is: export with ``Dim.DYNAMIC`` or ``Dim.AUTO``, since
    ``Dim("N")`` refuses the guards that torch puts on it.
    """

    name: ClassVar[str] = "expert-choice"
    paper: ClassVar[str] = (
        "Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368, "
        "section 3.2"
    )

    capacity_factor: float = 2.0
    softmax: Literal["before"] | None = None
    """None: none. "before": over all P scores of a cell, as in the paper."""
    _ratio: tuple[int, int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options."""
        if self.softmax not in (None, "before"):
            raise ProtocolError(
                f"{self.name}: softmax must be None or 'before', got {self.softmax!r}"
            )
        ratio = as_ratio(self.name, self.capacity_factor)
        if ratio is None:
            raise ProtocolError(f"{self.name}: capacity_factor must be a number, got None")
        object.__setattr__(self, "_ratio", ratio)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are floats ``[N, P]`` or ``[G, S, P]``."""
        check_scores(self.name, scores, num_paths, grouped=True)
        numerator, denominator = self._ratio
        if numerator > denominator * num_paths:
            raise ProtocolError(
                f"{self.name}: with capacity_factor={self.capacity_factor} each of {num_paths} "
                f"paths is to take more cells than there are; at most {num_paths}"
            )

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``cell_PC``, best cell first; C = G * C where there are groups."""
        if self.softmax == "before":
            scores = softmax(scores)
        scores_GSP = scores if scores.ndim == 3 else scores.unsqueeze(0)
        num_groups, num_in_group = scores_GSP.shape[:2]
        num_taken = self.rows_per_path(num_in_group, num_paths)
        best = scores_GSP.transpose(1, 2).topk(num_taken, dim=-1)
        cell_GPC = best.indices
        if scores.ndim == 3:
            first_G = torch.arange(num_groups, device=scores.device) * num_in_group
            cell_GPC = cell_GPC + first_G.view(-1, 1, 1)
        return Decision(
            num_paths,
            cell_PC=cell_GPC.transpose(0, 1).flatten(1),
            weight=best.values.transpose(0, 1).flatten(1),
            num_cells=num_groups * num_in_group,
        )

    def rows_per_path(self, num_in_group: int, num_paths: int) -> int:
        """Return C for a group of so many cells."""
        numerator, denominator = self._ratio
        return ceil_div(numerator * num_in_group, denominator * num_paths)

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return G * P * C; N * P where the groups are not known."""
        if not group_size:
            return num_cells * num_paths
        num_groups = ceil_div(num_cells, group_size)
        return num_groups * num_paths * self.rows_per_path(group_size, num_paths)
