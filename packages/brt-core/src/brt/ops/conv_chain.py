"""`conv_chain`: a small convolutional branch for each path, all branches of a region in one call.

Legend: R rows (cells, path by path), P paths, C channels, H W height and width, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brt.conv_steps import (
    ConvProgram,
    ConvStep,
    flatten_branches,
    image_shape,
    unflatten_branch,
)
from brt.ops.registry import Operator

_CONV_CHAIN = Operator(
    "conv_chain",
    "(Tensor x_RCHW, Tensor offsets_P1, Tensor[] params, int[] steps, int[] step_offsets_P1, "
    "float[] scales) -> Tensor",
)
_CONV_CHAIN_BACKWARD = Operator(
    "conv_chain_backward",
    "(Tensor grad_RCHW, Tensor x_RCHW, Tensor offsets_P1, Tensor[] params, int[] steps, "
    "int[] step_offsets_P1, float[] scales) -> Tensor[]",
)


def conv_chain(
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    branches: Sequence[Sequence[ConvStep]] | ConvProgram,
) -> Tensor:
    """Run branch p, a list of steps, on the rows of path p; ``[R, C', H', W']``.

    All branches must make images of one shape. Rows past the last offset are zero. Gradients are
    those of the steps, computed again in the backward: between the steps nothing is kept.
    """
    # Tuples are a program that kernels may know again by its identity, lists one by its numbers
    numbers = branches.arguments() if isinstance(branches, ConvProgram) else _numbers(branches)
    args = (x_RCHW, offsets_P1, list(params), *numbers)
    if _is_watched(x_RCHW, params):
        return _CONV_CHAIN.overload(*args)
    # The dispatcher would copy the lists, of tens of thousands of numbers, at every call
    return _CONV_CHAIN.run(*args)


def _numbers(
    branches: Sequence[Sequence[ConvStep]],
) -> tuple[list[int], list[int], list[float]]:
    steps, scales, step_offsets_P1 = flatten_branches(branches)
    return steps, step_offsets_P1, scales


def _is_watched(x_RCHW: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether anything but a kernel must see the call: autograd, a compiler, a mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (x_RCHW, *params)))
        or type(x_RCHW) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


@torch.library.register_fake("brt::conv_chain")
def _(
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    first = unflatten_branch(steps, scales, 0, step_offsets_P1[1])
    return x_RCHW.new_empty((x_RCHW.shape[0], *image_shape(x_RCHW, params, first)))


@torch.library.register_fake("brt::conv_chain_backward")
def _(
    grad_RCHW: Tensor,
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x_RCHW, *params)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RCHW, offsets_P1, params, ctx.steps, ctx.step_offsets_P1, ctx.scales = inputs
    ctx.save_for_backward(x_RCHW, offsets_P1, *params)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_RCHW, offsets_P1, *params = ctx.saved_tensors
    grads = _CONV_CHAIN_BACKWARD(
        grad, x_RCHW, offsets_P1, params, ctx.steps, ctx.step_offsets_P1, ctx.scales
    )
    return grads[0], None, grads[1:], None, None, None


torch.library.register_autograd("brt::conv_chain", _backward, setup_context=_setup)
