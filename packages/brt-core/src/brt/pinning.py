"""Packed rows in and out of paths of static sizes, by index, without a look at the loads.

Legend: P paths, R packed rows, S trailing dims of a cell, C rows that a path is pinned to, T pinned
rows (sum of C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Pinning(nn.Module):
    """Where the rows of paths lie when path p has ``capacity_P[p]`` places.

    It has no state that is saved; its indices move with the model.
    """

    path_T: Tensor
    slot_T: Tensor
    size_P: Tensor
    start_P: Tensor

    def __init__(self, capacity_P: Sequence[int]) -> None:
        super().__init__()
        self.capacity_P = tuple(capacity_P)
        size_P = torch.tensor(self.capacity_P, dtype=torch.int64)
        start_P = size_P.cumsum(0) - size_P
        path_T = torch.arange(len(size_P)).repeat_interleave(size_P)
        for name, value in (
            ("path_T", path_T),
            ("slot_T", torch.arange(len(path_T)) - start_P[path_T]),
            ("size_P", size_P),
            ("start_P", start_P),
        ):
            self.register_buffer(name, value, persistent=False)

    def take(self, rows_RS: Tensor, offsets_P1: Tensor) -> tuple[Tensor, ...]:
        """The first C rows of each path. Places that are left over hold copies of other rows."""
        path_T, slot_T = self.path_T.to(rows_RS.device), self.slot_T.to(rows_RS.device)
        if rows_RS.shape[0] == 0:
            pinned_TS = rows_RS.new_zeros(len(path_T), *rows_RS.shape[1:])
        else:
            load_P = offsets_P1.diff()
            # Copies of the path's own last row: a branch may not know what to do with zeros
            row_T = offsets_P1[path_T] + slot_T.minimum((load_P - 1).clamp(min=0)[path_T])
            pinned_TS = rows_RS.index_select(0, row_T.clamp(max=rows_RS.shape[0] - 1))
        return pinned_TS.split(self.capacity_P)

    def put(self, parts_P: Sequence[Tensor], offsets_P1: Tensor, num_rows: int) -> Tensor:
        """Parts of paths -> packed rows ``[R, ...]``; rows beyond a capacity hold anything."""
        out_TS = torch.cat(list(parts_P))
        row_R = torch.arange(num_rows, device=out_TS.device)
        size_P, start_P = self.size_P.to(out_TS.device), self.start_P.to(out_TS.device)
        path_R = torch.searchsorted(offsets_P1[1:], row_R, right=True)
        path_R = path_R.clamp(max=len(size_P) - 1)  # rows that are allocated and unused
        slot_R = row_R - offsets_P1[path_R]
        place_R = start_P[path_R] + slot_R.minimum(size_P[path_R] - 1)
        return out_TS.index_select(0, place_R.clamp(0, out_TS.shape[0] - 1))
