"""Which bad indices a kernel tells of: the CUDA library keeps the first of a device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tells:
    """What a bad index is told as, by the numbers of csrc/cuda/device_error.cuh; 0: not at all."""

    offsets: int = 0
    cells: int = 0
    rows: int = 0


NOTHING = Tells()
OF_LINEAR = Tells(offsets=5)
OF_OUTER = Tells(offsets=6)
OF_MLP = Tells(offsets=9, cells=7, rows=8)


def told(tells: Tells, device: torch.device) -> Tells:
    """``tells``, or nothing where Triton interprets on the CPU."""
    return tells if device.type == "cuda" else NOTHING


@functools.cache
def error_word(device: torch.device) -> int:
    """Its address on a device; 0 where Triton interprets on the CPU."""
    return int(torch.ops.brt_kernels.error_word(device.index)) if device.type == "cuda" else 0
