"""capture: regions replayed as CUDA graphs, and refused with the reason elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brt
from brt.passes.capture import Capture, CapturedRegion
from brt.passes.fusion import Fusion
from brt.protocols import TopK

DIM = 16
BF16 = torch.bfloat16  # of which torch has a grouped product that reads no offsets on the host
CLOSE = {"rtol": 3e-2, "atol": 3e-2}


@pytest.fixture(autouse=True)
def _fusing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fusion, "_measure", lambda self, graph, ctx: True)


class Layer(nn.Module):
    def __init__(self, num_paths: int = 4, result: Any = "packed") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True))
        self.gate = nn.Linear(DIM, num_paths)
        self.scatter = brt.ScatterRouter(TopK(2), num_paths, result=result)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM))
            for _ in range(num_paths)
        )
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows, route = self.scatter(x, self.gate(x).softmax(-1))
        if self.scatter.result == "packed":
            return self.gather(brt.grouped(list(self.experts), rows, route), route)
        return self.gather([e(r) for e, r in zip(self.experts, rows, strict=True)], route)


def optimised(model: nn.Module, *before: str) -> Any:
    return brt.optimize(model, passes=[*before, Capture(most_shapes=2)])


def captured_of(fast: Any) -> CapturedRegion:
    (region,) = (m for m in fast.inserted.values() if isinstance(m, CapturedRegion))
    return region


def test_refusals() -> None:
    with pytest.warns(brt.PluginWarning, match="the region is on cpu"):
        fast = optimised(Layer().eval())
    x = torch.randn(5, DIM)
    assert not fast.inserted
    torch.testing.assert_close(fast(x), fast(x))
    with pytest.raises(brt.PassError, match="at least 1, got 0"):
        Capture(most_shapes=0)


@pytest.mark.cuda
def test_equal_with_other_loads_and_shapes() -> None:
    model = Layer().eval().cuda().to(BF16)
    fast = optimised(model)
    region = captured_of(fast)
    with torch.no_grad():
        for num_cells in (33, 33, 7, 33, 64, 1, 33):
            x = torch.randn(num_cells, DIM, device="cuda", dtype=BF16)
            kept = x.clone()
            torch.testing.assert_close(fast(x), model(x), **CLOSE)
            assert torch.equal(x, kept)
        one = torch.randn(1, DIM, device="cuda", dtype=BF16).expand(33, DIM).contiguous()
        torch.testing.assert_close(fast(one), model(one), **CLOSE)
    assert region.replays >= 7
    assert len(region._graphs) <= 2


@pytest.mark.cuda
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_do_not_alias(mode: Any) -> None:
    model = Layer().eval().cuda().to(BF16)
    fast = optimised(model)
    first, second = torch.randn(2, 9, DIM, device="cuda", dtype=BF16)
    with mode():
        a = fast(first)
        kept = a.clone()
        b = fast(second)
    assert torch.equal(a, kept)
    assert a.data_ptr() != b.data_ptr()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_after_the_fusing_passes_nothing_waits_for_the_device() -> None:
    model = Layer(result="paths").eval().cuda().to(BF16)
    with pytest.warns(brt.PluginWarning, match="the host must read"):
        optimised(model)
    fast = optimised(model, "fuse-horizontal")
    x = torch.randn(40, DIM, device="cuda", dtype=BF16)
    with torch.no_grad():
        wanted = model(x)
        fast(x)
        try:
            torch.cuda.set_sync_debug_mode("error")
            came = fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(came, wanted, **CLOSE)


@pytest.mark.cuda
def test_weights_that_change_are_seen() -> None:
    model = Layer(result="paths").eval().cuda().to(BF16)
    fast = optimised(model, "fuse-horizontal")
    x = torch.randn(9, DIM, device="cuda", dtype=BF16)
    with torch.no_grad():
        before = fast(x)
        model.experts[1][0].weight.mul_(3)  # stacked by fuse-horizontal, outside of the graph
        torch.testing.assert_close(fast(x), model(x), **CLOSE)
        assert not torch.allclose(fast(x), before)
        other = copy.deepcopy(fast)
        torch.testing.assert_close(other(x), fast(x), **CLOSE)
        model.load_state_dict(Layer(result="paths").state_dict())
        torch.testing.assert_close(fast(x), model(x), **CLOSE)


@pytest.mark.cuda
def test_gradients_and_other_captures_run_the_region() -> None:
    model = Layer().eval().cuda().to(BF16)
    fast = optimised(model)
    x = torch.randn(9, DIM, device="cuda", dtype=BF16)
    fast(x).sum().backward()
    assert model.gate.weight.grad is not None
    assert captured_of(fast).replays == 0
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        graph.replay()
        torch.testing.assert_close(out, model(x), **CLOSE)


@pytest.mark.cuda
def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    model = Layer().eval().cuda().double()  # the reference reads the loads on the host
    fast = optimised(model)
    x = torch.randn(9, DIM, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        with pytest.warns(brt.PluginWarning, match="runs without a CUDA graph"):
            torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(x), model(x))  # and says so once
    assert captured_of(fast).replays == 0
