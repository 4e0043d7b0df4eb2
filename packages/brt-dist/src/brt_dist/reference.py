"""The exchanges in plain torch: every rank gathers everything and takes what is its own.

Legend: W ranks of the group, G experts on a rank, R rows, S trailing dims of a row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sparse_all_to_all(
    rows: Tensor, counts_WG: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """``(rows, received_WG)`` as `brt_dist.sparse_all_to_all` gives them; not differentiable."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    all_counts, all_rows = _gather(counts_WG, group), _gather(rows, group)
    received_WG = torch.stack([all_counts[w][rank] for w in range(num_ranks)])
    parts = []
    for expert in range(counts_WG.shape[1]):
        for w in range(num_ranks):
            before = all_counts[w][:rank].sum() + all_counts[w][rank, :expert].sum()
            parts.append(all_rows[w][before : before + received_WG[w, expert]])
    return torch.cat(parts), received_WG


def reverse_all_to_all(
    rows: Tensor, counts_WG: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Rows that this rank's experts made of what they were sent, back in the senders' order.

    ``counts_WG`` are those that this rank sent by.
    """
    rank = dist.get_rank(group)
    all_counts, all_rows = _gather(counts_WG, group), _gather(rows, group)
    parts = []
    for w, from_w in enumerate(all_rows):
        received_WG = torch.stack([counts[w] for counts in all_counts])
        for expert in range(counts_WG.shape[1]):
            before = received_WG[:, :expert].sum() + received_WG[:rank, expert].sum()
            parts.append(from_w[before : before + counts_WG[w, expert]])
    return torch.cat(parts)


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensor of every rank; their first dimensions may differ."""
    num_ranks = dist.get_world_size(group)
    size = torch.tensor([tensor.shape[0]])
    sizes = [torch.empty_like(size) for _ in range(num_ranks)]
    dist.all_gather(sizes, size, group=group)
    most = max(map(int, sizes))
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor.detach()
    found = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(found, padded, group=group)
    return [rows[: int(n)] for rows, n in zip(found, sizes, strict=True)]
