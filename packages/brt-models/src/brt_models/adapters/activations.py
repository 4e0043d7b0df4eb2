"""Which of the operators' activations a function is: found by what it computes.

Legend: R rows, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]

_KNOWN: dict[str, Function] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "none": lambda x: x,
}
# Far out too, where some families clamp
_PROBE_RH = torch.linspace(-60.0, 60.0, 480).view(4, 120).flip(1)


def activation_of(function: Function) -> str | None:
    """The name of an elementwise activation, or None."""
    return _named(function, _KNOWN)


def gate_of(function: Function) -> str | None:
    """ "swiglu" for ``silu(first half) * second half``, or None."""

    def swiglu(x_RH: Tensor) -> Tensor:
        gate_RH, up_RH = x_RH.chunk(2, -1)
        return F.silu(gate_RH) * up_RH

    return _named(function, {"swiglu": swiglu})


@torch.no_grad()
def _named(function: Function, known: dict[str, Function]) -> str | None:
    try:
        got = function(_PROBE_RH.clone())
    except (RuntimeError, TypeError, ValueError):
        return None  # it takes other shapes or devices only; it runs as it is
    for name, other in known.items():
        want = other(_PROBE_RH)
        if got.shape == want.shape and torch.allclose(got, want, rtol=1e-5, atol=1e-6):
            return name
    return None
