"""What each path of a patch network costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brt_models.patch_sr.config import PatchSRConfig
from brt_models.patch_sr.network import Branch


def macs_per_cell(config: PatchSRConfig) -> tuple[int, ...]:
    """Multiply-adds that each path spends on one patch: counted, not computed, on meta tensors."""
    counts = []
    for path in range(config.num_paths):
        with torch.device("meta"):
            branch, cell = Branch(config, path), torch.empty(1, 3, config.size, config.size)
        with _counted_macs(branch) as count:
            branch(cell)
        counts.append(sum(count))
    return tuple(counts)


@contextmanager
def _counted_macs(module: nn.Module) -> Iterator[list[int]]:
    count: list[int] = []

    def add(conv: nn.Module, args: Any, out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        count.append(conv.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3])

    convs = (child for child in module.modules() if isinstance(child, nn.Conv2d))
    handles = [conv.register_forward_hook(add) for conv in convs]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
