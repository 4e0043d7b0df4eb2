"""Gradients of what every rank holds: summed over ranks, as one process would have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from brt_dist.errors import ParallelError
from brt_dist.groups import Group, naming_failures, resolve
from brt_dist.whole_state import Entry


def sum_gradients(
    model: nn.Module,
    *,
    but: Collection[str] = (),
    only: Collection[str] | None = None,
    group: Group | None = None,
    scale: float = 1.0,
) -> None:
    """Add up over ranks the gradients of all parameters ``but`` those named, or ``only`` those.

    With ``but=parallelized.experts`` and a loss that is a sum over cells, every gradient is then
    that of all cells, as in one process. A parameter without a gradient has zeros. The sum is
    multiplied by ``scale``.
    """
    group = resolve(group)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in but or (only is not None and name not in only):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        with naming_failures("sum_gradients", group):
            dist.all_reduce(parameter.grad, group=group)
        if scale != 1:
            parameter.grad *= scale


def sum_replicas(model: nn.Module, entries: Iterable[Entry], group: Group) -> None:
    """Add up the gradients of experts that several ranks hold."""
    parameters = dict(model.named_parameters())
    for entry in entries:
        spread = entry.spread
        if spread is None or not entry.is_trained or not spread.replicated:
            continue
        own = parameters.get(entry.name)
        if isinstance(own, DTensor):
            raise ParallelError(
                f"sum_replicas: {entry.name} is sharded again, and its expert on several ranks; "
                "leave the experts out of fully_shard, or place each on one rank"
            )
        if own is not None and own.grad is None:
            own.grad = torch.zeros_like(own)
        if entry.expert is None:
            assert own is not None
            assert own.grad is not None
            held = [p for p in spread.replicated if p in spread.held]
            rows = [spread.held.index(p) for p in held]
            summed = own.grad.new_zeros(len(spread.replicated), *own.shape[1:])
            places = [spread.replicated.index(p) for p in held]
            summed[places] = own.grad[rows]
            own.grad[rows] = _summed(summed, group)[places]
        elif entry.expert in spread.replicated:
            if own is None:
                device = next(iter(parameters.values())).device
                _summed(torch.zeros(entry.shape, dtype=entry.dtype, device=device), group)
            else:
                assert own.grad is not None
                own.grad.copy_(_summed(own.grad.contiguous(), group))


def _summed(tensor: Tensor, group: Group) -> Tensor:
    with naming_failures("sum_replicas", group):
        dist.all_reduce(tensor, group=group)
    return tensor
