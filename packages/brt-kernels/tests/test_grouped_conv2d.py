from __future__ import annotations

import pytest
import torch
from convs import Call, PathCase, call_of, depthwise
from torch import Tensor

from brt_kernels.ops.grouped_conv2d import grouped_conv2d

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}
ACTIVATIONS = ["none", "relu", "prelu", "sigmoid", "silu"]

MIXED = [
    PathCase(3, 8, (16, 16), 16, residual=True),
    PathCase(0, 4, (5, 5), 4, residual=True),
    PathCase(2, 3, (9, 7), 20, kernel=1, padding=0),
    depthwise(2, 12, (10, 11), stride=2),
    PathCase(1, 16, (8, 8), 9, stride=2, bias=False, one_slope=True),
]
SINGLE = [
    PathCase(1, 1, (1, 1), 1, kernel=1, padding=0),
    PathCase(1, 3, (1, 1), 5),
    PathCase(70, 5, (1, 1), 7, kernel=1, padding=0),
    PathCase(9, 4, (2, 3), 6),
    PathCase(2, 8, (32, 32), 8, residual=True),
    PathCase(1, 20, (33, 17), 23, bias=False),
    PathCase(2, 7, (5, 64), 3, stride=2),
    PathCase(2, 6, (31, 35), 10, stride=2, padding=0),
    PathCase(2, 6, (12, 34), 10, kernel=1, stride=2, padding=0),
    PathCase(3, 16, (14, 14), 33, kernel=1, padding=0, residual=True),
    PathCase(2, 4, (11, 13), 6, kernel=5, padding=2),
    PathCase(1, 3, (23, 21), 8, kernel=7, stride=2, padding=3),
    PathCase(1, 2, (9, 9), 4, kernel=4, stride=3, padding=3),
    PathCase(2, 8, (7, 9), 12, groups=4),
    PathCase(2, 6, (6, 6), 18, groups=3, stride=2),
    PathCase(2, 32, (9, 9), 64, groups=2, residual=True),
    depthwise(4, 5, (7, 7)),
    depthwise(1, 16, (56, 40)),
    depthwise(2, 3, (18, 70), kernel=5, padding=2),
    PathCase(2, 4, (15, 15), 8, groups=4, stride=2),
    PathCase(1, 64, (20, 50), 70),
    PathCase(1, 2, (3, 700), 2),
]


def check(call: Call, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    call = call.mapped(lambda t: t.to(dtype))
    got = grouped_conv2d(*call.mapped(lambda t: t.to(device)).args())
    rtol, atol = LOOSE[dtype]  # of the result's last place; sums run in float32
    for p, (y, exact) in enumerate(zip(got, call.mapped(Tensor.double).plain(), strict=True)):
        assert y.dtype == dtype
        assert y.is_contiguous()
        torch.testing.assert_close(
            y.cpu().double(), exact, rtol=rtol, atol=atol, msg=lambda m, p=p: f"path {p}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_one_path(case: PathCase, dtype: torch.dtype, isa: str) -> None:
    check(call_of([case], "relu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_paths_of_different_sizes(activation: str, dtype: torch.dtype, isa: str) -> None:
    check(call_of(MIXED, activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_one_path_on_devices(case: PathCase, dtype: torch.dtype, device: torch.device) -> None:
    check(call_of([case], "silu"), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_paths_on_devices(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    check(call_of(MIXED + SINGLE + MIXED, activation), dtype, device)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_share_pieces(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        check(call_of([*MIXED, PathCase(1, 8, (90, 64), 8), depthwise(600, 4, (3, 3))]), DTYPES[0])
    finally:
        torch.set_num_threads(before)


def test_no_rows_at_all(device: torch.device) -> None:
    call = call_of([PathCase(0, 4, (5, 6), 3, stride=2), depthwise(0, 2, (4, 4))], "silu")
    made = grouped_conv2d(*call.mapped(lambda t: t.to(device)).args())
    assert [tuple(y.shape) for y in made] == [(0, 3, 3, 3), (0, 2, 4, 4)]


@pytest.mark.parametrize("case", [SINGLE[4], SINGLE[5], SINGLE[17]], ids=str)
def test_other_layouts(case: PathCase, device: torch.device) -> None:
    call = call_of([case], "relu").mapped(lambda t: t.to(device))
    wanted = grouped_conv2d(*call.args())
    spread = call.mapped(lambda t: torch.stack([t, t], -1)[..., 0])
    last = call.mapped(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t)
    for other in (spread, last):
        for a, b in zip(grouped_conv2d(*other.args()), wanted, strict=True):
            assert torch.equal(a, b)


def test_nothing_past_the_tensors_is_read(device: torch.device) -> None:
    """Values around every tensor are NaN: one that is read shows in the result."""

    def surrounded(t: Tensor) -> Tensor:
        room = t.new_full((t.numel() + 128,), torch.nan)
        room[64 : 64 + t.numel()] = t.flatten()
        return room[64 : 64 + t.numel()].view(t.shape)

    call = call_of([*MIXED, *SINGLE], "relu").mapped(lambda t: t.to(device))
    for a, b in zip(
        grouped_conv2d(*call.mapped(surrounded).args()), grouped_conv2d(*call.args()), strict=True
    ):
        assert torch.equal(a, b)


def test_nan_and_infinity_go_through() -> None:
    call = call_of([PathCase(1, 1, (4, 40), 1, kernel=1, padding=0, bias=False)], "relu")
    call.weight_P[0].fill_(1)
    call.x_P[0][0, 0, 0, 0], call.x_P[0][0, 0, 3, 39] = torch.nan, torch.inf
    (y,) = grouped_conv2d(*call.args())
    assert y[0, 0, 0, 0].isnan()
    assert y[0, 0, 3, 39] == torch.inf
    assert int(y.isnan().sum()) == 1


def test_many_paths(device: torch.device) -> None:
    """More than one launch of the CUDA kernel describes."""
    cases = [PathCase(1 + p % 3, 3 + p % 5, (4, 5 + p % 7), 2 + p % 9) for p in range(100)]
    check(call_of(cases, "prelu"), torch.float32, device)
    check(call_of(cases, "prelu"), torch.bfloat16, device)


@pytest.mark.cuda
def test_capture_and_replay_with_other_values() -> None:
    call = call_of(MIXED, "silu").mapped(lambda t: t.cuda().half())
    grouped_conv2d(*call.args())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = grouped_conv2d(*call.args())
    for x in call.x_P:
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(made, grouped_conv2d(*call.args()), strict=True):
        assert torch.equal(a, b)


def test_fake_agrees_with_the_schema() -> None:
    torch.library.opcheck(
        torch.ops.brt_kernels.grouped_conv2d.default, call_of(MIXED, "prelu").args()
    )


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
SIX = torch.zeros(6)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (([X[0]], [W], [], [-1, -1, -1, 1, 1, 1]), r"must be \[R, C, H, W\], got \[4, 5, 5\]"),
        (([X], [W[0]], [], [-1, -1, -1, 1, 1, 1]), r"must be \[O, C / groups, k, k\], got \[4, 3"),
        (([X], [W[..., :2]], [], [-1, -1, -1, 1, 1, 1]), r"k, k\], got \[6, 4, 3, 2\]"),
        (([X.double()], [W], [], [-1, -1, -1, 1, 1, 1]), "float64"),
        (([X], [W.half()], [], [-1, -1, -1, 1, 1, 1]), "must be float32 as the first x, got fl"),
        (([X, X.half()], [W, W], [], [-1, -1, -1, 1, 1, 1] * 2), "x of path 1 must be float32"),
        (([X], [W, W], [], [-1, -1, -1, 1, 1, 1]), "at least one path, got 1, 2 and 6"),
        (([X], [W], [], [-1, -1, -1, 1, 1]), "at least one path, got 1, 1 and 5"),
        (([X], [W[:, :3]], [], [-1, -1, -1, 1, 1, 1]), r"takes 3 \* 1 channels, x has 4"),
        (([X], [W], [], [-1, -1, -1, 1, 1, 4]), "4 groups do not divide 4 channels in and 6 out"),
        (([X], [W], [], [-1, -1, -1, 0, 1, 1]), "got 0, 1 and 1"),
        (([X], [W], [], [-1, -1, -1, 1, 3, 1]), "padding from 0 to 2, got 1, 1 and 3"),
        (([X], [W], [], [-1, -1, -1, 1, 1, 0]), "got 1, 0 and 1"),
        (([X[..., :2]], [W], [], [-1, -1, -1, 1, 0, 1]), "kernel of 3 with padding 0 is larger"),
        (([X], [W], [], [0, -1, -1, 1, 1, 1]), "bias of path 0 is tensor 0 of 0"),
        (([X], [W], [SIX[:5]], [0, -1, -1, 1, 1, 1]), r"bias of path 0 must be \[6\], got \[5\]"),
        (([X], [W], [SIX.half()], [0, -1, -1, 1, 1, 1]), "bias of path 0 must be float32"),
        (([X], [W], [X], [-1, 0, -1, 1, 1, 1]), r"must be \[2, 6, 5, 5\], got \[2, 4, 5, 5\]"),
        (([X], [W], [], [-1, -1, -1, 1, 1, 1], "prelu"), r"must be \[1\] or \[6\], got none"),
        (([X], [W], [SIX[:2]], [-1, -1, 0, 1, 1, 1], "prelu"), r"or \[6\], got \[2\]"),
        (([X], [W], [], [-1, -1, -1, 1, 1, 1], "gelu"), "got gelu"),
    ],
    ids=str,
)
def test_bad_input_is_an_exception(args: tuple[object, ...], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        grouped_conv2d(*args, *(() if len(args) == 5 else ("none",)))
