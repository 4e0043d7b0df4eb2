"""A module that runs by another forward, and stays what it is in all else."""

from __future__ import annotations

import functools

from torch import nn

ROUTER = "brt_router"
"""The name under which an adapted module holds its router, which has no parameters."""


def take_over(module: nn.Module, forward_of: type[nn.Module], **children: nn.Module) -> nn.Module:
    """Give ``module`` the forward of another class, and children that this one needs.

    Its class becomes a subclass of both, so that ``isinstance`` answers as before.
    """
    module.__class__ = _both(forward_of, type(module))  # type: ignore[arg-type]
    for name, child in children.items():
        module.add_module(name, child)
        child.train(module.training)
    return module


@functools.cache
def _both(forward_of: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (forward_of, own), {"__module__": own.__module__})
