"""Every cell takes the paths of its highest scores.

N cells, P paths, K choices of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from brt import checks
from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import (
    Protocol,
    check_at_least,
    check_generator,
    check_k,
    check_scores,
    gaussian,
    in_float32,
    softmax,
)

Softmax = Literal["before", "after"] | None

_SHAZEER = (
    "Shazeer et al. 2017, Outrageously Large Neural Networks: The Sparsely-Gated "
    "Mixture-of-Experts Layer, arXiv:1701.06538"
)


@dataclass(frozen=True)
class TopK(Protocol):
    """Each cell takes the k paths of highest score, best first.

    The weights are the scores given, unless a softmax or ``renormalise`` asks for more. Which of
    several equal scores is taken is left to torch. Brainstorm's ``topk`` (F11) makes the same
    choices and gives no weights.
    """

    name: ClassVar[str] = "top-k"
    paper: ClassVar[str] = f"{_SHAZEER}, eq. 3 and 5"

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
        choice_NK, picked_NK = pick(scores, self.k, self.softmax)
        weight_NK = weigh(self.name, picked_NK, self.softmax, self.renormalise)
        return Decision(num_paths, choice_NK=choice_NK, weight=weight_NK)

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N * k."""
        return num_cells * self.k


@dataclass(frozen=True)
class NoisyTopK(Protocol):
    """Top-k of scores with noise whose size is learned, then a softmax over the k chosen.

    Takes ``[N, 2 * P]``: the P scores, then the P raw noise sizes, of which it takes the softplus:
    ``H = scores + normal * softplus(raw)``. Weights differentiate in both halves. With
    ``noise=False`` the second half is ignored. `CapacityTopK` has noise of a fixed size.
    """

    name: ClassVar[str] = "noisy-top-k"
    paper: ClassVar[str] = f"{_SHAZEER}, eq. 3 to 5"

    k: int
    noise: bool = True
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options."""
        check_at_least(self.name, "k", self.k, 1)

    @property
    def stochastic(self) -> bool:
        """Whether these options draw random numbers."""
        return self.noise

    def without_noise(self) -> Self:
        """Return this protocol with ``noise=False``."""
        return replace(self, noise=False)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are ``[N, 2 * P]`` floats without NaN."""
        check_scores(self.name, scores, num_paths, per_path=2)
        check_k(self.name, self.k, num_paths)
        if self.stochastic:
            check_generator(self.name, self.generator, scores)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = k."""
        score_NP, raw_NP = in_float32(scores).chunk(2, dim=-1)
        if self.noise:
            normal_NP = gaussian(score_NP, self.generator)
            score_NP = score_NP + normal_NP * torch.nn.functional.softplus(raw_NP)
        choice_NK, picked_NK = pick(score_NP, self.k, "after")
        return Decision(num_paths, choice_NK=choice_NK, weight=softmax(picked_NK))

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N * k."""
        return num_cells * self.k


def check_top_k(name: str, k: int, softmax: Softmax, renormalise: bool) -> None:
    """Check the options that top-k protocols share."""
    check_at_least(name, "k", k, 1)
    if softmax not in (None, "before", "after"):
        raise ProtocolError(f"{name}: softmax must be None, 'before' or 'after', got {softmax!r}")
    if softmax == "after" and renormalise:
        raise ProtocolError(
            f"{name}: with softmax='after' the weights of a cell sum to one; leave out renormalise"
        )


def pick(scores: Tensor, k: int, order: Softmax) -> tuple[Tensor, Tensor]:
    """Return the k choices of each row of scores, best first, and what they were chosen by."""
    if order == "before":
        scores = softmax(scores)
    # On the CPU torch.topk is up to 10 times slower than a maximum.
    best = scores.max(dim=-1, keepdim=True) if k == 1 else scores.topk(k, dim=-1)
    return best.indices, best.values


def weigh(name: str, picked_NK: Tensor, order: Softmax, renormalise: bool) -> Tensor:
    """Return the weights of choices that `pick` made."""
    if order == "after":
        return softmax(picked_NK)
    if not renormalise:
        return picked_NK
    if order is None and checks.wanted(picked_NK) and picked_NK.numel() > 0:
        checks.check_values(
            picked_NK.detach().amin() >= 0,
            f"{name}: renormalise needs scores that are not negative; "
            "give probabilities, or set softmax",
            error=ProtocolError,
        )
    picked_NK = in_float32(picked_NK)
    total_N1 = picked_NK.sum(dim=-1, keepdim=True)
    return picked_NK / total_N1.clamp_min(torch.finfo(picked_NK.dtype).tiny)
