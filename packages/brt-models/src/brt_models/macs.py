"""Multiply-adds, counted while a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def macs_of(
    model: nn.Module, run: Callable[[Any], Any], x: Any, groups: Iterable[Sequence[nn.Module]]
) -> list[int]:
    """Multiply-adds that convolutions and linear layers of each group spend in ``run(x)``.

    ``run`` is the model or a method of it; it runs in eval mode. A module that runs several times
    counts as often.
    """
    macs: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # A weight is used once for every place of the output: pixels, or rows of a linear layer;
        # of a transposed convolution, once for every place of the input
        places = args[0] if isinstance(module, nn.ConvTranspose2d) else out
        macs[module] += weight.numel() * (places.numel() // weight.shape[0])

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            run(x)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [sum(macs[m] for top in group for m in top.modules()) for group in groups]
