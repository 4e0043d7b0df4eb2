"""Every cell takes the paths of its highest scores.

N cells, P paths, K choices of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from brt import checks
from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import Protocol, renormalised, softmax

Softmax = Literal["before", "after"] | None


@dataclass(frozen=True)
class TopK(Protocol):
    """Each cell takes the k paths of highest score, best first.

    The weights are the scores given, unless a softmax or ``renormalise`` asks for more. Which of
    several equal scores is taken is left to ``torch.topk``. Brainstorm's ``topk`` (F11) makes the
    same choices and gives no weights.
    """

    name: ClassVar[str] = "top-k"
    paper: ClassVar[str] = (
        "Shazeer et al. 2017, Outrageously Large Neural Networks: The Sparsely-Gated "
        "Mixture-of-Experts Layer, arXiv:1701.06538, eq. 3 to 5"
    )

    k: int
    softmax: Softmax = None
    """None: none. "before": over all P scores, then the k highest. "after": over the k chosen."""
    renormalise: bool = False
    """Divide the k weights of a cell by their sum; they must not be negative."""

    def __post_init__(self) -> None:
        """Check the options."""
        check_top_k(self.name, self.k, self.softmax, self.renormalise)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are ``[N, P]`` floats without NaN, and k <= P."""
        super().check(scores, num_paths)
        check_k(self.name, self.k, num_paths)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = k."""
        choice_NK, weight_NK = top_k(self.name, scores, self.k, self.softmax, self.renormalise)
        return Decision(num_paths, choice_NK=choice_NK, weight=weight_NK)

    def max_rows(self, num_cells: int, num_paths: int) -> int:
        """Return N * k."""
        return num_cells * self.k


def check_top_k(name: str, k: int, softmax: Softmax, renormalise: bool) -> None:
    """Check the options that top-k protocols share."""
    if not isinstance(k, int) or k < 1:
        raise ProtocolError(f"{name}: k must be an integer of at least 1, got {k!r}")
    if softmax not in (None, "before", "after"):
        raise ProtocolError(f"{name}: softmax must be None, 'before' or 'after', got {softmax!r}")
    if softmax == "after" and renormalise:
        raise ProtocolError(
            f"{name}: with softmax='after' the weights of a cell sum to one; leave out renormalise"
        )


def check_k(name: str, k: int, num_paths: int) -> None:
    """Raise if a cell is to take more paths than there are."""
    if k > num_paths:
        raise ProtocolError(
            f"{name}: each cell is to take k={k} paths, but there are {num_paths}; "
            "lower k or raise num_paths"
        )


def top_k(
    name: str, scores: Tensor, k: int, order: Softmax, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """Return the k choices of each row of scores, best first, and their weights."""
    if order == "before":
        scores = softmax(scores)
    weight_NK, choice_NK = scores.topk(k, dim=-1)
    if order == "after":
        weight_NK = softmax(weight_NK)
    if renormalise:
        if order is None and checks.wanted(scores) and scores.numel() > 0:
            checks.check_values(
                torch.all(weight_NK.detach() >= 0),
                f"{name}: renormalise needs weights that are not negative; "
                "give probabilities, or ask for a softmax",
                error=ProtocolError,
            )
        weight_NK = renormalised(weight_NK)
    return choice_NK, weight_NK
