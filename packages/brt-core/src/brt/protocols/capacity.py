"""Top-k where a path takes only so many cells of a group.

N cells, P paths, K choices of a cell, G groups of S cells (N = G * S).

Scores are ``[G, S, P]``, or ``[N, P]`` for one group of all cells. The protocol says what the
capacity is; the route operator drops what exceeds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import (
    Protocol,
    at_least,
    check_at_least,
    check_generator,
    check_k,
    check_scores,
    gaussian,
    in_float32,
    uniform,
)
from brt.protocols.top_k import Softmax, check_top_k, pick, weigh


@dataclass(frozen=True)
class Switch(Protocol):
    """Each cell takes the path of its highest score, while that has room; first come first kept.

    The weight is the softmax probability of that path. Capacity is counted in each sequence: give
    scores ``[G, S, P]`` for G sequences of S tokens. It is ``ceil(capacity_factor * S / P)``
    (eq. 3), at least ``min_capacity``; ``capacity`` gives it in rows instead, as Hugging Face's
    ``expert_capacity``; with neither there is no limit. Brainstorm's ``switch_top1`` (F19) takes
    one-hot scores that somebody else made; this is the whole rule.
    """

    name: ClassVar[str] = "switch"
    paper: ClassVar[str] = (
        "Fedus et al. 2021, Switch Transformers: Scaling to Trillion Parameter Models with Simple "
        "and Efficient Sparsity, arXiv:2101.03961, eq. 1 to 3"
    )

    capacity_factor: float | None = 1.25
    capacity: int | None = None
    """Rows of a path in each sequence; goes before ``capacity_factor``."""
    min_capacity: int = 1
    softmax: Literal["before"] | None = "before"
    """None: the scores are probabilities already."""
    jitter: float = 0.0
    """Scores are multiplied by random numbers in [1 - jitter, 1 + jitter). In training only: see
    `without_noise`. The paper multiplies the gate's input."""
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)
    _ratio: tuple[int, int] | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options."""
        if self.capacity is not None:
            check_at_least(self.name, "capacity", self.capacity, 0)
        check_at_least(self.name, "min_capacity", self.min_capacity, 0)
        if self.softmax not in (None, "before"):
            raise ProtocolError(
                f"{self.name}: softmax must be None or 'before', got {self.softmax!r}"
            )
        if not 0 <= self.jitter < 1:
            raise ProtocolError(f"{self.name}: jitter must be in [0, 1), got {self.jitter!r}")
        object.__setattr__(self, "_ratio", as_ratio(self.name, self.capacity_factor))

    @property
    def stochastic(self) -> bool:
        """Whether these options draw random numbers."""
        return self.jitter > 0

    def without_noise(self) -> Self:
        """Return this protocol without jitter."""
        return replace(self, jitter=0.0)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are floats ``[N, P]`` or ``[G, S, P]``."""
        check_scores(self.name, scores, num_paths, grouped=True)
        if self.stochastic:
            check_generator(self.name, self.generator, scores)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        num_in_group, scores_NP = as_group(scores)
        if self.jitter > 0:
            scores_NP = in_float32(scores_NP)
            uniform_NP = uniform(scores_NP, self.generator)
            scores_NP = scores_NP * (1 + self.jitter * (2 * uniform_NP - 1))
        choice_N1, weight_N1 = pick(scores_NP, 1, self.softmax)
        return Decision(
            num_paths,
            choice_NK=choice_N1,
            weight=weight_N1,
            capacity=self.rows_per_path(num_in_group, num_paths),
            group_size=group_size(scores),
        )

    def rows_per_path(self, num_in_group: int, num_paths: int) -> int | None:
        """Return the capacity of a path in a group of so many cells."""
        if self.capacity is not None or self._ratio is None:
            return self.capacity
        numerator, denominator = self._ratio
        rows = ceil_div(numerator * num_in_group, denominator * num_paths)
        return at_least(rows, self.min_capacity)

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N, or less where the capacity of all groups is less."""
        rows = self.rows_per_path(group_size, num_paths) if group_size else None
        return bound(num_cells, num_cells, num_paths, group_size, rows)


@dataclass(frozen=True)
class CapacityTopK(Protocol):
    """Each cell takes the k paths of highest score, while those have room.

    All first choices come before any second one. The capacity of a path in a group of S cells is
    ``k * floor(capacity_factor * ceil(S / P))`` (Tutel; with a factor of 1 and k = 2 it is GShard's
    2 S / P), at least ``min_capacity``, then rounded up to a multiple of ``alignment``; with
    ``capacity_factor=None`` there is no limit. Weights as those of `TopK`.

    Brainstorm's ``swin_moe`` (F20) has this capacity but keeps first choices only, and leaves out
    alignment and normalised gates; here all k choices are made.
    """

    name: ClassVar[str] = "capacity-top-k"
    paper: ClassVar[str] = (
        "Lepikhin et al. 2020, GShard, arXiv:2006.16668, algorithm 1; capacity as Hwang et al. "
        "2022, Tutel, arXiv:2206.03382; batch_prioritized: Riquelme et al. 2021, Scaling Vision "
        "with Sparse Mixture of Experts, arXiv:2106.05974, section 4.1"
    )

    k: int
    capacity_factor: float | None = 1.0
    alignment: int = 1
    min_capacity: int = 1
    batch_prioritized: bool = False
    """Cells with a higher best score are kept first, instead of those that come first."""
    softmax: Softmax = None
    """None: none. "before": over all P scores, then the k highest. "after": over the k chosen."""
    renormalise: bool = False
    """Normalised gates: divide the k weights of a cell by their sum, before any is dropped."""
    noise_std: float = 0.0
    """Standard deviation of normal noise that is added to the scores, 1/P in V-MoE; Tutel's
    ``gate_noise`` is P times this. In training only: see `without_noise`. For noise of a learned
    size see `NoisyTopK`."""
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)
    _ratio: tuple[int, int] | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options."""
        check_top_k(self.name, self.k, self.softmax, self.renormalise)
        check_at_least(self.name, "alignment", self.alignment, 1)
        check_at_least(self.name, "min_capacity", self.min_capacity, 0)
        if not 0 <= self.noise_std < math.inf:
            raise ProtocolError(
                f"{self.name}: noise_std must be a finite number >= 0, got {self.noise_std!r}"
            )
        object.__setattr__(self, "_ratio", as_ratio(self.name, self.capacity_factor))

    @property
    def stochastic(self) -> bool:
        """Whether these options draw random numbers."""
        return self.noise_std > 0

    def without_noise(self) -> Self:
        """Return this protocol with ``noise_std=0``."""
        return replace(self, noise_std=0.0)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless scores are floats ``[N, P]`` or ``[G, S, P]``, k <= P."""
        check_scores(self.name, scores, num_paths, grouped=True)
        check_k(self.name, self.k, num_paths)
        if self.stochastic:
            check_generator(self.name, self.generator, scores)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = k."""
        num_in_group, scores_NP = as_group(scores)
        if self.noise_std > 0:
            scores_NP = in_float32(scores_NP)
            scores_NP = scores_NP + self.noise_std * gaussian(scores_NP, self.generator)
        choice_NK, picked_NK = pick(scores_NP, self.k, self.softmax)
        return Decision(
            num_paths,
            choice_NK=choice_NK,
            weight=weigh(self.name, picked_NK, self.softmax, self.renormalise),
            capacity=self.rows_per_path(num_in_group, num_paths),
            priority_N=picked_NK.detach()[:, 0] if self.batch_prioritized else None,
            group_size=group_size(scores),
        )

    def rows_per_path(self, num_in_group: int, num_paths: int) -> int | None:
        """Return the capacity of a path in a group of so many cells."""
        if self._ratio is None:
            return None
        numerator, denominator = self._ratio
        rows = self.k * (numerator * ceil_div(num_in_group, num_paths) // denominator)
        rows = at_least(rows, self.min_capacity)
        return ceil_div(rows, self.alignment) * self.alignment

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N * k, or less where the capacity of all groups is less."""
        rows = self.rows_per_path(group_size, num_paths) if group_size else None
        return bound(num_cells * self.k, num_cells, num_paths, group_size, rows)


def as_ratio(name: str, capacity_factor: float | None) -> tuple[int, int] | None:
    """Return a capacity factor as the fraction that its decimal digits mean: 1.1 as 11/10.

    Integer arithmetic on it is exact (``int(0.29 * 100)`` is 28) and traces with symbolic sizes.
    """
    if capacity_factor is None:
        return None
    if not isinstance(capacity_factor, int | float) or not 0 < capacity_factor < math.inf:
        raise ProtocolError(
            f"{name}: capacity_factor must be a finite number > 0 or None, got {capacity_factor!r}"
        )
    # Numerator and denominator stay small enough for products with sizes in 64 bits.
    ratio = Fraction(capacity_factor).limit_denominator(1_000_000)
    return ratio.numerator, ratio.denominator


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return (a + b - 1) // b


def as_group(scores: Tensor) -> tuple[int, Tensor]:
    """Return the cells in a group, and the scores as ``[N, P]``."""
    return scores.shape[-2], scores.flatten(0, -2)


def group_size(scores: Tensor) -> int | None:
    """Return S of scores ``[G, S, P]``; None where all cells are one group."""
    return at_least(scores.shape[1], 1) if scores.ndim == 3 else None


def bound(
    num_choices: int, num_cells: int, num_paths: int, group_size: int | None, rows: int | None
) -> int:
    """Return the most rows of so many choices, if a path takes ``rows`` of them in a group."""
    if rows is None or not group_size:
        return num_choices
    return min(num_choices, ceil_div(num_cells, group_size) * num_paths * rows)
