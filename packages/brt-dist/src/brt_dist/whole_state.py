"""The whole state of a model whose experts are spread, for checkpoints that fit any world.

Legend: P experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brt_dist.errors import ParallelError
from brt_dist.flight import as_bytes
from brt_dist.groups import Group, naming_failures
from brt_dist.spread import Spread


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of the state dict as it was before the experts were spread.

    Attributes:
        spread: where the experts are that it belongs to; None: it is on every rank.
        expert: the expert that it belongs to; None: to all, ``[P, ...]``.
        is_trained: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spread: Spread | None = None
    expert: int | None = None
    is_trained: bool = False


def gather_state(model: nn.Module, entries: Sequence[Entry], group: Group) -> dict[str, Tensor]:
    """The state dict that the entries tell of, on every rank; every rank must call it."""
    here = model.state_dict()
    device = next(iter(here.values())).device
    whole = {}
    for entry in entries:
        held = _held(entry, group)
        if held and entry.name not in here:
            raise ParallelError(f"state: the model has no {entry.name} any more")
        if entry.spread is None:
            whole[entry.name] = here[entry.name].detach().clone()
        elif entry.expert is None:
            whole[entry.name] = _stacked(here, entry, entry.spread, device)
        else:
            owner = entry.spread.rank_P[entry.expert]
            own = here[entry.name] if held else None
            whole[entry.name] = _from(owner, own, entry.shape, entry.dtype, device, group)
    return whole


def _held(entry: Entry, group: Group) -> bool:
    """Whether this rank has it, or its part of it."""
    if entry.spread is None or entry.expert is None:
        return True
    return entry.spread.rank_P[entry.expert] == dist.get_rank(group)


def _stacked(
    here: Mapping[str, Tensor], entry: Entry, spread: Spread, device: torch.device
) -> Tensor:
    whole = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    for rank, held in enumerate(spread.held_W):
        own = here[entry.name] if rank == dist.get_rank(spread.group) else None
        shape = (len(held), *entry.shape[1:])
        whole[list(held)] = _from(rank, own, shape, entry.dtype, device, spread.group)
    return whole


def _from(
    owner: int,
    own: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
) -> Tensor:
    """A copy of a tensor that one rank has."""
    found = torch.empty(tuple(shape), dtype=dtype, device=device)
    if own is not None:
        found.copy_(own.detach())
    if math.prod(shape):
        with naming_failures("state", group):
            dist.broadcast(as_bytes(found.view(-1)), group=group, group_src=owner)
    return found
