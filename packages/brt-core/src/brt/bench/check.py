"""How far an outcome is from the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Mismatch(Exception):  # noqa: N818 - a finding, which becomes a row's reason
    """The outcome has another structure than the reference."""


def largest_error(outcome: Any, expected: Any) -> float:
    """Largest absolute difference over the largest magnitude expected, the worst of all tensors.

    Infinite where the outcome is not finite; `Mismatch` where structure or shapes differ.
    """
    came, wanted = list(_tensors(outcome)), list(_tensors(expected))
    if len(came) != len(wanted):
        raise Mismatch(f"gave {len(came)} tensors, the reference {len(wanted)}")
    return max((_error(a, b) for a, b in zip(came, wanted, strict=True)), default=0.0)


def _error(came: Tensor, wanted: Tensor) -> float:
    if came.shape != wanted.shape:
        raise Mismatch(f"gave shape {list(came.shape)}, the reference {list(wanted.shape)}")
    if wanted.numel() == 0:
        return 0.0
    wanted = wanted.detach().to(torch.float64)
    difference = float((came.detach().to(wanted) - wanted).abs().max())
    if difference != difference:
        return float("inf")
    return difference / (float(wanted.abs().max()) or 1.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    else:
        raise Mismatch(f"cannot compare a {type(value).__name__}")
