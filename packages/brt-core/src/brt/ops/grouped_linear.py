"""`grouped_linear`: one linear layer for each path, over rows that lie path by path.

Legend: R rows, P paths, I features in, O features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.errors import RouteError
from brt.ops.autocast import register_autocast
from brt.ops.dispatch import check_devices, same_size
from brt.ops.registry import Operator

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

_GROUPED_LINEAR = Operator(
    "grouped_linear",
    "(Tensor x_RI, Tensor offsets_P1, Tensor weight_POI, Tensor? bias_PO, "
    "str activation) -> Tensor",
)
_GROUPED_OUTER = Operator(
    "grouped_outer", "(Tensor y_RO, Tensor x_RI, Tensor offsets_P1) -> Tensor"
)


def grouped_linear(
    x_RI: Tensor,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Rows of path p times ``weight[p].T`` plus ``bias[p]``, activated; ``[R, O]``.

    ``activation`` is none, relu, gelu, gelu_tanh or silu. Rows past the last offset are zero. Under
    autocast it runs in the autocast dtype, as ``nn.Linear`` does.
    """
    _check(x_RI, offsets_P1, weight_POI, bias_PO, activation)
    if activation != "none" and torch.is_grad_enabled():
        # Kept apart, the activation saves its input; fused, the backward would compute it again
        needs = (x_RI, weight_POI) if bias_PO is None else (x_RI, weight_POI, bias_PO)
        if any(t.requires_grad for t in needs):
            out = _GROUPED_LINEAR(x_RI, offsets_P1, weight_POI, bias_PO, "none")
            return activate(out, activation)
    return _GROUPED_LINEAR(x_RI, offsets_P1, weight_POI, bias_PO, activation)


def grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
    """``out[p] = y_p.T @ x_p`` over the rows of path p: the gradient of weights; ``[P, O, I]``."""
    _check_outer(y_RO, x_RI, offsets_P1)
    return _GROUPED_OUTER(y_RO, x_RI, offsets_P1)


def _check_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> None:
    check_devices("grouped_outer", y_RO, x_RI, offsets_P1)
    if y_RO.ndim != 2 or x_RI.ndim != 2 or offsets_P1.ndim != 1:
        raise RouteError(
            "grouped_outer: expected y [R, O], x [R, I] and offsets [P + 1], got "
            f"{list(y_RO.shape)}, {list(x_RI.shape)} and {list(offsets_P1.shape)}"
        )
    same_size("grouped_outer: rows of y and of x", y_RO.shape[0], x_RI.shape[0])


def activate(x: Tensor, activation: str) -> Tensor:
    """An activation by its name in `ACTIVATIONS`."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x


def _check(
    x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, bias_PO: Tensor | None, activation: str
) -> None:
    if activation not in ACTIVATIONS:
        raise RouteError(
            f"grouped_linear: activation {activation!r}; there are {', '.join(ACTIVATIONS)}"
        )
    check_devices("grouped_linear", x_RI, offsets_P1, weight_POI, bias_PO)
    if x_RI.ndim != 2 or offsets_P1.ndim != 1 or weight_POI.ndim != 3:
        raise RouteError(
            "grouped_linear: expected x [R, I], offsets [P + 1] and weight [P, O, I], got "
            f"{list(x_RI.shape)}, {list(offsets_P1.shape)} and {list(weight_POI.shape)}"
        )
    num_paths, num_out, num_in = weight_POI.shape
    same_size("grouped_linear: features of x and of weight", x_RI.shape[1], num_in)
    same_size("grouped_linear: offsets and paths + 1", offsets_P1.shape[0], num_paths + 1)
    if bias_PO is not None and tuple(bias_PO.shape) != (num_paths, num_out):
        raise RouteError(
            f"grouped_linear: bias must be [{num_paths}, {num_out}], got {list(bias_PO.shape)}"
        )


@torch.library.register_fake("brt::grouped_linear")
def _(
    x_RI: Tensor,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    _check(x_RI, offsets_P1, weight_POI, bias_PO, activation)
    return x_RI.new_empty((x_RI.shape[0], weight_POI.shape[1]))


@torch.library.register_fake("brt::grouped_outer")
def _(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
    _check_outer(y_RO, x_RI, offsets_P1)
    return x_RI.new_empty((offsets_P1.shape[0] - 1, y_RO.shape[1], x_RI.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RI, offsets_P1, weight_POI, bias_PO, activation = inputs
    ctx.save_for_backward(x_RI, offsets_P1, weight_POI, bias_PO)
    ctx.activation = activation


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
    x_RI, offsets_P1, weight_POI, bias_PO = ctx.saved_tensors
    if ctx.activation != "none":
        pre_RO = _GROUPED_LINEAR(x_RI, offsets_P1, weight_POI, bias_PO, "none")
        grad_RO = activation_backward(grad_RO, pre_RO, ctx.activation)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _GROUPED_LINEAR(grad_RO, offsets_P1, weight_POI.transpose(1, 2), None, "none")
    if ctx.needs_input_grad[2]:
        grad_weight = _GROUPED_OUTER(grad_RO, x_RI, offsets_P1)
    if bias_PO is not None and ctx.needs_input_grad[3]:
        ones_R1 = grad_RO.new_ones((grad_RO.shape[0], 1))
        grad_bias = _GROUPED_OUTER(grad_RO, ones_R1, offsets_P1).squeeze(2)
    return grad_x, None, grad_weight, grad_bias, None


def activation_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """The gradient of what went into an activation; ``pre`` of ReLU may be what came out."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, pre, 0)
    if activation == "silu":
        if torch.is_grad_enabled():  # torch has no derivative of silu_backward
            sigmoid = torch.sigmoid(pre)
            return grad * sigmoid * (1 + pre * (1 - sigmoid))
        return aten.silu_backward(grad, pre)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(grad, pre, approximate=approximate)


def _setup_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_outer(ctx: Any, grad_POI: Tensor) -> tuple[Tensor | None, ...]:
    y_RO, x_RI, offsets_P1 = ctx.saved_tensors
    grad_y = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_y = _GROUPED_LINEAR(x_RI, offsets_P1, grad_POI, None, "none")
    if ctx.needs_input_grad[1]:
        grad_x = _GROUPED_LINEAR(y_RO, offsets_P1, grad_POI.transpose(1, 2), None, "none")
    return grad_y, grad_x, None


torch.library.register_autograd("brt::grouped_linear", _backward, setup_context=_setup)
torch.library.register_autograd("brt::grouped_outer", _backward_outer, setup_context=_setup_outer)
register_autocast(_GROUPED_LINEAR, floats=(0, 2, 3))
