"""`grouped_conv2d`: a convolution for each path, of sizes of its own, all in one call.

Legend: P paths, R rows of a path, C O channels in and out, H W height and width, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brt.errors import RouteError
from brt.ops.autocast import register_autocast
from brt.ops.dispatch import check_devices, same_size
from brt.ops.registry import Operator
from brt.path_conv import CONV_ACTIVATIONS, PathConv, activate_image, extra_of, unflatten_convs

_GROUPED_CONV2D = Operator(
    "grouped_conv2d",
    "(Tensor[] x_P, Tensor[] weight_P, Tensor[] extras, int[] convs, str activation) -> Tensor[]",
)


def grouped_conv2d(
    x_P: Sequence[Tensor],
    weight_P: Sequence[Tensor],
    bias_P: Sequence[Tensor | None] | None = None,
    residual_P: Sequence[Tensor | None] | None = None,
    slope_P: Sequence[Tensor | None] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int | Sequence[int] = 1,
    activation: str = "none",
) -> list[Tensor]:
    """``act(conv2d(x[p], weight[p], bias[p]) + residual[p])`` of every path, contiguous.

    ``x[p]`` is ``[R, C, H, W]``, with sizes of its own; ``weight[p]`` is ``[O, C / groups, k, k]``.
    ``stride``, ``padding`` (less than k) and ``groups`` are one number for all, or one a path.
    ``activation`` is none, relu, prelu (with a slope of 1 or O values a path), sigmoid or silu.
    A path without rows makes no rows. Under autocast it runs in the autocast dtype, as
    ``nn.Conv2d`` does.
    """
    x_P, weight_P = list(x_P), list(weight_P)
    num_paths = len(x_P)
    extras: list[Tensor] = []
    places = [
        _placed(extras, what, given, num_paths)
        for what, given in (("biases", bias_P), ("residuals", residual_P), ("slopes", slope_P))
    ]
    settings = [
        _for_each(what, given, num_paths)
        for what, given in (("strides", stride), ("paddings", padding), ("groups", groups))
    ]
    if slope_P is not None and activation != "prelu":
        raise RouteError(f"grouped_conv2d: slopes are for activation 'prelu', got {activation!r}")
    path_convs = list(map(PathConv._make, zip(*places, *settings, strict=True)))
    _check(x_P, weight_P, extras, path_convs, activation)
    convs = [number for conv in path_convs for number in conv]
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*x_P, *weight_P, *extras)
    )
    if activation != "none" and needs_grad:
        # Kept apart, the activation saves its input; fused, the backward would compute it again
        made_P = _GROUPED_CONV2D(x_P, weight_P, extras, convs, "none")
        slopes = [extra_of(extras, conv.slope) for conv in path_convs]
        return [
            activate_image(made, activation, None if slope is None else slope.to(made.dtype))
            for made, slope in zip(made_P, slopes, strict=True)
        ]
    return _GROUPED_CONV2D(x_P, weight_P, extras, convs, activation)


def _placed(
    extras: list[Tensor], what: str, given: Sequence[Tensor | None] | None, num_paths: int
) -> list[int]:
    """Append those that are given to ``extras``; the position of each path's, or -1."""
    if given is None:
        return [-1] * num_paths
    if len(given) != num_paths:
        raise RouteError(f"grouped_conv2d: {num_paths} paths have {len(given)} {what}")
    places = []
    for tensor in given:
        places.append(-1 if tensor is None else len(extras))
        if tensor is not None:
            extras.append(tensor)
    return places


def _for_each(what: str, given: int | Sequence[int], num_paths: int) -> list[int]:
    if isinstance(given, int):
        return [given] * num_paths
    if len(given) != num_paths:
        raise RouteError(f"grouped_conv2d: {num_paths} paths have {len(given)} {what}")
    return list(given)


def _check(
    x_P: Sequence[Tensor],
    weight_P: Sequence[Tensor],
    extras: Sequence[Tensor],
    path_convs: Sequence[PathConv],
    activation: str,
) -> None:
    if activation not in CONV_ACTIVATIONS:
        raise RouteError(
            f"grouped_conv2d: activation {activation!r}; there are {', '.join(CONV_ACTIVATIONS)}"
        )
    if not x_P or len(x_P) != len(weight_P) or len(x_P) != len(path_convs):
        raise RouteError(
            "grouped_conv2d: expected rows, a weight and a convolution of each of at least one "
            f"path, got {len(x_P)}, {len(weight_P)} and {len(path_convs)}"
        )
    check_devices("grouped_conv2d", *x_P, *weight_P, *extras)
    dtypes = {t.dtype for t in (*x_P, *weight_P, *extras)}
    if (len(dtypes) > 1 or not x_P[0].dtype.is_floating_point) and not torch.is_autocast_enabled(
        x_P[0].device.type
    ):
        found = ", ".join(sorted(map(str, dtypes)))
        raise RouteError(f"grouped_conv2d: tensors must have one floating dtype, got {found}")
    for p, conv in enumerate(path_convs):
        _check_path(p, x_P[p], weight_P[p], extras, conv, activation)


def _check_path(
    p: int, x: Tensor, weight: Tensor, extras: Sequence[Tensor], conv: PathConv, activation: str
) -> None:
    where = f"grouped_conv2d, path {p}"
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise RouteError(
            f"{where}: expected x [R, C, H, W] and weight [O, C / groups, k, k], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    num_out, num_in, kernel, _ = weight.shape
    num_channels = x.shape[1]
    if conv.stride < 1 or conv.groups < 1 or not 0 <= conv.padding < kernel:
        raise RouteError(
            f"{where}: stride and groups must be positive and padding from 0 to {kernel - 1}, got "
            f"{conv.stride}, {conv.groups} and {conv.padding}"
        )
    if num_channels < 1 or num_out < 1 or num_channels % conv.groups or num_out % conv.groups:
        raise RouteError(
            f"{where}: {conv.groups} groups do not divide {num_channels} channels in and "
            f"{num_out} out"
        )
    same_size(f"{where}: channels of x and of weight", num_channels, num_in * conv.groups)
    shape = conv.out_shape(x, weight)
    if shape[2] < 1 or shape[3] < 1:
        raise RouteError(
            f"{where}: a kernel of {kernel} with padding {conv.padding} is larger than x "
            f"{list(x.shape)}"
        )
    _check_extras(where, extras, conv, shape, activation)


def _check_extras(
    where: str,
    extras: Sequence[Tensor],
    conv: PathConv,
    shape: tuple[int, int, int, int],
    activation: str,
) -> None:
    most = max(conv.bias, conv.residual, conv.slope)
    if most >= len(extras):
        raise RouteError(f"{where}: there is no tensor {most} among {len(extras)} extra ones")
    bias, residual = extra_of(extras, conv.bias), extra_of(extras, conv.residual)
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != shape[1]):
        raise RouteError(f"{where}: bias must be [{shape[1]}], got {list(bias.shape)}")
    if residual is not None:
        if residual.ndim != 4:
            raise RouteError(f"{where}: residual must be {shape}, got {list(residual.shape)}")
        for dim in range(4):
            came, what = residual.shape[dim], f"{where}: dim {dim} of residual and result"
            same_size(what, came, shape[dim])
    if activation == "prelu":
        slope = extra_of(extras, conv.slope)
        if slope is None:
            raise RouteError(f"{where}: prelu needs a slope")
        if slope.ndim != 1 or slope.shape[0] not in (1, shape[1]):
            raise RouteError(f"{where}: slope must be [1] or [{shape[1]}], got {list(slope.shape)}")


@torch.library.register_fake("brt::grouped_conv2d")
def _(
    x_P: Sequence[Tensor],
    weight_P: Sequence[Tensor],
    extras: Sequence[Tensor],
    convs: Sequence[int],
    activation: str,
) -> list[Tensor]:
    path_convs = unflatten_convs(convs)
    _check(x_P, weight_P, extras, path_convs, activation)
    return [
        x.new_empty(conv.out_shape(x, weight))
        for x, weight, conv in zip(x_P, weight_P, path_convs, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_P, weight_P, extras, ctx.convs, ctx.activation = inputs
    ctx.num_paths = len(x_P)
    ctx.save_for_backward(*x_P, *weight_P, *extras)


def _backward(ctx: Any, grad_P: Sequence[Tensor]) -> tuple[Any, ...]:
    num_paths = ctx.num_paths
    saved = list(ctx.saved_tensors)
    x_P, weight_P, extras = (
        saved[:num_paths],
        saved[num_paths : 2 * num_paths],
        saved[2 * num_paths :],
    )
    needs_x, needs_weight, needs_extra = ctx.needs_input_grad[:3]
    grad_x: list[Tensor | None] = [None] * num_paths
    grad_weight: list[Tensor | None] = [None] * num_paths
    grad_extra: list[Tensor | None] = [None] * len(extras)

    def add(position: int, grad: Tensor) -> None:  # several paths may share an extra tensor
        before = grad_extra[position]
        grad_extra[position] = grad if before is None else before + grad

    pre_P: list[Tensor] = []
    if ctx.activation != "none":
        pre_P = _GROUPED_CONV2D(x_P, weight_P, extras, ctx.convs, "none")
    for p, conv in enumerate(unflatten_convs(ctx.convs)):
        grad = grad_P[p]
        if pre_P:
            slope = extra_of(extras, conv.slope)
            grad, grad_slope = _activation_backward(grad, pre_P[p], ctx.activation, slope)
            if grad_slope is not None and needs_extra[conv.slope]:
                add(conv.slope, grad_slope)
        if conv.residual >= 0 and needs_extra[conv.residual]:
            add(conv.residual, grad)
        wanted = [needs_x[p], needs_weight[p], conv.bias >= 0 and needs_extra[conv.bias]]
        if not any(wanted):
            continue
        grad_x[p], grad_weight[p], grad_bias = torch.ops.aten.convolution_backward(
            *(grad, x_P[p], weight_P[p], [weight_P[p].shape[0]]),
            *([conv.stride] * 2, [conv.padding] * 2, [1, 1], False, [0, 0], conv.groups, wanted),
        )
        if wanted[2]:
            add(conv.bias, grad_bias)
    return grad_x, grad_weight, grad_extra, None, None


def _activation_backward(
    grad: Tensor, pre: Tensor, activation: str, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients in what was activated and, of a PReLU, in its slope."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, pre, 0), None
    if activation == "prelu":
        assert slope is not None
        inside = torch.where(pre > 0, 0, grad)
        grad_slope = inside * pre
        grad_slope = grad_slope.sum() if slope.shape[0] == 1 else grad_slope.sum((0, 2, 3))
        return torch.where(pre > 0, grad, inside * slope.view(-1, 1, 1)), grad_slope.view_as(slope)
    sigmoid = torch.sigmoid(pre)
    if activation == "sigmoid":
        return grad * sigmoid * (1 - sigmoid), None
    return grad * sigmoid * (1 + pre * (1 - sigmoid)), None


torch.library.register_autograd("brt::grouped_conv2d", _backward, setup_context=_setup)
register_autocast(_GROUPED_CONV2D, floats=(0, 1, 2))
