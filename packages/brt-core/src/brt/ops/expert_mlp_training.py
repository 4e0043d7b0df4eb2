"""`expert_mlp` with gradients, in eager mode: one node of autograd for all of its parts.

The parts on their own record a node each, which costs as much as the work of a small layer. Under
``torch.compile`` and other transforms the parts stay, which those see through.

Legend: N cells, R rows, P paths, D model and H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.ops.grouped_linear import activate, activation_backward
from brt.ops.registry import call


class ExpertMLPFunction(torch.autograd.Function):
    """Forward and backward by the operators, below autograd."""

    @staticmethod
    def forward(ctx: Any, parts: Callable[..., Tensor], *args: Any) -> Tensor:
        """``parts`` computes the same by operators that autograd knows, for second derivatives."""
        x_ND, cell_R, row_NK, offsets_P1, weight_R, up, up_bias, down, down_bias, activation = args
        rows_RD = call("dispatch", x_ND, cell_R, row_NK, None)
        # Of ReLU the result tells the derivative; of others what went in
        fused = activation if activation in ("relu", "none") else "none"
        pre_RH = call("grouped_linear", rows_RD, offsets_P1, up, up_bias, fused)
        hidden_RH = _hidden(pre_RH, activation)
        out_RD = call("grouped_linear", hidden_RH, offsets_P1, down, down_bias, "none")
        needs_weight = weight_R is not None and weight_R.requires_grad
        ctx.save_for_backward(*args[:-1], rows_RD, pre_RH, out_RD if needs_weight else None)
        ctx.parts, ctx.activation = parts, activation
        return call("combine", out_RD, row_NK, cell_R, weight_R)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        *inputs, rows_RD, pre_RH, out_RD = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
            return (None, *again(ctx.parts, inputs, ctx.activation, needs, grad_ND, twice=True))
        _, cell_R, row_NK, offsets_P1, weight_R, up, up_bias, down, down_bias = inputs
        grads: list[Tensor | None] = [None] * 11
        if needs[4]:
            grads[5] = call("row_dot", out_RD, grad_ND, cell_R, row_NK).to(weight_R.dtype)
        grad_RD = call("dispatch", grad_ND, cell_R, row_NK, weight_R)
        if needs[7]:
            hidden_RH = _hidden(pre_RH, ctx.activation)
            grads[8] = call("grouped_outer", grad_RD, hidden_RH, offsets_P1)
        if down_bias is not None and needs[8]:
            grads[9] = _bias_grad(grad_RD, offsets_P1)
        grad_RH = call("grouped_linear", grad_RD, offsets_P1, down.transpose(1, 2), None, "none")
        grad_RH = _hidden_backward(grad_RH, pre_RH, ctx.activation)
        if needs[5]:
            grads[6] = call("grouped_outer", grad_RH, rows_RD, offsets_P1)
        if up_bias is not None and needs[6]:
            grads[7] = _bias_grad(grad_RH, offsets_P1)
        if needs[0]:
            grad_RD = call("grouped_linear", grad_RH, offsets_P1, up.transpose(1, 2), None, "none")
            grads[1] = call("combine", grad_RD, row_NK, cell_R, None)
        return tuple(grads)


def suits(args: tuple[Any, ...]) -> bool:
    """Whether the arguments are plain tensors that nothing but eager autograd watches."""
    tensors = [a for a in args if a is not None and not isinstance(a, str)]
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def again(
    parts: Callable[..., Tensor],
    inputs: list[Any],
    activation: str,
    needs: tuple[bool, ...],
    grad_ND: Tensor,
    twice: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients by computing the parts again and differentiating them; ten, one an argument."""
    wanted = [i for i, t in enumerate(inputs) if t is not None and needs[i]]
    with torch.enable_grad():
        for i in wanted:
            # Apart from what the inputs were computed from, which may be one another
            inputs[i] = (
                inputs[i].view_as(inputs[i]) if twice else inputs[i].detach().requires_grad_()
            )
        out_ND = parts(*inputs, activation)
        found = torch.autograd.grad(
            out_ND, [inputs[i] for i in wanted], grad_ND, create_graph=twice
        )
    grads: list[Tensor | None] = [None] * 10
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _hidden(pre_RH: Tensor, activation: str) -> Tensor:
    """What goes into the second layer; ``pre`` of ReLU has been through it."""
    if activation in ("relu", "none"):
        return pre_RH
    if activation == "swiglu":
        gate_RH, up_RH = pre_RH.chunk(2, 1)
        return F.silu(gate_RH) * up_RH
    return activate(pre_RH, activation)


def _hidden_backward(grad_RH: Tensor, pre_RH: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return grad_RH
    if activation != "swiglu":
        return activation_backward(grad_RH, pre_RH, activation)
    gate_RH, up_RH = pre_RH.chunk(2, 1)
    grad_up_RH = grad_RH * F.silu(gate_RH)
    grad_gate_RH = torch.ops.aten.silu_backward(grad_RH * up_RH, gate_RH)
    return torch.cat([grad_gate_RH, grad_up_RH], 1)


def _bias_grad(grad_RO: Tensor, offsets_P1: Tensor) -> Tensor:
    ones_R1 = grad_RO.new_ones((grad_RO.shape[0], 1))
    return call("grouped_outer", grad_RO, ones_R1, offsets_P1).squeeze(2)
