"""`brt.ops.grouped_linear` against a loop over rows.

Legend: R rows, P paths, I features in, O features out.
"""

from __future__ import annotations

import math

import pytest
import torch
from core_cases import FLOATS, NUM_CELLS, RouteCase, close, grads_of, mixed_layouts
from torch import Tensor
from torch.nn import functional as F

import brt
from brt import ops

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
CASES = [
    *(RouteCase(n, 16, 1, how) for n in NUM_CELLS for how in ("random", "one-path", "few-paths")),
    RouteCase(1025, 1),
    RouteCase(1025, 2, 2, "some"),
    RouteCase(1025, 256, 1, "some"),
    RouteCase(64, 4, 2, "none"),
    RouteCase(64, 4, 2, "some", multiple=8),
]
SMALL_CASES = (
    RouteCase(7, 3, 2, "some"),
    RouteCase(0, 3),
    RouteCase(1, 2),
    RouteCase(5, 4, 1, "one-path"),
    RouteCase(6, 3, 2, "some", multiple=2),
)


def plain_activation(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    return x


def plain_grouped_linear(
    x_RI: Tensor, offsets: list[int], weight_POI: Tensor, bias_PO: Tensor | None, activation: str
) -> Tensor:
    """Row by row, in float64."""
    out = torch.zeros(x_RI.shape[0], weight_POI.shape[1], dtype=torch.float64)
    for p in range(weight_POI.shape[0]):
        weight = weight_POI[p].double()
        for r in range(offsets[p], offsets[p + 1]):
            row = weight @ x_RI[r].double()
            out[r] = plain_activation(
                row if bias_PO is None else row + bias_PO[p].double(), activation
            )
    return out.to(x_RI.dtype)


def inputs(
    case: RouteCase, sizes: tuple[int, int] = (6, 5), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, offsets, weight, bias), on the CPU."""
    cell_R, _, _, offsets = case.route()
    num_in, num_out = sizes
    x = torch.randn(cell_R.shape[0], num_in).to(dtype)
    weight = torch.randn(case.num_paths, num_out, num_in) / math.sqrt(max(num_in, 1))
    return x, offsets, weight.to(dtype), torch.randn(case.num_paths, num_out).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    x, offsets, weight, bias = inputs(case)
    came = ops.grouped_linear(*(t.to(device) for t in (x, offsets, weight, bias)))
    close(came, plain_grouped_linear(x, offsets.tolist(), weight, bias, "none"), case)
    if case.multiple == 1:
        assert bool((came[int(offsets[-1]) :] == 0).all()), f"{case}: rows past the last offset"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    for case in SMALL_CASES:
        x, offsets, weight, bias = inputs(case, dtype=dtype)
        for given in (bias, None):
            wanted = plain_grouped_linear(x, offsets.tolist(), weight, given, activation)
            args = [None if t is None else t.to(device) for t in (x, offsets, weight, given)]
            close(ops.grouped_linear(*args, activation), wanted, case, factor=2)
            args[1] = args[1].int()
            close(ops.grouped_linear(*args, activation), wanted, f"{case} int32", factor=2)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (64, 48)], ids=str)
def test_features(sizes: tuple[int, int], device: torch.device) -> None:
    case = SMALL_CASES[0]
    x, offsets, weight, bias = inputs(case, sizes)
    came = ops.grouped_linear(*(t.to(device) for t in (x, offsets, weight, bias)), "relu")
    close(came, plain_grouped_linear(x, offsets.tolist(), weight, bias, "relu"), sizes)


def test_other_layouts(device: torch.device) -> None:
    x, offsets, weight, bias = (t.to(device) for t in inputs(SMALL_CASES[0]))
    strided_bias = mixed_layouts(bias)["strided"]
    weights = {
        "swapped": weight.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": mixed_layouts(weight)["strided"],
        "expanded": weight[:1].expand_as(weight),
    }
    for name, other in mixed_layouts(x).items():
        for weight_name, other_weight in weights.items():
            came = ops.grouped_linear(other, offsets, other_weight, strided_bias)
            wanted = plain_grouped_linear(
                other.cpu(), offsets.tolist(), other_weight.cpu(), bias.cpu(), "none"
            )
            close(came, wanted, f"{name} {weight_name}", factor=2)


def test_two_calls_do_not_alias(device: torch.device) -> None:
    args = [t.to(device) for t in inputs(SMALL_CASES[0])]
    first, second = ops.grouped_linear(*args), ops.grouped_linear(*args)
    assert len({t.untyped_storage().data_ptr() for t in (*args, first, second)}) == 6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str, device: torch.device) -> None:
    for case in SMALL_CASES:
        made = inputs(case, (2, 3), torch.float64)
        x, offsets, weight, bias = (t.to(device) for t in made)
        leaves = tuple(t.requires_grad_() for t in (x, weight, bias))

        def wrapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return ops.grouped_linear(x, offsets, weight, bias, activation)  # noqa: B023

        def raw(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.ops.brt.grouped_linear(x, offsets, weight, bias, activation)  # noqa: B023

        for run in (wrapped, raw):
            assert torch.autograd.gradcheck(run, leaves), str(case)
            assert torch.autograd.gradgradcheck(run, leaves), str(case)


def test_gradients_of_unused_paths_are_zero(device: torch.device) -> None:
    case = RouteCase(9, 4, 1, "one-path")
    x, offsets, weight, bias = (t.to(device) for t in inputs(case))
    _, (_, grad_weight, grad_bias) = grads_of(
        lambda x, w, b: ops.grouped_linear(x, offsets, w, b), x, weight, bias
    )
    assert bool((grad_weight[:3] == 0).all())
    assert bool((grad_bias[:3] == 0).all())
    assert bool((grad_weight[3] != 0).any())


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_opcheck(case: RouteCase, activation: str, device: torch.device) -> None:
    x, offsets, weight, bias = (t.to(device) for t in inputs(case))
    for given in (None, bias):
        args = (x, offsets, weight, given, activation)
        torch.library.opcheck(torch.ops.brt.grouped_linear, args)
        leaves = (x.clone().requires_grad_(), offsets, weight.clone().requires_grad_(), given)
        torch.library.opcheck(torch.ops.brt.grouped_linear, (*leaves, activation))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device: torch.device, dynamic: bool) -> None:
    compiled = torch.compile(
        ops.grouped_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for case in (RouteCase(9, 4), RouteCase(12, 4, 1, "one-path"), RouteCase(6, 4, 1, "none")):
        x, offsets, weight, bias = (t.to(device) for t in inputs(case))
        for activation in ("none", "silu"):

            def run(
                function: object, *leaves: Tensor, offsets: Tensor = offsets, act: str = activation
            ) -> Tensor:
                return function(leaves[0], offsets, leaves[1], leaves[2], act)

            came = grads_of(lambda *t: run(compiled, *t), x, weight, bias)
            wanted = grads_of(lambda *t: run(ops.grouped_linear, *t), x, weight, bias)
            for a, b in zip((*came[0], *came[1]), (*wanted[0], *wanted[1]), strict=True):
                close(a, b, f"{case} {activation}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """As `nn.Linear`: in the autocast dtype, gradients in the dtype of what they are of."""
    x, offsets, weight, bias = (t.to(device) for t in inputs(RouteCase(12, 1)))

    def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return ops.grouped_linear(x, offsets, weight, bias, "relu")

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return F.relu(F.linear(x, weight[0], bias[0]))

    (came,), came_grads = grads_of(grouped, x, weight, bias)
    (wanted,), wanted_grads = grads_of(linear, x, weight, bias)
    close(came, wanted, dtype, factor=2)
    for a, b in zip(came_grads, wanted_grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        assert grouped(x, weight, bias).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh'; there are none, relu"),
        ({"x_RI": torch.zeros(4)}, r"expected x \[R, I\]"),
        ({"x_RI": torch.zeros(4, 5)}, "features of x and of weight.*got 5 and 2"),
        ({"offsets_P1": torch.zeros(3).long()}, r"offsets and paths \+ 1.*got 3 and 4"),
        ({"bias_PO": torch.zeros(3, 2)}, r"bias must be \[3, 5\], got \[3, 2\]"),
        ({"weight_POI": torch.zeros(3, 5, 2, device="meta")}, "different devices"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    args = {
        "x_RI": torch.zeros(4, 2),
        "offsets_P1": torch.tensor([0, 1, 1, 4]),
        "weight_POI": torch.zeros(3, 5, 2),
    }
    with pytest.raises(brt.RouteError, match=message):
        ops.grouped_linear(**(args | change))
