"""One repair of torch's compiler that routed convolutions need."""

from __future__ import annotations

import functools
from typing import Any

import torch


def allow_unbacked_convolutions() -> None:
    """Make Inductor compile a convolution whose batch is a path's load, known only at run time.

    Its layout optimisation asks for channels-last inputs, but predicts the strides of the output
    with the batch unknown, gets contiguous ones, and the generated code then fails its own
    assertion (seen in torch 2.13 on CPU; CUDA already skips dynamic shapes). Only graphs
    with such a convolution are affected: for those the optimisation is turned off.

    Called where a graph with such sizes is traced, and does nothing outside a compiler.
    """
    if torch._guards.TracingContext.try_get() is not None:
        _patch()


def _patch() -> None:
    from torch._inductor.graph import GraphLowering

    original = GraphLowering.decide_layout_opt
    if getattr(original, "_brt", False):
        return

    @functools.wraps(original)
    def decide_layout_opt(gm: torch.fx.GraphModule, *, is_inference: bool) -> bool:
        if any(_has_unbacked_batch(node) for node in gm.graph.nodes):
            return False
        return original(gm, is_inference=is_inference)

    decide_layout_opt._brt = True  # type: ignore[attr-defined]
    GraphLowering.decide_layout_opt = staticmethod(decide_layout_opt)  # type: ignore[method-assign]


def _has_unbacked_batch(node: torch.fx.Node) -> bool:
    if "convolution" not in str(node.target) or node.op != "call_function":
        return False
    for arg in node.args:
        value: Any = arg.meta.get("val") if isinstance(arg, torch.fx.Node) else None
        if isinstance(value, torch.Tensor) and value.ndim >= 3:
            batch = value.shape[0]
            if isinstance(batch, torch.SymInt) and _is_unbacked(batch):
                return True
    return False


def _is_unbacked(size: torch.SymInt) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size))
