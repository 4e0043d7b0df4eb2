"""What the checks have in common: saying which rule is broken, and by what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from brt.errors import PluginError
from brt.specs import Spec


class Rules:
    """Checks rules of one offered thing, and names it where one is broken."""

    def __init__(self, what: str) -> None:
        self.what = what

    def require(self, held: bool, rule: str, came: str = "") -> None:
        """Raise unless a rule holds."""
        if not held:
            raise AssertionError(f"{self.what}: {rule}" + (f"; {came}" if came else ""))

    @contextmanager
    def holds(self, rule: str) -> Iterator[None]:
        """Whatever is raised in the block breaks a rule."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(
                f"{self.what}: {rule}; it raised {type(error).__name__}: {error}"
            ) from error

    def offered(self, kind: type[Spec], made: type) -> None:
        """The class can be offered through its hook: it has a name, and opens with a docstring."""
        try:
            kind.of(made)
        except PluginError as error:
            raise AssertionError(
                f"{self.what}: needs a kebab-case `name`, and a docstring whose first line says "
                f"what it does; {error}"
            ) from error

    def options(self, made: object) -> None:
        """Options are fields of a frozen dataclass."""
        params = getattr(type(made), "__dataclass_params__", None)
        self.require(
            params is not None and params.frozen,
            "is a frozen dataclass, whose fields are its options (@dataclass(frozen=True))",
        )


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists, dicts and registered dataclasses."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def share_memory(a: Any, b: Any) -> bool:
    """Whether any tensor of one value lies in memory of the other."""
    held = {t.untyped_storage().data_ptr() for t in tensors(a) if t.numel()}
    return any(t.untyped_storage().data_ptr() in held for t in tensors(b) if t.numel())


def equal(a: Any, b: Any) -> bool:
    """Whether two values hold the same tensors, NaN for NaN."""
    ours, theirs = tensors(a), tensors(b)
    return len(ours) == len(theirs) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(ours, theirs, strict=True)
    )


def describe(value: Any) -> str:
    """Dtypes and shapes of the tensors in a value."""
    parts = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors(value)]
    return ", ".join(parts) or repr(value)
