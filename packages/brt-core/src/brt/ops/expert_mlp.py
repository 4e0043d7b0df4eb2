"""`expert_mlp`: a whole mixture-of-experts feed-forward layer, from cells to cells.

Legend: N cells, K choices per cell, R rows, P paths, D model and H hidden features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.errors import RouteError
from brt.ops.autocast import register_autocast
from brt.ops.combine import combine
from brt.ops.dispatch import check_devices, check_rows, dispatch, same_size
from brt.ops.expert_mlp_training import ExpertMLPFunction, again, suits
from brt.ops.grouped_linear import ACTIVATIONS, grouped_linear
from brt.ops.registry import Operator

_EXPERT_MLP = Operator(
    "expert_mlp",
    "(Tensor x_ND, Tensor cell_R, Tensor row_NK, Tensor offsets_P1, Tensor? weight_R, "
    "Tensor up_PHD, Tensor? up_bias_PH, Tensor down_PDH, Tensor? down_bias_PD, "
    "str activation) -> Tensor",
)


def expert_mlp(
    x_ND: Tensor,
    cell_R: Tensor,
    row_NK: Tensor,
    offsets_P1: Tensor,
    weight_R: Tensor | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
) -> Tensor:
    """Dispatch, up, activation, down and weighted combine in one operator; ``[N, D]``.

    ``activation`` is one of `grouped_linear`'s or "swiglu": ``up`` then has 2H rows, gate first,
    and the hidden features are ``silu(gate) * up``. While gradients are needed it keeps what its
    backward needs: the rows, the hidden features and, for those of weights, the results.
    """
    args = (
        x_ND, cell_R, row_NK, offsets_P1, weight_R, up_PHD, up_bias_PH, down_PDH, down_bias_PD,
    )  # fmt: skip
    _check(*args, activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        if suits((*args, activation)):
            return ExpertMLPFunction.apply(expert_mlp_parts, *args, activation)
        return expert_mlp_parts(*args, activation)
    return _EXPERT_MLP(*args, activation)


def expert_mlp_parts(
    x_ND: Tensor,
    cell_R: Tensor,
    row_NK: Tensor,
    offsets_P1: Tensor,
    weight_R: Tensor | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
) -> Tensor:
    """`expert_mlp` as the operators that it consists of, each with the kernel of its choice."""
    rows_RD = dispatch(x_ND, cell_R, row_NK)
    if activation == "swiglu":
        gate_RH, up_RH = grouped_linear(rows_RD, offsets_P1, up_PHD, up_bias_PH).chunk(2, 1)
        hidden_RH = F.silu(gate_RH) * up_RH
    else:
        hidden_RH = grouped_linear(rows_RD, offsets_P1, up_PHD, up_bias_PH, activation)
    out_RD = grouped_linear(hidden_RH, offsets_P1, down_PDH, down_bias_PD)
    return combine(out_RD, row_NK, cell_R, weight_R)


def _check(
    x_ND: Tensor,
    cell_R: Tensor,
    row_NK: Tensor,
    offsets_P1: Tensor,
    weight_R: Tensor | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
) -> None:
    check_rows("expert_mlp", cell_R, row_NK, weight_R)
    check_devices(
        "expert_mlp", x_ND, cell_R, row_NK, offsets_P1, weight_R, up_PHD, up_bias_PH, down_PDH,
        down_bias_PD,
    )  # fmt: skip
    if activation not in (*ACTIVATIONS, "swiglu"):
        raise RouteError(
            f"expert_mlp: activation {activation!r}; there are {', '.join(ACTIVATIONS)}, swiglu"
        )
    if x_ND.ndim != 2 or up_PHD.ndim != 3 or down_PDH.ndim != 3:
        raise RouteError(
            "expert_mlp: expected x [N, D], up [P, H, D] and down [P, D, H], got "
            f"{list(x_ND.shape)}, {list(up_PHD.shape)} and {list(down_PDH.shape)}"
        )
    halves = 2 if activation == "swiglu" else 1
    same_size("expert_mlp: cells of x and of the route", x_ND.shape[0], row_NK.shape[0])
    same_size("expert_mlp: features of x and of up", x_ND.shape[1], up_PHD.shape[2])
    same_size("expert_mlp: paths of up and of down", up_PHD.shape[0], down_PDH.shape[0])
    same_size("expert_mlp: rows of up and hidden", up_PHD.shape[1], halves * down_PDH.shape[2])
    for what, bias, weight in (("up", up_bias_PH, up_PHD), ("down", down_bias_PD, down_PDH)):
        if bias is not None and bias.shape != weight.shape[:2]:
            raise RouteError(
                f"expert_mlp: {what}_bias must be {list(weight.shape[:2])}, got {list(bias.shape)}"
            )


@torch.library.register_fake("brt::expert_mlp")
def _(*args: Any) -> Tensor:
    _check(*args)
    x_ND, down_PDH = args[0], args[7]
    return x_ND.new_empty((x_ND.shape[0], down_PDH.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    # The operator called directly under autograd: compute the parts again, then differentiate them
    inputs, needs = list(ctx.saved_tensors), ctx.needs_input_grad
    twice = torch.is_grad_enabled()
    return again(expert_mlp_parts, inputs, ctx.activation, needs, grad_ND, twice)


torch.library.register_autograd("brt::expert_mlp", _backward, setup_context=_setup)
register_autocast(_EXPERT_MLP, floats=(0, 5, 6, 7, 8))
