"""Gradients of what every rank holds: summed over ranks, as one process would have them."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn

from brt_dist.groups import Group, naming_failures, resolve


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
