"""Cells written straight into the memory of their experts' GPUs, with no counts on the host.

Every rank tells the others how many rows it has for each expert, by writing to their memory. Each
then knows where its rows belong in each rank's buffer, and one kernel gathers and writes them
there, by expert. On the way back one kernel reads the results where they are, weighs them and adds
them up.

Legend: N cells, K choices per cell, W ranks (V where they send), G experts on a rank at most, S =
W * G slots, D features, Q rows of a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from brt import checks, ops
from brt_dist.errors import ExchangeError
from brt_dist.groups import Group

_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Sent:
    """Where the rows of this rank's cells are.

    Attributes:
        rank_NK: the rank that each choice went to.
        place_NK: its row there; -1 = none.
        rows_QD: the rows that came to this rank, by expert.
        load_G: rows of each expert of this rank, on the device.
    """

    rank_NK: Tensor
    place_NK: Tensor
    rows_QD: Tensor
    load_G: Tensor


class Buffers:
    """Memory of a layer that all GPUs of a group reach; every rank must make it.

    Args:
        num_rows: Q, the rows that a rank has room for; those beyond are left out and reported as
            failed checks are (`brt.checks`).
        dim: D.
        num_slots: G.
        dtype, device: of the rows.
        group: ranks whose GPUs reach one another.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        group: Group,
    ) -> None:
        if device.type != "cuda":
            raise ExchangeError(f"symmetric memory is for CUDA, the cells are on {device}")
        self.num_rows, self.num_slots, self.group = num_rows, num_slots, group
        num_ranks = dist.get_world_size(group)
        table = (num_ranks, num_ranks * num_slots)
        self._told, self._told_at = self._shared(table, torch.int64, device)
        self._came, self._came_at = self._shared((num_rows, dim), dtype, device)
        self._made, self._made_at = self._shared((num_rows, dim), dtype, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffers:
        # A copy of the tensors would be out of the others' reach; calls of a stream take turns
        return self

    def _shared(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(a tensor of this rank, the addresses of those of all ranks)."""
        from torch.distributed import _symmetric_memory as symm_mem

        own = symm_mem.empty(shape, dtype=dtype, device=device)
        own.zero_()
        # Before others can write to it
        torch.cuda.synchronize(device)
        self._handle: Any = symm_mem.rendezvous(own, self.group)
        return own, torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)

    def dispatch(self, x_ND: Tensor, slot_NK: Tensor) -> Sent:
        """Send cells to the slots that they chose (-1 = none)."""
        from brt_dist.symmetric_kernels import push_rows, tell_counts

        num_slots, num_ranks = self._told.shape[1], self._told.shape[0]
        _, _, row_NK, offsets = ops.route(slot_NK, num_slots)
        rank = dist.get_rank(self.group)
        block = max(16, 1 << (num_slots - 1).bit_length())
        tell_counts[(num_ranks,)](offsets.diff(), self._told_at, rank, num_slots, BLOCK=block)
        self._handle.barrier(channel=0)
        begin_S, load_G = layout(self._told.view(num_ranks, num_ranks, -1), rank)
        checks.check_values(
            load_G.sum() <= self.num_rows,
            f"symmetric memory: a rank has room for {self.num_rows} rows",
            detail=lambda: f"{int(load_G.sum())} came; raise Transport(symmetric=...)",
            error=ExchangeError,
        )
        slot = slot_NK.clamp(min=0)
        place_NK = row_NK - offsets[slot] + begin_S[slot]
        place_NK = torch.where((row_NK >= 0) & (place_NK < self.num_rows), place_NK, -1)
        rank_NK = slot // self.num_slots
        if slot_NK.numel():
            x_ND = x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()
            push_rows[(slot_NK.numel(),)](
                x_ND, rank_NK, place_NK, self._came_at, slot_NK.shape[1], x_ND.shape[1],
                x_ND.stride(0), BLOCK=_BLOCK,
            )  # fmt: skip
        self._handle.barrier(channel=0)
        fits_G = load_G.cumsum(0).clamp(max=self.num_rows).diff(prepend=load_G.new_zeros(1))
        return Sent(rank_NK, place_NK, self._came, fits_G)

    def combine(self, rows_QD: Tensor, sent: Sent, weight_NK: Tensor | None) -> Tensor:
        """Bring back what experts made of the rows: the weighted sum for each cell, ``[N, D]``."""
        from brt_dist.symmetric_kernels import pull_rows

        self._made.copy_(rows_QD)
        self._handle.barrier(channel=0)
        num_cells, num_choices = sent.place_NK.shape
        out_ND = self._made.new_empty(num_cells, self._made.shape[1])
        if out_ND.numel():
            weights = sent.place_NK if weight_NK is None else weight_NK.contiguous()
            pull_rows[(num_cells, -(-out_ND.shape[1] // _BLOCK))](
                out_ND, weights, sent.rank_NK, sent.place_NK, self._made_at, num_choices,
                out_ND.shape[1], WEIGHTED=weight_NK is not None, BLOCK=_BLOCK,
            )  # fmt: skip
        return out_ND


def layout(count_VWG: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(the first row of a rank's rows for each slot, ``[W * G]``; loads of its own experts).

    The rows of each rank lie by expert, those of an expert by the rank that they are from.
    """
    load_WG = count_VWG.sum(0)
    begin_WG = load_WG.cumsum(1) - load_WG + count_VWG[:rank].sum(0)
    return begin_WG.reshape(-1), load_WG[rank]
