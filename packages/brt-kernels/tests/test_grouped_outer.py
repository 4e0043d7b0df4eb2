from __future__ import annotations

import pytest
import torch

from brt import reference
from brt_kernels.ops.grouped_linear import grouped_linear
from brt_kernels.ops.grouped_outer import grouped_outer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOADS = [(0,), (1,), (3, 0, 5), (7, 1, 30, 0, 2), (0, 0, 100), (600,)]
SIZES = [(64, 64), (1, 1), (17, 5), (33, 70), (600, 3), (3, 300)]
LOOSE = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}


def run(
    loads: tuple[int, ...],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    made, (num_out, num_in) = torch.Generator().manual_seed(0), size
    y = torch.randn(sum(loads) + 3, num_out, generator=made).to(dtype)
    x = torch.randn(sum(loads) + 3, num_in, generator=made).to(dtype)
    offsets = torch.tensor((0, *loads)).cumsum(0)
    got = grouped_outer(y.to(device), x.to(device), offsets.to(device))
    assert got.dtype == dtype
    exact = reference.grouped_outer(y.double(), x.double(), offsets)
    rtol, atol = LOOSE[dtype]
    torch.testing.assert_close(got.cpu().double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    run((7, 1, 30, 0, 2), size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", LOADS, ids=str)
def test_loads(loads: tuple[int, ...], dtype: torch.dtype) -> None:
    run(loads, (40, 72), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", [*LOADS, (65, 64, 0, 33, 1, 0)], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (8, 8), (128, 136), (264, 24), (1, 129)], ids=str)
def test_on_cuda(size: tuple[int, int], loads: tuple[int, ...], dtype: torch.dtype) -> None:
    run(loads, size, dtype, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_each_run_is_the_same(dtype: torch.dtype) -> None:
    y, x = (torch.randn(3000, n, device="cuda").to(dtype) for n in (256, 200))
    offsets = torch.tensor([0, 1900, 1900, 2500, 2990], device="cuda")
    first = grouped_outer(y, x, offsets)
    for _ in range(5):
        torch.empty_like(first).fill_(torch.nan)  # memory that the next result may get
        assert torch.equal(grouped_outer(y, x, offsets), first)
    assert not first[1].any()
    exact = reference.grouped_outer(y.double(), x.double(), offsets)
    error = (first.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.cuda
def test_on_cuda_rows_need_not_be_contiguous() -> None:
    y, x = torch.randn(64, 100, device="cuda").t(), torch.randn(100, 64, device="cuda")[:, ::2]
    offsets = torch.tensor([3, 50, 100], device="cuda", dtype=torch.int32)
    torch.testing.assert_close(
        grouped_outer(y, x, offsets), reference.grouped_outer(y, x, offsets), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transposed_weights_of_the_linear_layer(
    size: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    num_in, num_out = size
    x, weight = (
        torch.randn(43, num_in).to(dtype),
        (torch.randn(3, num_in, num_out) / num_in**0.5).to(dtype),
    )
    offsets = torch.tensor([2, 20, 20, 40])
    got = grouped_linear(x, offsets, weight.transpose(1, 2))
    expected = grouped_linear(x, offsets, weight.transpose(1, 2).contiguous())
    rtol, atol = LOOSE[dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def test_fake_agrees_with_the_schema() -> None:
    args = (torch.randn(9, 16), torch.randn(9, 8), torch.tensor([0, 4, 9]))
    torch.library.opcheck(torch.ops.brt_kernels.grouped_outer.default, args)


def test_bad_input_is_an_exception() -> None:
    offsets = torch.tensor([0, 2])
    for args, match in (
        ((torch.zeros(2, 3), torch.zeros(3, 3), offsets), "equal rows"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).half(), offsets), "float16 as x"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), offsets + 1), "got 3 at position 1"),
    ):
        with pytest.raises(RuntimeError, match=match):
            grouped_outer(*args)


@pytest.mark.parametrize("features", [(63, 301), (130, 257), (700, 401)])
def test_paths_without_rows_are_zero_where_memory_was_used(features: tuple[int, int]) -> None:
    """Their zeros are pages given back to the system: edges between pages are written."""
    offsets_P1 = torch.tensor([0, 0, 0, 3, 3, 5, 5, 5, 5])
    y_RO, x_RI = torch.randn(5, features[0]), torch.randn(5, features[1])
    for _ in range(3):
        used = torch.full((8, *features), 7.0)  # the allocator gives this memory again
        del used
        made_POI = torch.ops.brt_kernels.grouped_outer(y_RO, x_RI, offsets_P1)
        torch.testing.assert_close(made_POI[2], y_RO[:3].T @ x_RI[:3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made_POI[4], y_RO[3:].T @ x_RI[3:], rtol=1e-4, atol=1e-4)
        for path in (0, 1, 3, 5, 6, 7):
            assert made_POI[path].count_nonzero() == 0
