"""Cells that travel in buffers of one size, whatever the gate decides.

The host then knows every size and reads nothing from the device: a CUDA graph can capture the
exchange. What it costs is room for ``capacity`` rows from each rank for each expert.

Legend: N cells, K choices per cell, W ranks, G experts on a rank at most, C capacity, Q = W * G * C
places for rows, S trailing dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from brt import ops
from brt_dist.flight import Course, Journey
from brt_dist.groups import Group

_WHAT = "padded exchange"


@dataclass(frozen=True, eq=False)
class Padded:
    """Where the rows of a rank's cells lie: ``[W][G][C]``, by the slot of their expert.

    Attributes:
        cell_Q: int64, the cell of each place; -1 = padding.
        choice_Q: int64, the choice (cell * K + k) of each place; -1 = padding.
        place_NK: int64, the place of each choice; -1 = none, or beyond the capacity.
        capacity: C.
        num_slots: G.
        group: the ranks.
    """

    cell_Q: Tensor
    choice_Q: Tensor
    place_NK: Tensor
    capacity: int
    num_slots: int
    group: Group

    @classmethod
    def of(cls, slot_NK: Tensor, capacity: int, num_slots: int, group: Group) -> Padded:
        """Choices of slots laid out; of each slot the first ``capacity`` rows are kept."""
        num_places = dist.get_world_size(group) * num_slots
        _, _, row_NK, offsets = ops.route(slot_NK, num_places, (capacity,))
        first_NK = offsets[slot_NK.clamp(min=0)] - slot_NK * capacity
        place_NK = torch.where(row_NK >= 0, row_NK - first_NK, -1)
        size = num_places * capacity
        choice = torch.arange(slot_NK.numel(), device=slot_NK.device)
        choice_Q = torch.full((size + 1,), -1, device=slot_NK.device)
        # What has no place goes to one more, which is cut off
        choice_Q.scatter_(0, torch.where(place_NK < 0, size, place_NK).reshape(-1), choice)
        choice_Q = choice_Q[:-1]
        cell_Q = choice_Q.div(slot_NK.shape[1], rounding_mode="floor")
        return cls(cell_Q, choice_Q, place_NK, capacity, num_slots, group)

    def load_G(self) -> Tensor:
        """Rows of each expert of this rank, on the device; padding counts."""
        num_rows = dist.get_world_size(self.group) * self.capacity
        return torch.full((self.num_slots,), num_rows, device=self.cell_Q.device)

    def there(self, x_NS: Tensor) -> Tensor:
        """Cells -> rows by this rank's experts, ``[G * W * C, *S]``; differentiable."""
        came = self._swap(ops.dispatch(x_NS, self.cell_Q, self.place_NK))
        return self._transposed(came, dist.get_world_size(self.group), self.num_slots)

    def back(self, rows: Tensor, weight_NK: Tensor | None) -> Tensor:
        """Rows by this rank's experts -> cells, added up by their weights; differentiable."""
        num_ranks = dist.get_world_size(self.group)
        rows = self._swap(self._transposed(rows, self.num_slots, num_ranks))
        weight_Q = None
        if weight_NK is not None:
            weights, places = weight_NK.reshape(-1), self.place_NK.reshape(-1, 1)
            weight_Q = ops.dispatch(weights, self.choice_Q, places)
        return ops.combine(rows, self.place_NK, self.cell_Q, weight_Q)

    def _transposed(self, rows: Tensor, first: int, second: int) -> Tensor:
        blocks = rows.view(first, second, self.capacity, *rows.shape[1:])
        return blocks.transpose(0, 1).reshape(rows.shape)

    def _swap(self, rows: Tensor) -> Tensor:
        sizes = [self.num_slots * self.capacity] * dist.get_world_size(self.group)
        grad_flows = (0,) if torch.is_grad_enabled() else ()
        (landed,) = Journey.start(
            (rows,), Course.by_rank(_WHAT, self.group, sizes, sizes), grad_flows
        ).land()
        return landed
