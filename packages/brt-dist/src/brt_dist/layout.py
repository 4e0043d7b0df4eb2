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
        place_W: where each rank stands among ranks in that; None: as it does in the group.
    """

    rows_WG: NDArray[np.int64]
    by_expert: bool = False
    place_W: tuple[int, ...] | None = None

    @functools.cached_property
    def of_rank(self) -> list[int]:
        """Rows of each rank."""
        sums: list[int] = self.rows_WG.sum(1).tolist()
        return sums

    @functools.cached_property
    def num_rows(self) -> int:
        """R."""
        return sum(self.of_rank)

    def for_others(self, source_W: tuple[int, ...]) -> Layout:
        """The same rows, where rank w is to have those of ``source_W[w]``."""
        assert self.place_W is None
        return Layout(self.rows_WG[list(source_W)], self.by_expert, source_W)

    @property
    def is_by_rank(self) -> bool:
        """They lie by rank, as ranks stand in the group."""
        return not self.by_expert and self.place_W is None

    @property
    def is_long(self) -> bool:
        """Whether segments are worth to be copied one by one."""
        return self.num_rows >= LONG * self.rows_WG.size

    @functools.cached_property
    def _orders(self) -> dict[torch.device, Reorder]:
        return {}

    def to_rank_major(self, device: torch.device) -> Reorder:
        """From the order of the rows to that by rank."""
        if self.is_by_rank:
            return Reorder()
        if device not in self._orders:
            segments = torch.from_numpy(self._segment_WG.ravel())
            self._orders[device] = Reorder.of(torch.tensor(self.sizes), segments, device)
        return self._orders[device]

    @functools.cached_property
    def _segment_WG(self) -> NDArray[np.int64]:
        """The number of each segment, in the order that they lie in."""
        num_ranks, num_experts = self.rows_WG.shape
        place_W1 = np.array(self.place_W or range(num_ranks))[:, None]
        if self.by_expert:
            return np.arange(num_experts) * num_ranks + place_W1
        return place_W1 * num_experts + np.arange(num_experts)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Rows of each segment, as they lie."""
        laid = np.empty(self.rows_WG.size, np.int64)
        laid[self._segment_WG.ravel()] = self.rows_WG.ravel()
        sizes: list[int] = laid.tolist()
        return sizes

    def of_one(self, rows: Tensor, rank: int) -> list[Tensor]:
        """The segments of a rank, by expert."""
        return self._segments(rows)[rank]

    def of_others(self, rows: Tensor, rank: int) -> Tensor:
        """The rows of all ranks but one, by rank."""
        if not self.is_by_rank:
            segments = self._segments(rows)
            return _joined([s for w, of_w in enumerate(segments) if w != rank for s in of_w], rows)
        begin = sum(self.of_rank[:rank])
        before, after = rows[:begin], rows[begin + self.of_rank[rank] :]
        return _joined([part for part in (before, after) if len(part)], rows)

    def together(self, parts_WG: Sequence[Sequence[Tensor]]) -> Tensor:
        """Rows from their segments by rank, then expert; a copy also where it is of one."""
        laid: list[Tensor | None] = [None] * self.rows_WG.size
        for segments, parts in zip(self._segment_WG.tolist(), parts_WG, strict=True):
            for segment, part in zip(segments, parts, strict=True):
                laid[segment] = part
        return torch.cat([part for part in laid if part is not None and len(part)])

    def _segments(self, rows: Tensor) -> list[list[Tensor]]:
        """By rank, then expert."""
        parts = rows.split(self.sizes)
        return [[parts[segment] for segment in of_rank] for of_rank in self._segment_WG.tolist()]


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
        if not layout.is_by_rank:
            self.received = like.new_empty((num_others, *shape[1:]))
            return
        self._result = result = like.new_empty(shape)
        if self._begin == 0:
            self.received = result[self._end :]
        elif self._end == layout.num_rows:
            self.received = result[: self._begin]
        else:
            self.received = like.new_empty((num_others, *shape[1:]))

    def keep_own(self) -> None:
        """Put own rows where they belong, if that is known already: others' may be on their way."""
        if self._result is None:
            return
        parts = self._result[self._begin : self._end].split([len(part) for part in self._own])
        for to, part in zip(parts, self._own, strict=True):
            to.copy_(part)

    def finish(self) -> Tensor:
        """All rows, when those of others have come."""
        if self._result is None:
            return self._together()
        if self._begin > 0 and self._end < self._layout.num_rows:
            self._result[: self._begin] = self.received[: self._begin]
            self._result[self._end :] = self.received[self._begin :]
        return self._result

    def _together(self) -> Tensor:
        rows_WG = self._layout.rows_WG
        others = np.delete(rows_WG, self._rank, 0)
        parts = self.received.split(others.ravel().tolist())
        num_experts = rows_WG.shape[1]
        of_rank = [parts[first:][:num_experts] for first in range(0, len(parts), num_experts)]
        own = self._own
        if len(own) < num_experts:  # where they come from they lie by rank only
            own = own[0].split(rows_WG[self._rank].tolist())
        of_rank.insert(self._rank, tuple(own))
        return self._layout.together(of_rank)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The parts as one, without a copy where there is one only."""
    if len(parts) > 1:
        return torch.cat(list(parts))
    return parts[0] if parts else like[:0]
