"""brt.ops.conv_chain as these kernels run it: which is chosen, and when weights are packed anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import brt
import brt_kernels._plugin as plugin
from brt import plugins
from brt.conv_steps import ConvStep, flatten_branches

BRANCHES = [
    [
        ConvStep(0, 1, 0, 1, act=1),
        ConvStep(1, 2, 2, add=0, scale=0.5),
        ConvStep(2, 3, 3, shuffle=2),
    ],
    [ConvStep(0, 1, 2, 1, post=True), ConvStep(1, 2, 3, shuffle=2)],
]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with plugins.using(plugin):
        yield


def parameters(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((6, 6, 3, 3), (6,), (6, 6, 3, 3), (12, 6, 1, 1))
    return [(torch.randn(shape) * 0.2).to(device, dtype) for shape in shapes]


def expected(x: Tensor, offsets: Tensor, params: list[Tensor]) -> Tensor:
    with brt.ops.use("reference"):
        return brt.ops.conv_chain(x.float(), offsets, [p.float() for p in params], BRANCHES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_brt_runs_it(dtype: torch.dtype, device: torch.device) -> None:
    x, offsets = torch.randn(5, 6, 9, 17).to(device, dtype), torch.tensor([0, 2, 4], device=device)
    params = parameters(device, dtype)
    steps, scales, step_offsets = flatten_branches(BRANCHES)
    explained = brt.ops.explain("conv_chain", x, offsets, params, steps, step_offsets, scales)
    assert explained.chosen == "brt-kernels", str(explained)
    loose = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    with torch.backends.cudnn.flags(allow_tf32=False):
        right = expected(x, offsets, params)
    got = brt.ops.conv_chain(x, offsets, params, BRANCHES)
    torch.testing.assert_close(got.float(), right, **loose)


def test_a_changed_parameter_or_size_is_packed_anew(device: torch.device) -> None:
    params = parameters(device, torch.float32)
    offsets = torch.tensor([0, 1, 3], device=device)
    for size in ((8, 8), (8, 8), (4, 20)):
        x = torch.randn(3, 6, *size, device=device)
        got = brt.ops.conv_chain(x, offsets, params, BRANCHES)
        with torch.backends.cudnn.flags(allow_tf32=False):
            right = expected(x, offsets, params)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
        params[2].mul_(-1.5)


@pytest.mark.cuda
def test_a_captured_graph_outlives_the_cache() -> None:
    device = torch.device("cuda")
    params = parameters(device, torch.float32)
    x, offsets = torch.randn(3, 6, 8, 8, device=device), torch.tensor([0, 1, 3], device=device)
    before = brt.ops.conv_chain(x, offsets, params, BRANCHES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = brt.ops.conv_chain(x, offsets, params, BRANCHES)
    plugin._planned_chains.clear()
    held = [torch.full((1 << 16,), torch.nan, device=device) for _ in range(64)]
    got.fill_(torch.nan)
    graph.replay()
    assert torch.equal(got, before)
    del held


@pytest.mark.cuda
def test_what_is_left_to_others() -> None:
    def why(x: Tensor, params: list[Tensor]) -> str:
        steps, scales, step_offsets = flatten_branches([[ConvStep(0, 1, 0)]])
        offsets = torch.tensor([0, 1], device="cuda")
        explained = brt.ops.explain("conv_chain", x, offsets, params, steps, step_offsets, scales)
        assert explained.chosen != "brt-kernels"
        return str(explained)

    wide = torch.zeros(4, 300, 1, 1, device="cuda")
    assert "256 channels" in why(torch.zeros(1, 300, 4, 4, device="cuda"), [wide])
    assert "4096 pixels" in why(torch.zeros(1, 300, 65, 64, device="cuda"), [wide])
    assert "one dtype" in why(torch.zeros(1, 4, 4, 4, device="cuda").half(), [wide[:, :4]])
