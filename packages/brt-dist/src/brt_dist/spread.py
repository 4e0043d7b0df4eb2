"""Which ranks hold which expert of a layer.

Legend: P experts of the layer, W ranks of the group, G experts on a rank at most (slots), Q places
(experts and their replicas, expert by expert), N cells, K choices per cell, C replicas at most.
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

from brt import RouteError, checks
from brt_dist.errors import ParallelError
from brt_dist.groups import Group, resolve
from brt_dist.segments import Reorder

Placement = Sequence[int | Sequence[int]]
"""For each expert its rank, or the ranks that hold it."""


@dataclass(frozen=True, eq=False)
class Spread:
    """The experts of one layer over the ranks of a group.

    An expert is on one rank, or on several: then these share its rows evenly.

    Attributes:
        group: the ranks.
        ranks_P: for each expert, the ranks of the group that hold it.
    """

    group: Group
    ranks_P: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, num_experts: int, group: Group | None = None, placement: Placement | None = None
    ) -> Spread:
        """A spread by a placement, or else in equal blocks."""
        group = resolve(group)
        num_ranks = dist.get_world_size(group)
        if placement is None:
            return cls(group, tuple((p * num_ranks // num_experts,) for p in range(num_experts)))
        ranks_P = tuple(
            tuple(map(int, ranks)) if isinstance(ranks, Sequence) else (int(ranks),)
            for ranks in placement
        )
        if len(ranks_P) != num_experts:
            raise ParallelError(
                f"a placement of {len(ranks_P)} experts came for a layer of {num_experts}"
            )
        for expert, ranks in enumerate(ranks_P):
            for rank in ranks:
                if not 0 <= rank < num_ranks:
                    raise ParallelError(
                        f"the placement puts expert {expert} on rank {rank}, but there are "
                        f"{num_ranks}"
                    )
            if not ranks or len(set(ranks)) < len(ranks):
                raise ParallelError(
                    f"the placement must give expert {expert} ranks, each once, got {list(ranks)}"
                )
        return cls(group, ranks_P)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spread:
        # It never changes, and groups cannot be copied
        return self

    @property
    def num_experts(self) -> int:
        """P."""
        return len(self.ranks_P)

    @functools.cached_property
    def rank_P(self) -> tuple[int, ...]:
        """The rank of each expert; the first of several."""
        return tuple(ranks[0] for ranks in self.ranks_P)

    @functools.cached_property
    def replicated(self) -> tuple[int, ...]:
        """The experts that several ranks hold."""
        return tuple(p for p, ranks in enumerate(self.ranks_P) if len(ranks) > 1)

    @functools.cached_property
    def held_W(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each rank, ascending."""
        num_ranks = dist.get_world_size(self.group)
        return tuple(
            tuple(p for p, ranks in enumerate(self.ranks_P) if w in ranks) for w in range(num_ranks)
        )

    @property
    def held(self) -> tuple[int, ...]:
        """The experts of this rank, ascending."""
        return self.held_W[dist.get_rank(self.group)]

    @functools.cached_property
    def num_slots(self) -> int:
        """G: the most experts that a rank holds."""
        return max(map(len, self.held_W))

    @functools.cached_property
    def slot_Q(self) -> Tensor:
        """Where each place is among W * G slots, int64 on the host."""
        return torch.tensor(
            [
                w * self.num_slots + self.held_W[w].index(p)
                for p, ranks in enumerate(self.ranks_P)
                for w in ranks
            ]
        )

    @functools.cached_property
    def _places_P(self) -> tuple[Tensor, Tensor]:
        """(the first place of each expert, how many places it has)."""
        num_P = torch.tensor([len(ranks) for ranks in self.ranks_P])
        return num_P.cumsum(0) - num_P, num_P

    @functools.cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(slots of places, first places, numbers of places), kept on the device: see captures."""
        if device not in self._tables:
            tables = (self.slot_Q, *self._places_P)
            self._tables[device] = tuple(table.to(device) for table in tables)  # type: ignore[assignment]
        return self._tables[device]

    def slots(self, choice_NK: Tensor, turn: int) -> Tensor:
        """Choices of experts as choices of slots; -1 stays.

        Cells take turns at the replicas of an expert; `turn` is that of the first.
        """
        if checks.wanted(choice_NK) and choice_NK.numel():
            most = choice_NK.max()
            checks.check_values(
                most < self.num_experts,
                f"a choice must be a path in range({self.num_experts}) or -1",
                detail=lambda: f"got {int(most)}",
                error=RouteError,
            )
        slot_Q, first_P, num_P = self._on(choice_NK.device)
        place_NK = expert_NK = choice_NK.clamp(0, self.num_experts - 1)
        if self.replicated:
            turn_N1 = torch.arange(turn, turn + choice_NK.shape[0], device=slot_Q.device)[:, None]
            place_NK = first_P[expert_NK] + turn_N1 % num_P[expert_NK]
        return torch.where(choice_NK < 0, choice_NK, slot_Q[place_NK])

    def load_Q(self, load_P: Tensor) -> Tensor:
        """Rows for each place: replicas of an expert share its rows; on the host."""
        if not self.replicated:
            return load_P
        _, num_P = self._places_P
        rank = dist.get_rank(self.group)
        # Who gets the rest is another one on every rank
        turn_Q = torch.tensor([(i + rank) % len(r) for r in self.ranks_P for i in range(len(r))])
        return (load_P.repeat_interleave(num_P) + turn_Q) // num_P.repeat_interleave(num_P)

    def counts_WG(self, load_P: Tensor) -> Tensor:
        """Rows for each expert, as counts of an exchange; on the host."""
        counts = torch.zeros(len(self.held_W) * self.num_slots, dtype=torch.int64)
        counts = counts.index_copy(0, self.slot_Q, self.load_Q(load_P))
        return counts.view(-1, self.num_slots)

    def by_rank(self, load_P: Tensor, device: torch.device) -> Reorder:
        """From rows that lie by expert to rows that lie by rank, then expert."""
        return Reorder.of(self.load_Q(load_P), self.slot_Q.argsort(), device)

    def __str__(self) -> str:
        checksum = zlib.crc32(repr(self.ranks_P).encode())
        again = len(self.slot_Q) - self.num_experts
        replicas = f" and {again} replicas" if again else ""
        return (
            f"{self.num_experts} experts{replicas} on {len(self.held_W)} ranks (placement "
            f"{checksum:08x})"
        )
