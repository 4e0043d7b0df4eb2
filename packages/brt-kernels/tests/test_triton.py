"""The kernels that Triton compiles, against the reference in double precision.

Legend: N cells, K choices of a cell, R rows, P paths, I O D H features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import SMALL_ROUTES, RouteCase, arguments

import brt
import brt_kernels._plugin as plugin
from brt import plugins, reference
from brt_kernels.triton import choice, tiles

DTYPES = [torch.float16, torch.bfloat16]
LOOSE = {torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]
LOADS = [(1,), (3, 0, 5), (7, 1, 30, 0, 2), (0, 0, 100), (200, 1, 129), (6,) * 20, (0, 0)]

cuda = pytest.mark.cuda
needs_triton = pytest.mark.skipif(not choice.installed(), reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with plugins.using(plugin):
        yield


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def on_cuda(args: tuple[object, ...]) -> list[object]:
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]


def doubled(args: tuple[object, ...]) -> list[object]:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return [
        a.cpu().double() if isinstance(a, torch.Tensor) and a.dtype in floats
        else a.cpu() if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]  # fmt: skip


def check(op: str, args: tuple[object, ...], dtype: torch.dtype) -> torch.Tensor:
    """Our kernel's result for these arguments on the GPU, once it equals the reference."""
    with brt.ops.use("brt-triton"):
        got = getattr(torch.ops.brt, op)(*on_cuda(args))
    exact = getattr(reference, op)(*doubled(args))
    rtol, atol = LOOSE[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), exact, rtol=rtol, atol=atol)
    return got


def mlp_arguments(
    case: RouteCase,
    size: tuple[int, int],
    dtype: torch.dtype,
    activation: str,
    *,
    bias: bool = True,
    weighted: bool = True,
) -> tuple[object, ...]:
    num_in, hidden = size
    cell_R, _, row_NK, offsets = reference.route(case.choices(), case.num_paths, *case.settings())
    up_rows = 2 * hidden if activation == "swiglu" else hidden
    return (
        random(case.num_cells, num_in, dtype=dtype),
        cell_R,
        row_NK,
        offsets,
        torch.rand(cell_R.shape[0]) if weighted else None,
        random(case.num_paths, up_rows, num_in, dtype=dtype, scale=num_in**-0.5),
        random(case.num_paths, up_rows, dtype=dtype) if bias else None,
        random(case.num_paths, num_in, hidden, dtype=dtype, scale=hidden**-0.5),
        random(case.num_paths, num_in, dtype=dtype) if bias else None,
        activation,
    )


def linear_arguments(
    loads: tuple[int, ...],
    size: tuple[int, int],
    dtype: torch.dtype,
    activation: str = "none",
    *,
    bias: bool = True,
    spare: int = 3,
) -> tuple[object, ...]:
    num_in, num_out = size
    return (
        random(sum(loads) + spare, num_in, dtype=dtype),
        torch.tensor((0, *loads)).cumsum(0),
        random(len(loads), num_out, num_in, dtype=dtype, scale=num_in**-0.5),
        random(len(loads), num_out, dtype=dtype) if bias else None,
        activation,
    )


@cuda
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("case", [c for c in SMALL_ROUTES if c.num_cells], ids=str)
def test_mlp_routes(case: RouteCase, activation: str, dtype: torch.dtype) -> None:
    check("expert_mlp", mlp_arguments(case, (64, 96), dtype, activation), dtype)


MANY = [
    RouteCase(16, 8, 1),
    RouteCase(60, 4, 1, "some"),
    RouteCase(80, 4, 2, "some"),
    RouteCase(150, 4, 2),
    RouteCase(900, 4, 1, "some", multiple=8),
    RouteCase(700, 4, 2, "some", dtype=torch.int32),
]


@cuda
@needs_triton
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("size", [(128, 256), (136, 392), (768, 40)], ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_mlp_loads(case: RouteCase, size: tuple[int, int], activation: str) -> None:
    args = mlp_arguments(case, size, torch.bfloat16, activation, bias=case.num_choices == 1)
    check("expert_mlp", args, torch.bfloat16)


GATED_TILES = [*tiles.GATED.values(), tiles.LARGE_GATED]
PLAIN_TILES = [*tiles.PLAIN.values(), tiles.LARGE_PLAIN]


@cuda
@needs_triton
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("tile", range(len(PLAIN_TILES)))
def test_mlp_in_every_tile(
    tile: int, num_choices: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from brt_kernels.triton import expert_mlp

    gather = tile % 2 == 0
    gated_tile = dataclasses.replace(GATED_TILES[tile % len(GATED_TILES)], gather=gather)

    def choose(*_: object, gated: bool, gathers: bool = False) -> tiles.Tile:
        return gated_tile if gated else PLAIN_TILES[tile]

    monkeypatch.setattr(expert_mlp, "choose", choose)
    case = RouteCase(1000, 5, num_choices, "some")
    args = mlp_arguments(case, (320, 776), torch.bfloat16, activation)
    check("expert_mlp", args, torch.bfloat16)


@cuda
@needs_triton
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
@pytest.mark.parametrize("num_choices", [1, 4])
def test_mlp_of_one_cell(num_choices: int, activation: str, weighted: bool) -> None:
    for size in ((64, 96), (2056, 1544)):
        args = mlp_arguments(
            RouteCase(1, 8, num_choices), size, torch.bfloat16, activation,
            bias=weighted, weighted=weighted,
        )  # fmt: skip
        check("expert_mlp", args, torch.bfloat16)


@cuda
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (40, 24), (512, 300)], ids=str)
def test_linear_loads(size: tuple[int, int], loads: tuple[int, ...], dtype: torch.dtype) -> None:
    check("grouped_linear", linear_arguments(loads, size, dtype, "gelu"), dtype)


@cuda
@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_activations(activation: str, bias: bool) -> None:
    args = linear_arguments((5, 20), (32, 40), torch.bfloat16, activation, bias=bias)
    check("grouped_linear", args, torch.bfloat16)


@cuda
@needs_triton
@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (96, 40)], ids=str)
def test_linear_of_a_transposed_weight(size: tuple[int, int], loads: tuple[int, ...]) -> None:
    x, offsets, weight, _, _ = linear_arguments(loads, size, torch.bfloat16)
    apart = weight.transpose(1, 2).contiguous().cuda().transpose(1, 2)
    with brt.ops.use("brt-triton"):
        got = brt.ops.grouped_linear(x.cuda(), offsets.cuda(), apart)
    exact = reference.grouped_linear(x.double(), offsets, weight.double())
    torch.testing.assert_close(got.cpu().double(), exact, rtol=3e-2, atol=3e-2)


@cuda
@needs_triton
def test_linear_of_half_the_columns() -> None:
    x, offsets, weight, _, _ = linear_arguments((7, 30), (64, 48), torch.bfloat16)
    wide = torch.cat([x, x], 1).cuda()
    with brt.ops.use("brt-triton"):
        got = brt.ops.grouped_linear(wide[:, 64:], offsets.cuda(), weight.cuda())
    exact = reference.grouped_linear(x.double(), offsets, weight.double())
    torch.testing.assert_close(got.cpu().double(), exact, rtol=3e-2, atol=3e-2)


@cuda
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (136, 264)], ids=str)
def test_outer(size: tuple[int, int], loads: tuple[int, ...], dtype: torch.dtype) -> None:
    x, offsets, *_ = linear_arguments(loads, size, dtype)
    y = random(x.shape[0], size[1], dtype=dtype, scale=0.1)
    check("grouped_outer", (y, x, offsets), dtype)


@cuda
@needs_triton
@pytest.mark.parametrize("num_cells", [1, 16, 300])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_a_graph_serves_other_loads(num_cells: int, num_choices: int) -> None:
    cases = [
        RouteCase(num_cells, 8, num_choices),
        RouteCase(num_cells, 8, num_choices, "one-path"),
        RouteCase(num_cells, 8, num_choices, "some"),
    ]
    calls = [mlp_arguments(c, (128, 128), torch.bfloat16, "swiglu") for c in cases]
    held = on_cuda(calls[0])
    with brt.ops.use("brt-triton"):
        torch.ops.brt.expert_mlp(*held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.ops.brt.expert_mlp(*held)
    for call in calls:
        for place, value in zip(held, call, strict=True):
            if isinstance(place, torch.Tensor):
                place.copy_(value)
        out.fill_(float("nan"))
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(first, out)  # the same from run to run
        exact = reference.expert_mlp(*doubled(call))
        torch.testing.assert_close(out.cpu().double(), exact, rtol=3e-2, atol=3e-2)


@cuda
@needs_triton
def test_gradients_equal_the_reference() -> None:
    def grads() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, up, down = (
            (0.3 * torch.randn(s)).cuda().bfloat16().requires_grad_()
            for s in ((300, 64), (4, 96, 64), (4, 64, 96))
        )
        choice_NK = torch.rand(300, 4).topk(2).indices.cuda()
        cell_R, _, row_NK, offsets = brt.ops.route(choice_NK, 4)
        out = brt.ops.expert_mlp(x, cell_R, row_NK, offsets, None, up, None, down, None, "silu")
        out.float().square().sum().backward()
        return [t.grad for t in (x, up, down)]

    with brt.ops.use("brt-triton"):
        ours = grads()
    with brt.ops.use("reference"):
        expected = grads()
    for a, b in zip(ours, expected, strict=True):
        error = (a - b).float().norm() / b.float().norm()
        assert float(error) < 2e-2


@cuda
@needs_triton
def test_it_compiles_to_one_graph() -> None:
    args = on_cuda(mlp_arguments(RouteCase(30, 4, 2), (64, 64), torch.bfloat16, "swiglu"))
    with brt.ops.use("brt-triton"):
        plain = brt.ops.expert_mlp(*args)
        compiled = torch.compile(brt.ops.expert_mlp, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(plain, compiled, rtol=0, atol=0)


@cuda
@needs_triton
def test_what_it_leaves_to_others() -> None:
    args = on_cuda(arguments(torch.device("cpu"), torch.float32)["expert_mlp"])
    assert "brt-triton" in str(brt.ops.explain("expert_mlp", *args))
    assert "float16 and bfloat16" in str(brt.ops.explain("expert_mlp", *args))
    odd = on_cuda(arguments(torch.device("cpu"), torch.bfloat16)["expert_mlp"])
    assert "multiple of 8" in str(brt.ops.explain("expert_mlp", *odd))


def test_refusals_name_their_cause() -> None:
    args = mlp_arguments(RouteCase(4, 4, 2), (64, 96), torch.float32, "relu")
    assert "float32" in choice.mlp_refuses(*args)
    x, _, weight, _, _ = linear_arguments((4, 4), (64, 32), torch.bfloat16)
    assert "one dtype" in choice._weight_refuses(x, weight.half(), None)
    assert "contiguous" in choice._weight_refuses(x, weight[:, ::2], None)
    assert "multiple of 8" in choice._weight_refuses(x, weight[:, :, :7], None)
    assert choice._weight_refuses(x, weight, None) is None
    assert choice._weight_refuses(x, weight.transpose(1, 2).contiguous().transpose(1, 2), None)


def test_tiles_follow_shapes_alone() -> None:
    for gated in (False, True):
        heights = [
            tiles.choose(rows, 64, 512, gated=gated).block_m for rows in (1, 700, 2000, 10**6)
        ]
        assert heights == sorted(heights)
    tile = tiles.choose(10**5, 8, 512, gated=False)
    assert tiles.fit_features_in(tile, 4096) is tile
    narrow = tiles.fit_features_in(dataclasses.replace(tile, block_k=128), 96)
    assert narrow.block_k == 32
