"""Comparing what a rewritten graph answers with what the original answered."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brt.cells import Root
from brt.route import Route

Tolerance = Callable[[torch.dtype], tuple[float, float]]

# What rounding each factor to ten bits comes to behind a hundred convolutions
_TF32 = 1.6e-2


class Moved(Exception):  # noqa: N818 - it reports a finding; callers say what it means
    """A result differs from the original's."""


def largest_error(found: Any, wanted: Any, tolerance: Tolerance, where: str = "output") -> float:
    """The largest difference between two results; raises `Moved` where one is beyond tolerance.

    Looks into tuples, lists, mappings and dataclasses. Keys of roots differ by nature, and host
    sizes of a route are there or not; both are passed over.
    """
    if isinstance(wanted, Tensor) or isinstance(found, Tensor):
        return _tensor_error(found, wanted, tolerance, where)
    if isinstance(wanted, (tuple, list)):
        if not isinstance(found, (tuple, list)) or len(found) != len(wanted):
            raise Moved(f"{where} is {_describe(found)} instead of {_describe(wanted)}")
        parts: Iterator[tuple[str, Any, Any]] = (
            (f"{where}[{i}]", f, w) for i, (f, w) in enumerate(zip(found, wanted, strict=True))
        )
    elif isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or list(found) != list(wanted):
            raise Moved(f"{where} is {_describe(found)} instead of {_describe(wanted)}")
        parts = ((f"{where}[{key!r}]", found[key], wanted[key]) for key in wanted)
    elif dataclasses.is_dataclass(wanted) and not isinstance(wanted, type):
        if type(found) is not type(wanted):
            raise Moved(f"{where} is {_describe(found)} instead of {_describe(wanted)}")
        parts = (
            (f"{where}.{f.name}", getattr(found, f.name), getattr(wanted, f.name))
            for f in dataclasses.fields(wanted)
            if (type(wanted), f.name) not in ((Root, "key"), (Route, "sizes"))
        )
    else:
        plain = wanted is None or isinstance(wanted, (bool, int, float, str))
        if plain and found != wanted and not (found != found and wanted != wanted):
            raise Moved(f"{where} is {found!r} instead of {wanted!r}")
        return 0.0
    return max((largest_error(f, w, tolerance, at) for at, f, w in parts), default=0.0)


def _tensor_error(found: Any, wanted: Any, tolerance: Tolerance, where: str) -> float:
    same_form = (
        isinstance(found, Tensor)
        and isinstance(wanted, Tensor)
        and found.shape == wanted.shape
        and found.dtype == wanted.dtype
    )
    if not same_form:
        raise Moved(f"{where} is {_describe(found)} instead of {_describe(wanted)}")
    if wanted.numel() == 0:
        return 0.0
    rtol, atol = allowed(tolerance, wanted.dtype, found.device)
    a, b = found.detach(), wanted.detach().to(found.device)
    if not (a.is_floating_point() or a.is_complex()):
        error, within = float((a != b).any()), torch.equal(a, b)
    else:
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        difference = (a - b).abs().masked_fill((a == b) | ((a != a) & (b != b)), 0)
        error = float(difference.max())
        # Rounding is relative to the largest numbers that a sum was made of: those of a row
        size = b.abs().masked_fill(~b.isfinite(), 0)
        size = size.amax(tuple(range(1, b.ndim)), keepdim=True) if b.ndim > 1 else size.max()
        within = bool((difference <= atol + rtol * size).all())
    if not within:
        raise Moved(
            f"{where} ({str(wanted.dtype).removeprefix('torch.')}{list(wanted.shape)}) differs by "
            f"up to {error:.3g}; allowed are {atol:g} + {rtol:g} of the largest value in a row"
        )
    return error


def allowed(tolerance: Tolerance, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(relative, absolute) difference, where torch may round float32 to TF32 as well."""
    rtol, atol = tolerance(dtype)
    short = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if device.type == "cuda" and dtype == torch.float32 and short:
        return max(rtol, _TF32), atol
    return rtol, atol


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def cloned(value: Any) -> Any:
    """A value with its tensors copied, so that work in place on one leaves the other alone."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        items = [cloned(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: cloned(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tensors = {
            f.name: cloned(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init and isinstance(getattr(value, f.name), Tensor)
        }
        return dataclasses.replace(value, **tensors) if tensors else value
    return value


@contextlib.contextmanager
def without_traces(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run the model in the block so that nothing shows afterwards.

    No gradients; random numbers from a fixed seed; buffers (the statistics of a batch norm in
    training mode) and the states of generators get their values back.
    """
    buffers = [b for b in model.buffers() if not b.is_meta]
    kept = [(b, b.detach().clone()) for b in buffers] if training(model) else []
    drawn = [(generator, generator.get_state()) for generator in generators(model)]
    devices = sorted({t.device.index or 0 for t in (*model.parameters(), *buffers) if t.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            for generator, state in drawn:
                generator.set_state(state)


def training(model: nn.Module) -> str | None:
    """The first module in training mode, by name ("the model" for the root); None for none."""
    return next((name or "the model" for name, m in model.named_modules() if m.training), None)


def generators(model: nn.Module) -> list[torch.Generator]:
    """The generators that the routers' protocols draw from."""
    found = {}
    for module in model.modules():
        generator = getattr(getattr(module, "protocol", None), "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())
