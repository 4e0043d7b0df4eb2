"""What brt finds through its hook: the one file of this package that knows brt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from brt import KernelSpec, hookimpl
from torch import Tensor

from brt_kernels._load import Libraries, load

_NAME = "brt-kernels"
_REAL = (torch.float32, torch.float16, torch.bfloat16)

# Rates that order kernels, not predict them: what one call costs, and what a microsecond moves
_CALL_US = {"cpu": 3.0, "cuda": 8.0}
_BYTES_PER_US = {"cpu": 15_000.0, "cuda": 2_000_000.0}
_FLOPS_PER_US = {"cpu": 150_000.0, "cuda": 20_000_000.0}


def _moved(*args: Any) -> float:
    tensors = [a for a in args if isinstance(a, Tensor)]
    device = tensors[0].device.type
    size = sum(t.numel() * t.element_size() for t in tensors)
    return _CALL_US[device] + size / _BYTES_PER_US[device]


def _multiplied(args: tuple[Any, ...], flops: float) -> float:
    device = args[0].device.type
    return _moved(*args) + flops / _FLOPS_PER_US[device]


def _chain_time(
    x_RCHW: Tensor, offsets_P1: Tensor, params: list[Tensor], steps: list[int], *_: Any
) -> float:
    num_paths = max(offsets_P1.shape[0] - 1, 1)
    pixels = x_RCHW.shape[0] * x_RCHW.shape[2] * x_RCHW.shape[3]
    weights = sum(params[i].numel() for i in steps[3::9]) / num_paths
    return _multiplied((x_RCHW,), 2 * pixels * weights)


def _takes_real(*args: Any) -> str | None:
    if args[0].dtype not in _REAL:
        return f"takes float32, float16 and bfloat16, not {args[0].dtype}"
    return None


def _takes_float32(*args: Any) -> str | None:
    params = args[2]
    if args[0].dtype != torch.float32 or any(p.dtype != torch.float32 for p in params):
        return f"takes float32, not {args[0].dtype}"
    return None


def _takes_all(*args: Any) -> str | None:
    return None


Refuses = Callable[..., str | None]
Estimate = Callable[..., float]

# operator -> (refuses, estimate), for every operator of the CPU library
_CPU: dict[str, tuple[Refuses, Estimate]] = {
    "route": (_takes_all, _moved),
    "route_mask": (_takes_all, _moved),
    "dispatch": (_takes_real, _moved),
    "combine": (_takes_real, _moved),
    "row_dot": (_takes_real, _moved),
    "compact": (_takes_all, _moved),
    "conv_chain": (_takes_float32, _chain_time),
}


@hookimpl
def brt_kernels() -> Iterator[KernelSpec]:
    """Load the libraries and offer what they hold; the hook's failure is brt's warning."""
    libraries = load()
    yield from _specs("cpu", _CPU)
    yield from _specs("cuda", _cuda_operators(libraries))


def _cuda_operators(libraries: Libraries) -> dict[str, tuple[Refuses, Estimate]]:
    return {}


def _specs(device: str, operators: dict[str, tuple[Refuses, Estimate]]) -> Iterator[KernelSpec]:
    for op, (refuses, estimate) in operators.items():
        yield KernelSpec(
            op=op,
            device=device,
            name=_NAME,
            forward=getattr(torch.ops.brt_kernels, op).default,
            refuses=refuses,
            estimate=estimate,
        )
