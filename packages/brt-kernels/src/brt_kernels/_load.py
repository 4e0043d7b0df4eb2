"""Loading the two libraries, once, or saying why one of them is not there."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from importlib import resources

import torch

OLDEST_TORCH = (2, 11)


class KernelsUnavailableError(ImportError):
    """The CPU library cannot be used here; the message says why."""


class KernelsWarning(UserWarning):
    """A part of the kernels cannot be used here; brt runs its reference instead."""


@dataclass(frozen=True)
class Libraries:
    """What was loaded. ``no_cuda`` is why the CUDA library was not, or empty."""

    isa: str
    no_cuda: str


@functools.cache
def load() -> Libraries:
    """Load what this torch can use; raise `KernelsUnavailableError` where that is nothing.

    The CUDA library is for a torch that was built with CUDA, whether or not there is a device: it
    then serves fake tensors too. Where it should be there and is not, one warning says why.
    """
    version = torch.__version__.split("+")[0].split(".")
    if tuple(int(part) for part in version[:2]) < OLDEST_TORCH:
        raise KernelsUnavailableError(
            f"brt-kernels needs torch >= 2.11, this is {torch.__version__}"
        )
    _load_library("libbrt_kernels_cpu.so")
    isa = str(torch.ops.brt_kernels.use_isa(""))
    if isa == "none":
        raise KernelsUnavailableError(
            "brt-kernels needs a CPU with AVX2, FMA and F16C; this has not"
        )
    no_cuda = _load_cuda()
    if no_cuda and torch.version.cuda is not None:
        warnings.warn(
            f"brt-kernels: no CUDA kernels, the reference runs: {no_cuda}", KernelsWarning, 2
        )
    return Libraries(isa, no_cuda)


def _load_library(name: str) -> None:
    path = resources.files("brt_kernels") / name
    if not path.is_file():
        raise KernelsUnavailableError(f"{name} is not in this installation of brt-kernels")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise KernelsUnavailableError(
            f"{name} does not load with torch {torch.__version__}: {error}"
        ) from error


def _load_cuda() -> str:
    """Load the CUDA library; return why it cannot be used, or ''."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return ""  # nothing will run on it, and nothing was asked for
    try:
        _load_library("libbrt_kernels_cuda.so")
    except KernelsUnavailableError as error:
        return str(error)
    return str(torch.ops.brt_kernels.cuda_refusal())
