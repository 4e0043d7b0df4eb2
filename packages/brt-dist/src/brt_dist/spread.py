"""Which rank holds which expert of a layer.

Legend: P experts of the layer, W ranks of the group, G experts on a rank at most (slots).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from brt_dist.errors import ParallelError
from brt_dist.groups import Group, resolve
from brt_dist.segments import Reorder


@dataclass(frozen=True, eq=False)
class Spread:
    """The experts of one layer over the ranks of a group; each expert is on one rank.

    Attributes:
        group: the ranks.
        rank_P: for each expert, the rank of the group that holds it.
    """

    group: Group
    rank_P: tuple[int, ...]

    @classmethod
    def of(
        cls, num_experts: int, group: Group | None = None, placement: Sequence[int] | None = None
    ) -> Spread:
        """A spread by a placement (for each expert its rank), or else in equal blocks."""
        group = resolve(group)
        num_ranks = dist.get_world_size(group)
        if placement is None:
            return cls(group, tuple(p * num_ranks // num_experts for p in range(num_experts)))
        rank_P = tuple(int(rank) for rank in placement)
        if len(rank_P) != num_experts:
            raise ParallelError(
                f"a placement of {len(rank_P)} experts came for a layer of {num_experts}"
            )
        for expert, rank in enumerate(rank_P):
            if not 0 <= rank < num_ranks:
                raise ParallelError(
                    f"the placement puts expert {expert} on rank {rank}, but there are {num_ranks}"
                )
        return cls(group, rank_P)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spread:
        # It never changes, and groups cannot be copied
        return self

    @property
    def num_experts(self) -> int:
        """P."""
        return len(self.rank_P)

    @functools.cached_property
    def held_W(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each rank, ascending."""
        ranks = range(dist.get_world_size(self.group))
        return tuple(tuple(p for p, r in enumerate(self.rank_P) if r == w) for w in ranks)

    @property
    def held(self) -> tuple[int, ...]:
        """The experts of this rank, ascending."""
        return self.held_W[dist.get_rank(self.group)]

    @functools.cached_property
    def num_slots(self) -> int:
        """G: the most experts that a rank holds."""
        return max(map(len, self.held_W))

    @functools.cached_property
    def slot_P(self) -> Tensor:
        """Where each expert is among W * G slots, int64 on the host."""
        slot_P = torch.empty(self.num_experts, dtype=torch.int64)
        for w, held in enumerate(self.held_W):
            slot_P[list(held)] = torch.arange(len(held)) + w * self.num_slots
        return slot_P

    def counts_WG(self, load_P: Tensor) -> Tensor:
        """Rows for each expert, as counts of an exchange; on the host."""
        counts = torch.zeros(len(self.held_W) * self.num_slots, dtype=torch.int64)
        return counts.index_copy(0, self.slot_P, load_P).view(-1, self.num_slots)

    def by_rank(self, load_P: Tensor, device: torch.device) -> Reorder:
        """From rows that lie by expert to rows that lie by rank, then expert."""
        sequence_P = torch.tensor([p for held in self.held_W for p in held])
        return Reorder.of(load_P, sequence_P, device)

    def __str__(self) -> str:
        checksum = zlib.crc32(repr(self.rank_P).encode())
        return f"{self.num_experts} experts on {len(self.held_W)} ranks (placement {checksum:08x})"
