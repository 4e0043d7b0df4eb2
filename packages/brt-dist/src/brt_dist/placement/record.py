"""Which experts each token takes, recorded while a model runs.

Legend: N cells, P paths, T tokens, L layers, K choices of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import brt
from brt.graph import as_call
from brt.profile import signature
from brt.profile.record import as_profiled
from brt_dist.placement.errors import PlacementError
from brt_dist.placement.traffic import Traffic, of_trace


def record(model: nn.Module, batches: Iterable[Any]) -> Traffic:
    """Run a model on batches, as `brt.profile` does, and keep the experts of every token.

    For models whose tokens take several experts: a profile does not hold which ones they took
    together. Every router must decide once a forward, all of them about the same cells in the same
    order, over the same number of paths; `PlacementError` where that is not so.
    """
    paths = list(signature(model))
    if not paths:
        raise PlacementError(f"record: {type(model).__name__} has no router that decides")
    taken: list[tuple[str, Tensor]] = []
    handles = [
        model.get_submodule(path).register_observer(  # type: ignore[operator]
            lambda router, route, scores, path=path: taken.append((path, _mask_NP(route)))
        )
        for path in paths
    ]
    forwards = []
    try:
        with as_profiled(model, training=False):
            for batch in batches:
                args, kwargs = as_call(batch)
                model(*args, **kwargs)
                forwards.append(_forward(dict(taken), len(taken), paths))
                taken.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not forwards:
        raise PlacementError("record: no batches; pass at least one")
    layers = tuple(forwards[0])
    num_experts = next(iter(forwards[0].values())).shape[1]
    masks = [torch.stack([found[layer] for layer in layers], 1) for found in forwards]
    choice_TLK = _choices(torch.cat(masks))
    traffic = of_trace(choice_TLK, num_experts=num_experts, model=type(model).__name__)
    return dataclasses.replace(traffic, layers=layers)


def _mask_NP(route: brt.Route) -> Tensor:
    """Which cell took which path."""
    mask_NP = route.decision().mask_NP
    assert mask_NP is not None
    return mask_NP.cpu()


def _forward(found: dict[str, Tensor], num_calls: int, paths: list[str]) -> dict[str, Tensor]:
    """What one forward decided, checked."""
    shapes = {path: tuple(mask_NP.shape) for path, mask_NP in found.items()}
    if num_calls != len(paths) or set(found) != set(paths) or len(set(shapes.values())) > 1:
        raise PlacementError(
            f"record: each of {', '.join(paths)} must decide once a forward, about as many cells "
            f"and paths as the others; got {num_calls} decisions, [cells, paths] {shapes}"
        )
    return found


def _choices(mask_TLP: Tensor) -> np.ndarray:
    """The paths of each token, -1 where it took fewer than others: ``[T, L, K]``."""
    num_paths = mask_TLP.shape[2]
    num_choices = max(int(mask_TLP.sum(2).max()), 1) if mask_TLP.numel() else 1
    path_TLP = torch.where(mask_TLP, torch.arange(num_paths), num_paths)
    choice_TLK = path_TLP.sort(2).values[:, :, :num_choices]
    return torch.where(choice_TLK == num_paths, -1, choice_TLK).numpy()
