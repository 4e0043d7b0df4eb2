from __future__ import annotations

import pytest
import torch

from brt import reference
from brt_kernels.ops.grouped_linear import grouped_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOADS = [(0,), (1,), (3, 0, 5), (7, 1, 30, 0, 2), (0, 0, 100), (13, 12, 14), (200,), (6,) * 20]
SIZES = [(64, 64), (1, 1), (17, 5), (33, 70), (256, 3), (1024, 31), (5, 300)]
LOOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}


def run(
    loads: tuple[int, ...],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    activation: str = "none",
    bias: bool = True,
    spare: int = 3,
) -> None:
    made, (num_in, num_out) = torch.Generator().manual_seed(0), size
    x = torch.randn(sum(loads) + spare, num_in, generator=made).to(dtype)
    weight = (torch.randn(len(loads), num_out, num_in, generator=made) / num_in**0.5).to(dtype)
    bias_PO = torch.randn(len(loads), num_out, generator=made).to(dtype) if bias else None
    offsets = torch.tensor((0, *loads)).cumsum(0)
    got = grouped_linear(
        x.to(device),
        offsets.to(device),
        weight.to(device),
        None if bias_PO is None else bias_PO.to(device),
        activation,
    )
    exact = reference.grouped_linear(
        x.double(),
        offsets,
        weight.double(),
        None if bias_PO is None else bias_PO.double(),
        activation,
    )
    rtol, atol = LOOSE[dtype]  # of the result's last place; sums run in float32
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", LOADS, ids=str)
def test_loads(loads: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    run(loads, (64, 48), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    run((7, 1, 30, 0, 2), size, dtype, bias=size[0] % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_activations(activation: str, dtype: torch.dtype, isa: str) -> None:
    run((5, 20), (32, 37), dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (40, 24), (17, 5)], ids=str)
def test_devices(
    size: tuple[int, int], loads: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    run(loads, size, dtype, device, "gelu")


def test_transposed_weight(device: torch.device) -> None:
    x, weight, offsets = torch.randn(9, 16), torch.randn(2, 16, 8), torch.tensor([0, 4, 9])
    got = grouped_linear(x.to(device), offsets.to(device), weight.to(device).transpose(1, 2))
    torch.testing.assert_close(
        got.cpu(), reference.grouped_linear(x, offsets, weight.transpose(1, 2))
    )


def test_int32_offsets_and_no_rows_before_the_first() -> None:
    x, weight = torch.randn(9, 16), torch.randn(2, 8, 16)
    got = grouped_linear(x, torch.tensor([2, 4, 7], dtype=torch.int32), weight)
    expected = torch.cat(
        [torch.zeros(2, 8), x[2:4] @ weight[0].t(), x[4:7] @ weight[1].t(), torch.zeros(2, 8)]
    )
    torch.testing.assert_close(got, expected)


def test_fake_agrees_with_the_schema() -> None:
    args = (
        torch.randn(9, 16),
        torch.tensor([0, 4, 9]),
        torch.randn(2, 8, 16),
        torch.randn(2, 8),
        "relu",
    )
    torch.library.opcheck(torch.ops.brt_kernels.grouped_linear.default, args)


X, W, OFFSETS = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((X[0], OFFSETS, W), "2-D"),
        ((X.double(), OFFSETS, W), "float64"),
        ((X, OFFSETS.float(), W), "int32 or int64"),
        ((X, OFFSETS[:0], W), "at least one"),
        ((X, OFFSETS[1:], W), r"\[1, out, 3\]"),
        ((X, OFFSETS, W.half()), "float32 as x"),
        ((X, OFFSETS, W, torch.zeros(2, 4)), "bias"),
        ((X, OFFSETS, W, torch.zeros(2, 5).half()), "bias"),
        ((X, OFFSETS, W, None, "tanh"), "tanh"),
        ((X, torch.tensor([0, 3, 2]), W), "got 2 at position 2"),
        ((X, torch.tensor([0, 3, 5]), W), "got 5 at position 2"),
        ((X, torch.tensor([-1, 3, 4]), W), "got -1 at position 0"),
    ],
)
def test_bad_input_is_an_exception(args: tuple[object, ...], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        grouped_linear(*args)
