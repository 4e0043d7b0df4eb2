from __future__ import annotations

import pytest
import torch
from kernel_cases import SMALL_ROUTES, RouteCase

from brt import reference
from brt_kernels.ops.expert_mlp import expert_mlp

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}


def run(
    case: RouteCase,
    size: tuple[int, int],
    dtype: torch.dtype,
    activation: str,
    device: torch.device | str = "cpu",
    *,
    bias: bool = True,
    weighted: bool = True,
) -> None:
    made, (num_in, hidden) = torch.Generator().manual_seed(0), size
    cell_R, _, row_NK, offsets = reference.route(case.choices(), case.num_paths, *case.settings())
    up_rows = 2 * hidden if activation == "swiglu" else hidden

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=made) * scale).to(dtype)

    x = random(case.num_cells, num_in)
    weight_R = torch.rand(cell_R.shape[0], generator=made) if weighted else None
    up, down = (
        random(case.num_paths, up_rows, num_in, scale=num_in**-0.5),
        random(case.num_paths, num_in, hidden, scale=hidden**-0.5),
    )
    up_bias, down_bias = (
        (random(case.num_paths, up_rows), random(case.num_paths, num_in)) if bias else (None, None)
    )
    floats = (x, cell_R, row_NK, offsets, weight_R, up, up_bias, down, down_bias)
    got = expert_mlp(*(None if t is None else t.to(device) for t in floats), activation)
    exact = reference.expert_mlp(
        *(t.double() if t is not None and t.is_floating_point() else t for t in floats), activation
    )
    rtol, atol = LOOSE[dtype]  # the hidden features and the result are rounded to the dtype
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL_ROUTES, ids=str)
def test_cases(case: RouteCase, dtype: torch.dtype, device: torch.device) -> None:
    run(case, (32, 48), dtype, "gelu", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_activations(activation: str, dtype: torch.dtype, bias: bool, isa: str) -> None:
    run(
        RouteCase(50, 4, 2, "some", multiple=8),
        (40, 72),
        dtype,
        activation,
        bias=bias,
        weighted=bias,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (256, 512), (65, 3)], ids=str)
def test_sizes(size: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    run(RouteCase(100, 5, 3, "some"), size, dtype, "swiglu")


def test_fake_agrees_with_the_schema() -> None:
    cell_R, _, row_NK, offsets = reference.route(torch.tensor([[0], [1], [0]]), 2)
    args = (
        torch.randn(3, 4),
        cell_R,
        row_NK,
        offsets,
        None,
        torch.randn(2, 6, 4),
        None,
        torch.randn(2, 4, 6),
        None,
        "relu",
    )
    torch.library.opcheck(torch.ops.brt_kernels.expert_mlp.default, args)


def args_with(**changes: object) -> list[object]:
    cell_R, _, row_NK, offsets = reference.route(torch.tensor([[0], [1], [0]]), 2)
    fields = {
        "x": torch.zeros(3, 4),
        "cell": cell_R,
        "row": row_NK,
        "offsets": offsets,
        "weight": None,
        "up": torch.zeros(2, 6, 4),
        "up_bias": None,
        "down": torch.zeros(2, 4, 6),
        "down_bias": None,
        "act": "relu",
    }
    return list((fields | changes).values())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(3)}, "2-D"),
        ({"x": torch.zeros(3, 5)}, "up_PHD"),
        ({"cell": torch.tensor([0, 2, 3])}, "cell_R"),
        ({"row": torch.tensor([[0], [2], [3]])}, "row_NK"),
        ({"row": torch.tensor([[0], [2]])}, "each of 3 cells"),
        ({"offsets": torch.tensor([0, 2, 4])}, "got 4 at position 2"),
        ({"weight": torch.zeros(2)}, "weight_R"),
        ({"down": torch.zeros(2, 4, 5)}, "down_PDH"),
        ({"up": torch.zeros(2, 5, 4), "act": "swiglu"}, "2H rows"),
        ({"down_bias": torch.zeros(2, 5)}, "bias of down_PDH"),
        ({"act": "mish"}, "mish"),
    ],
    ids=str,
)
def test_bad_input_is_an_exception(changes: dict[str, object], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        expert_mlp(*args_with(**changes))
