"""Bad indices on CUDA: left out, told at the next check, and nothing else is wrong.

Legend: N cells, R rows, P paths, D features.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import brt
import brt_kernels._plugin as plugin
from brt import KernelError, checks, plugins
from brt_kernels.triton import choice

pytestmark = pytest.mark.cuda
needs_triton = pytest.mark.skipif(not choice.installed(), reason="Triton is not installed")
KERNELS = [plugin.NAME, pytest.param(plugin.TRITON_NAME, marks=needs_triton)]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    told()
    with plugins.using(plugin), brt.ops.use(plugin.NAME):
        brt.ops.compact(torch.zeros(1, dtype=torch.bool, device="cuda"))  # loads the plugin
        yield
    told()


def told() -> str:
    """What the kernels told since the last call."""
    if not torch.cuda.is_available():
        return ""
    return str(torch.ops.brt_kernels.device_error(torch.cuda.current_device(), True))


def index(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda")


@pytest.mark.parametrize("bad", [5, 2**40, -2, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [8, 7])
def test_dispatch(width: int, weighted: bool, bad: int) -> None:
    x_ND, cell_R = torch.randn(5, width, device="cuda"), index(4, -1, bad, 0)
    row_NK = torch.full((5, 1), -1, device="cuda")
    weight_R = torch.rand(4, device="cuda") if weighted else None
    got = brt.ops.dispatch(x_ND, cell_R, row_NK, weight_R)
    with pytest.raises(KernelError) as caught:
        brt.check()
    message = rf"dispatch: cell_R must be in [-1, 5), got {bad} at position 2 (on cuda:0)"
    assert str(caught.value) == message
    expected = x_ND[[4, 0, 0, 0]] * index(1, 0, 0, 1)[:, None]
    if weight_R is not None:
        expected = expected * weight_R[:, None]
    assert torch.equal(got, expected)
    brt.check()


@pytest.mark.parametrize("bad", [4, 2**40, -2])
@pytest.mark.parametrize("width", [8, 7])
def test_combine(width: int, bad: int) -> None:
    rows_RD = torch.randn(4, width, device="cuda")
    row_NK = torch.tensor([[0, 1], [bad, 2], [-1, 3]], device="cuda")
    got = brt.ops.combine(rows_RD, row_NK, index(0, 0, 1, 2))
    with pytest.raises(
        KernelError, match=rf"combine: row_NK must be in \[-1, 4\), got {bad} at po"
    ):
        brt.check("cuda")
    torch.testing.assert_close(got, torch.stack([rows_RD[0] + rows_RD[1], rows_RD[2], rows_RD[3]]))


@pytest.mark.parametrize("bad", [3, -9])
def test_row_dot(bad: int) -> None:
    rows_RD, cells_ND = (torch.randn(n, 33, device="cuda") for n in (2, 3))
    got = brt.ops.row_dot(rows_RD, cells_ND, index(bad, 2), torch.full((3, 1), -1, device="cuda"))
    assert told() == f"row_dot: cell_R must be in [-1, 3), got {bad} at position 0"
    torch.testing.assert_close(got[1], rows_RD[1] @ cells_ND[2], rtol=1e-4, atol=1e-4)
    assert got[0] == 0


@pytest.mark.parametrize("limits", [None, [9]])
def test_route(limits: list[int] | None) -> None:
    choice_NK = torch.tensor([[0, 2], [3, 1], [-1, 0]], device="cuda")
    got = brt.ops.route(choice_NK, 3, limits)
    assert told() == "route: choice_NK must be in [-1, 3), got 3 at position 2"
    choice_NK[1, 0] = -1
    for a, b in zip(got, brt.ops.route(choice_NK, 3, limits), strict=True):
        assert torch.equal(a, b)
    assert told() == ""


@pytest.mark.parametrize(
    ("offsets", "value", "position"),
    [((0, 3, 2, 9), 2, 2), ((0, 3, 5, 10), 10, 3), ((-1, 3, 5, 9), -1, 0)],
)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets(
    offsets: tuple[int, ...], value: int, position: int, dtype: torch.dtype, kernel: str
) -> None:
    if kernel == plugin.TRITON_NAME and dtype == torch.float32:
        pytest.skip("Triton's kernels are for halves")
    x, y = (torch.randn(9, n, device="cuda").to(dtype) for n in (16, 24))
    weight = torch.randn(3, 24, 16, device="cuda").to(dtype)
    tail = f" must rise from 0 to at most 9, got {value} at position {position}"
    with brt.ops.use(kernel):
        torch.ops.brt.grouped_linear(x, index(*offsets), weight, None, "none")
        assert told() == "grouped_linear: offsets_P1" + tail
        outer = torch.ops.brt.grouped_outer(y, x, index(*offsets))
    assert told() == "grouped_outer: offsets_P1" + tail
    begin, end = max(offsets[0], 0), offsets[1]
    expected = y[begin:end].double().t() @ x[begin:end].double()
    loose = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(outer[0].double(), expected, rtol=loose, atol=loose)


@needs_triton
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("num_cells", [1, 16, 600])
def test_expert_mlp_in_triton(num_cells: int, num_choices: int, activation: str) -> None:
    up_rows = 32 if activation == "swiglu" else 16
    x_ND, up, down = (
        torch.randn(shape, device="cuda").bfloat16()
        for shape in ((num_cells, 16), (3, up_rows, 16), (3, 16, 16))
    )
    choice_NK = torch.rand(num_cells, 3, device="cuda").topk(num_choices).indices
    cell_R, _, row_NK, offsets_P1 = brt.ops.route(choice_NK, 3)
    num_rows, last = cell_R.shape[0], num_cells - 1

    def run(cell: Tensor, row: Tensor, offsets: Tensor) -> Tensor:
        args = (x_ND, cell, row, offsets, None, up, None, down, None, activation)
        with brt.ops.use(plugin.TRITON_NAME):
            return torch.ops.brt.expert_mlp(*args)

    def but(good: Tensor, position: int, bad: int) -> Tensor:
        return good.flatten().scatter(0, index(position), bad).view(good.shape)

    expected = run(cell_R, row_NK, offsets_P1)
    assert told() == ""
    for bad in (num_cells, -2):
        run(but(cell_R, num_rows - 1, bad), row_NK, offsets_P1)
        tail = f"cell_R must be in [-1, {num_cells}), got {bad} at position {num_rows - 1}"
        assert told() in (f"expert_mlp: {tail}", f"dispatch: {tail}")
    for bad in (num_rows, -2, 2**40):
        got = run(cell_R, but(row_NK, last * num_choices, bad), offsets_P1)
        tail = f"row_NK must be in [-1, {num_rows}), got {bad} at position {last * num_choices}"
        assert told() in (f"expert_mlp: {tail}", f"combine: {tail}")
        assert torch.equal(got[:last], expected[:last])
    for position, bad in ((3, num_rows + 1), (0, -1)):
        run(cell_R, row_NK, but(offsets_P1, position, bad))
        tail = f"must rise from 0 to at most {num_rows}, got {bad} at position {position}"
        assert told() == f"expert_mlp: offsets_P1 {tail}"
    assert torch.equal(run(cell_R, row_NK, offsets_P1), expected)
    assert told() == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_mlp(dtype: torch.dtype) -> None:
    x_ND = torch.randn(4, 16, device="cuda").to(dtype)
    up, down = torch.randn(2, 2, 16, 16, device="cuda").to(dtype).unbind()
    good = (index(0, 1, 2, 3), index(0, 1, 2, 3)[:, None], index(0, 2, 4))

    def run(cell_R: Tensor, row_NK: Tensor, offsets_P1: Tensor) -> Tensor:
        return torch.ops.brt_kernels.expert_mlp(
            x_ND, cell_R, row_NK, offsets_P1, None, up, None, down, None, "relu"
        )

    expected = run(*good)
    assert told() == ""
    got = run(index(0, 1, 7, 3), *good[1:])
    assert told() == "expert_mlp: cell_R must be in [-1, 4), got 7 at position 2"
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])
    assert not got[2].any()
    got = run(good[0], index(0, 1, 2, 4)[:, None], good[2])
    assert told() == "expert_mlp: row_NK must be in [-1, 4), got 4 at position 3"
    assert torch.equal(got[:3], expected[:3])
    run(good[0], good[1], index(0, 2, 5))
    assert told() == "expert_mlp: offsets_P1 must rise from 0 to at most 4, got 5 at position 2"


def test_the_first_is_kept_until_it_is_told() -> None:
    x_ND, row_NK = torch.randn(2, 4, device="cuda"), index(-1, -1)[:, None]
    for bad in (7, 8, 9):
        brt.ops.dispatch(x_ND, index(bad), row_NK)
        torch.cuda.synchronize()
    assert told() == "dispatch: cell_R must be in [-1, 2), got 7 at position 0"
    assert told() == ""


def test_one_of_many_is_told_whole() -> None:
    x_ND = torch.randn(2, 4, device="cuda")
    cell_R = torch.arange(10_000, 110_000, device="cuda")
    brt.ops.dispatch(x_ND, cell_R, index(-1, -1)[:, None])
    words = told().split()
    assert int(words[-4]) == 10_000 + int(words[-1])


def test_a_read_of_the_loads_raises_it() -> None:
    brt.ops.dispatch(torch.randn(2, 4, device="cuda"), index(5), index(-1, -1)[:, None])
    with pytest.raises(KernelError, match=r"dispatch: cell_R .* got 5 at position 0"):
        brt.ops.path_sizes(index(0, 1))
    assert brt.ops.path_sizes(index(0, 1)) == (1,)


def test_at_once_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MODE", "sync")
    with pytest.raises(KernelError, match="got 5 at position 0"):
        brt.ops.dispatch(torch.randn(2, 4, device="cuda"), index(5), index(-1, -1)[:, None])


def test_off_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MODE", "off")
    brt.ops.dispatch(torch.randn(2, 4, device="cuda"), index(5), index(-1, -1)[:, None])
    brt.check()
    assert "got 5" in told()


def test_a_replay_tells_again() -> None:
    x_ND, cell_R, row_NK = torch.randn(2, 4, device="cuda"), index(0), index(-1, -1)[:, None]
    brt.ops.dispatch(x_ND, cell_R, row_NK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        brt.ops.dispatch(x_ND, cell_R, row_NK)
    graph.replay()
    brt.check()
    for bad in (3, 4):
        cell_R.fill_(bad)
        graph.replay()
        with pytest.raises(KernelError, match=f"got {bad} at position 0"):
            brt.check()


def test_the_first_kernel_of_a_process_may_be_captured() -> None:
    code = """
import torch
from brt_kernels._load import load
load()
x, cell, row = torch.randn(2, 4).cuda(), torch.tensor([9]).cuda(), torch.full((2, 1), -1).cuda()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    torch.ops.brt_kernels.dispatch(x, cell, row)
print(repr(torch.ops.brt_kernels.device_error(0, True)))
graph.replay()
print(torch.ops.brt_kernels.device_error(0, True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "''",
        "dispatch: cell_R must be in [-1, 2), got 9 at position 0",
    ]
