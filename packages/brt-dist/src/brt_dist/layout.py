"""How the rows that ranks exchange lie at one of them: by rank, or by expert.

Legend: W ranks, G experts on a rank, R rows, S trailing dims of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brt_dist.segments import LONG, Reorder


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows for, or of, each rank and expert.

    Attributes:
        rows_WG: int64, how many.
        by_expert: they lie by expert, then rank; else by rank, then expert.
    """

    rows_WG: NDArray[np.int64]
    by_expert: bool = False

    @functools.cached_property
    def of_rank(self) -> list[int]:
        """Rows of each rank."""
        sums: list[int] = self.rows_WG.sum(1).tolist()
        return sums

    @functools.cached_property
    def num_rows(self) -> int:
        """R."""
        return sum(self.of_rank)

    @property
    def is_long(self) -> bool:
        """Whether segments are worth to be copied one by one."""
        return self.num_rows >= LONG * self.rows_WG.size

    @functools.cached_property
    def _orders(self) -> dict[torch.device, Reorder]:
        return {}

    def to_rank_major(self, device: torch.device) -> Reorder:
        """From the order of the rows to that by rank."""
        if not self.by_expert:
            return Reorder()
        if device not in self._orders:
            sizes_GW = torch.from_numpy(self.rows_WG.T)
            self._orders[device] = Reorder.transposing(sizes_GW, device)
        return self._orders[device]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Rows of each segment, as they lie."""
        laid = self.rows_WG.T if self.by_expert else self.rows_WG
        sizes: list[int] = laid.ravel().tolist()
        return sizes

    def of_one(self, rows: Tensor, rank: int) -> list[Tensor]:
        """The segments of a rank, by expert."""
        return list(self._segments(rows)[rank])

    def of_others(self, rows: Tensor, rank: int) -> Tensor:
        """The rows of all ranks but one, by rank."""
        if self.by_expert:
            segments = self._segments(rows)
            return _joined([s for w, of_w in enumerate(segments) if w != rank for s in of_w], rows)
        begin = sum(self.of_rank[:rank])
        before, after = rows[:begin], rows[begin + self.of_rank[rank] :]
        return _joined([part for part in (before, after) if len(part)], rows)

    def _segments(self, rows: Tensor) -> list[Sequence[Tensor]]:
        """By rank, then expert."""
        num_ranks, num_experts = self.rows_WG.shape
        parts = rows.split(self.sizes)
        if self.by_expert:
            return [parts[w::num_ranks] for w in range(num_ranks)]
        return [parts[w * num_experts :][:num_experts] for w in range(num_ranks)]


class Landing:
    """Rows come from all ranks but this one, whose own are there already.

    ``received`` is where they are to land.
    """

    def __init__(self, layout: Layout, rank: int, like: Tensor, own: Sequence[Tensor]) -> None:
        self._layout, self._rank, self._own = layout, rank, own
        self._begin = sum(layout.of_rank[:rank])
        self._end = self._begin + layout.of_rank[rank]
        self._result: Tensor | None = None
        shape = layout.num_rows, *like.shape[1:]
        num_others = layout.num_rows - layout.of_rank[rank]
        if layout.by_expert:
            self.received = like.new_empty((num_others, *shape[1:]))
            return
        self._result = result = like.new_empty(shape)
        parts = result[self._begin : self._end].split([len(part) for part in own])
        for to, part in zip(parts, own, strict=True):
            to.copy_(part)
        if self._begin == 0:
            self.received = result[self._end :]
        elif self._end == layout.num_rows:
            self.received = result[: self._begin]
        else:
            self.received = like.new_empty((num_others, *shape[1:]))

    def finish(self) -> Tensor:
        """All rows, when those of others have come."""
        if self._result is None:
            return self._by_expert()
        if self._begin > 0 and self._end < self._layout.num_rows:
            self._result[: self._begin] = self.received[: self._begin]
            self._result[self._end :] = self.received[self._begin :]
        return self._result

    def _by_expert(self) -> Tensor:
        rows_WG = self._layout.rows_WG
        others = np.delete(rows_WG, self._rank, 0)
        parts = self.received.split(others.ravel().tolist())
        num_experts = rows_WG.shape[1]
        of_rank = [parts[first:][:num_experts] for first in range(0, len(parts), num_experts)]
        of_rank.insert(self._rank, tuple(self._own))
        in_order = [of_w[g] for g in range(num_experts) for of_w in of_rank]
        # A copy also where it is one part: the rows are nobody's view
        return torch.cat([part for part in in_order if len(part)])


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The parts as one, without a copy where there is one only."""
    if len(parts) > 1:
        return torch.cat(list(parts))
    return parts[0] if parts else like[:0]
