"""`brt.ops.expert_mlp` against a loop over cells and choices.

Legend: N cells, K choices per cell, R rows, P paths, D model and H hidden features.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import FLOATS, RouteCase, close, grads_of
from test_op_grouped_linear import ACTIVATIONS, plain_activation
from torch import Tensor

import brt
from brt import ops

CASES = [
    *(RouteCase(n, 16, 2, how) for n in (0, 1, 2, 1023, 1025) for how in ("random", "one-path")),
    RouteCase(1024, 1),
    RouteCase(1024, 2, 2, "some"),
    RouteCase(1024, 256, 1, "few-paths"),
    RouteCase(64, 4, 2, "none"),
    RouteCase(64, 4, 2, "random", (7,), "ties", 16, 8),
]
SMALL_CASES = (
    RouteCase(5, 3, 2, "some"),
    RouteCase(0, 3),
    RouteCase(4, 3, 1, "one-path"),
    RouteCase(5, 2, 2, "some", multiple=2),
)
FLOAT_ARGS = (0, 4, 5, 6, 7, 8)


def plain_expert_mlp(
    x_ND: Tensor,
    choice_NK: list[list[int]],
    row_NK: list[list[int]],
    weight_R: list[float] | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
) -> Tensor:
    """Cell by cell, in float64."""
    out = torch.zeros(x_ND.shape[0], down_PDH.shape[1], dtype=torch.float64)
    for n, paths in enumerate(choice_NK):
        for k, p in enumerate(paths):
            row = row_NK[n][k]
            if row < 0:
                continue
            hidden = up_PHD[p].double() @ x_ND[n].double()
            if up_bias_PH is not None:
                hidden = hidden + up_bias_PH[p].double()
            if activation == "swiglu":
                gate, up = hidden.chunk(2)
                hidden = plain_activation(gate, "silu") * up
            else:
                hidden = plain_activation(hidden, activation)
            made = down_PDH[p].double() @ hidden
            if down_bias_PD is not None:
                made = made + down_bias_PD[p].double()
            out[n] += made * (1 if weight_R is None else weight_R[row])
    return out.to(x_ND.dtype)


def arguments(
    case: RouteCase,
    device: object = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: str = "gelu",
    weighted: bool = True,
    biased: bool = True,
    sizes: tuple[int, int] = (4, 3),
) -> tuple:
    """What `expert_mlp` takes."""
    num_in, num_hidden = sizes
    cell_R, _, row_NK, offsets = case.route(device)
    num_up = 2 * num_hidden if activation == "swiglu" else num_hidden

    def made(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    return (
        made(case.num_cells, num_in),
        cell_R,
        row_NK,
        offsets,
        torch.rand(cell_R.shape).to(device, torch.promote_types(dtype, torch.float32))
        if weighted
        else None,
        made(case.num_paths, num_up, num_in),
        made(case.num_paths, num_up) if biased else None,
        made(case.num_paths, num_in, num_hidden),
        made(case.num_paths, num_in) if biased else None,
        activation,
    )


def expected(case: RouteCase, args: tuple) -> Tensor:
    x, _, row_NK, _, weight, *rest = (t.cpu() if isinstance(t, Tensor) else t for t in args)
    weights = None if weight is None else weight.tolist()
    return plain_expert_mlp(x, case.choices().tolist(), row_NK.tolist(), weights, *rest)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    args = arguments(case, device)
    close(ops.expert_mlp(*args), expected(case, args), case, factor=3)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    for case in SMALL_CASES:
        for weighted, biased in ((True, True), (False, False), (True, False)):
            args = arguments(case, device, dtype, activation, weighted, biased)
            wanted = expected(case, args)
            close(ops.expert_mlp(*args), wanted, f"{case} {weighted=} {biased=}", factor=5)
            args[0].requires_grad_()  # takes the way of its parts
            came = ops.expert_mlp(*args)
            assert came.requires_grad
            close(came.detach(), wanted, f"{case} {weighted=} {biased=}", factor=5)


def test_other_layouts(device: torch.device) -> None:
    case = SMALL_CASES[0]
    args = list(arguments(case, device))
    wanted = expected(case, tuple(args))
    for i in (0, 5, 7):
        args[i] = args[i].transpose(-1, -2).contiguous().transpose(-1, -2)
    close(ops.expert_mlp(*args), wanted, factor=3)


def test_two_calls_do_not_alias(device: torch.device) -> None:
    args = arguments(SMALL_CASES[0], device)
    first, second = ops.expert_mlp(*args), ops.expert_mlp(*args)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradients(case: RouteCase, activation: str, device: torch.device) -> None:
    """Of the wrapper, which runs the parts, and of the operator itself, which computes again."""
    args = arguments(case, device, torch.float64, activation, sizes=(2, 2))
    leaves = tuple(args[i].requires_grad_() for i in FLOAT_ARGS)

    def with_leaves(function: object, *leaves: Tensor) -> Tensor:
        given = list(args)
        for i, leaf in zip(FLOAT_ARGS, leaves, strict=True):
            given[i] = leaf
        return function(*given)

    for function in (ops.expert_mlp, torch.ops.brt.expert_mlp):

        def run(*leaves: Tensor) -> Tensor:
            return with_leaves(function, *leaves)  # noqa: B023

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


def test_gradients_of_arguments_that_depend_on_each_other(device: torch.device) -> None:
    """Weights that are computed from x must not be counted twice."""
    case = RouteCase(4, 2, 1)
    args = arguments(case, device, torch.float64)

    def run(x: Tensor) -> Tensor:
        weight_R = ops.dispatch(x.sum(1).sigmoid(), args[1], args[2])
        return torch.ops.brt.expert_mlp(x, *args[1:4], weight_R, *args[5:])

    assert torch.autograd.gradcheck(run, (args[0].requires_grad_(),))
    assert torch.autograd.gradgradcheck(run, (args[0],))


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_opcheck(case: RouteCase, device: torch.device) -> None:
    for activation, weighted, biased in (("gelu", True, True), ("swiglu", False, False)):
        args = arguments(case, device, torch.float32, activation, weighted, biased)
        torch.library.opcheck(torch.ops.brt.expert_mlp, args)
    args = arguments(case, device)
    for i in FLOAT_ARGS:
        args[i].requires_grad_()
    torch.library.opcheck(torch.ops.brt.expert_mlp, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device: torch.device, dynamic: bool) -> None:
    compiled = torch.compile(ops.expert_mlp, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in (RouteCase(9, 4, 2), RouteCase(12, 4, 2, "one-path"), RouteCase(6, 4, 2, "none")):
        args = arguments(case, device)
        with torch.no_grad():
            close(compiled(*args), ops.expert_mlp(*args), case)
        came = grads_of(lambda x, up: compiled(x, *args[1:5], up, *args[6:]), args[0], args[5])  # noqa: B023
        wanted = grads_of(
            lambda x, up: ops.expert_mlp(x, *args[1:5], up, *args[6:]),  # noqa: B023
            args[0],
            args[5],
        )
        for a, b in zip((*came[0], *came[1]), (*wanted[0], *wanted[1]), strict=True):
            close(a, b, case)


def test_autocast(device: torch.device) -> None:
    args = arguments(RouteCase(12, 4, 2), device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        plain = ops.expert_mlp(*args)
        args[5].requires_grad_()
        parts = ops.expert_mlp(*args)
    assert plain.dtype == parts.dtype == torch.bfloat16
    close(plain, expected(RouteCase(12, 4, 2), args).bfloat16(), factor=4)
    close(parts.detach(), plain, factor=2)
    parts.float().sum().backward()
    assert args[5].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (9, "tanh", "activation 'tanh'; there are none, .*swiglu"),
        (0, torch.zeros(5), r"expected x \[N, D\]"),
        (0, torch.zeros(6, 4), "cells of x and of the route.*got 6 and 5"),
        (0, torch.zeros(5, 7), "features of x and of up.*got 7 and 4"),
        (7, torch.zeros(2, 4, 3), "paths of up and of down.*got 3 and 2"),
        (7, torch.zeros(3, 4, 9), "rows of up and hidden.*got 3 and 9"),
        (6, torch.zeros(3, 9), r"up_bias must be \[3, 3\], got \[3, 9\]"),
        (8, torch.zeros(3, 9), r"down_bias must be \[3, 4\], got \[3, 9\]"),
        (4, torch.zeros(3), "weights and rows.*got 3 and 10"),
        (5, torch.zeros(3, 3, 4, device="meta"), "different devices"),
    ],
)
def test_bad_arguments(index: int, value: object, message: str) -> None:
    args = list(arguments(SMALL_CASES[0]))
    args[index] = value
    with pytest.raises(brt.RouteError, match=message):
        ops.expert_mlp(*args)
