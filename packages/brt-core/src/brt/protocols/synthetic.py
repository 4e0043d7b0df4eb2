"""Loads made to order, for tests and benchmarks: random, even, or all on one path.

N cells, P paths, K choices of a cell. Of ``scores`` only the number of rows counts; any tensor that
has a row for each cell will do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import Protocol, at_least, check_at_least, check_generator, check_k, uniform
from brt.protocols.capacity import ceil_div


@dataclass(frozen=True)
class _Synthetic(Protocol):
    """A protocol that does not look at the scores."""

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` have rows."""
        if scores.ndim == 0:
            raise ProtocolError(f"{self.name}: scores must have one row for each cell, got 0-D")

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N."""
        return num_cells


@dataclass(frozen=True)
class Random(_Synthetic):
    """Each cell takes k paths at random, all equally likely. No weights.

    As Brainstorm's ``RandScatter`` (F10).
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = (
        "Zuo et al. 2021, Taming Sparsely Activated Transformer with Stochastic Experts, "
        "arXiv:2110.04260"
    )

    k: int = 1
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options."""
        check_at_least(self.name, "k", self.k, 1)

    @property
    def stochastic(self) -> bool:
        """Whether these options draw random numbers: always."""
        return True

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` have rows, and k <= P."""
        super().check(scores, num_paths)
        check_k(self.name, self.k, num_paths)
        check_generator(self.name, self.generator, scores)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = k."""
        like_NP = torch.empty((scores.shape[0], num_paths), device=scores.device)
        uniform_NP = uniform(like_NP, self.generator)
        return Decision(num_paths, choice_NK=uniform_NP.topk(self.k, dim=1).indices)

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N * k."""
        return num_cells * self.k


@dataclass(frozen=True)
class Uniform(_Synthetic):
    """Cell i takes path ``i // ceil(N / P)``: equal blocks of consecutive cells. No weights.

    As Brainstorm's ``UniformScatter`` (F10) where P divides N; elsewhere that fails, and here the
    last paths take fewer cells, or none.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "none: an even load to test and measure with"

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        num_cells = scores.shape[0]
        block = at_least(ceil_div(num_cells, num_paths), 1)
        cell_N = torch.arange(num_cells, device=scores.device)
        return Decision(num_paths, choice_NK=(cell_N // block).unsqueeze(1))


@dataclass(frozen=True)
class MissHit(_Synthetic):
    """All cells take path 0 on a hit, and path P - 1 on a miss. No weights.

    What speculation is measured with. As Brainstorm's ``MissHitScatter`` (F10).
    """

    name: ClassVar[str] = "miss-hit"
    paper: ClassVar[str] = (
        "Cui et al. 2023, Optimizing Dynamic Neural Networks with Brainstorm, OSDI 2023"
    )

    hit: bool = True

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        path = 0 if self.hit else num_paths - 1
        choice_N1 = torch.full((scores.shape[0], 1), path, dtype=torch.int64, device=scores.device)
        return Decision(num_paths, choice_NK=choice_N1)
