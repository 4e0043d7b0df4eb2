"""capture: regions replayed as CUDA graphs, and refused with the reason elsewhere."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brt
from brt.passes import conditional
from brt.passes.capture import Capture, CapturedRegion
from brt.passes.fusion import Fusion
from brt.protocols import BinaryThreshold, TopK

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


class Exits(nn.Module):
    """Three stages, and an exit behind each; where a cell leaves, its first feature says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(DIM, 3) for _ in range(3))
        self.exits = nn.ModuleList(
            brt.ScatterRouter(BinaryThreshold(level), 2) for level in (0.9, 0.6)
        )
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        x, grid = brt.annotate(x, 0)
        cells, left, where = grid.cells, [], []
        for stage, head, scatter in zip(self.stages, self.heads, self.exits, strict=False):
            sure = x[:, :1]
            x = stage(x) + x
            logits = torch.cat([head(x), 10 * sure], 1)
            (out, stay), route = scatter((x, logits), logits, cells)
            left.append(out[1])
            where.append(route[0])
            x, cells = stay[0], route[1]
        x = self.stages[-1](x)
        left.append(torch.cat([self.heads[-1](x), x[:, :1]], 1))
        return self.gather(left, [*where, cells])


def sure_at(exit_idx: int, device: str = "cpu") -> Tensor:
    """A cell that leaves there."""
    model = Exits().eval()
    for seed in range(2000):
        x = 2 * torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))
        if len(taken(model, x)) == exit_idx + 1:
            return x.to(device)
    raise AssertionError(exit_idx)


def taken(model: nn.Module, x: Tensor) -> list[int]:
    """The exits that a cell came to."""
    seen: list[int] = []
    handles = [
        stage.register_forward_hook(lambda m, a, o, i=i: seen.append(i) if len(o) else None)
        for i, stage in enumerate(model.stages)  # type: ignore[arg-type]
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


class _Stream:
    cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass


def test_one_cell_goes_through_nested_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    log: list[Any] = []
    begin_end = lambda flag, _: log.append(bool(flag)), lambda _: log.append("end")
    monkeypatch.setattr(conditional, "_makers", {"here": begin_end})
    model = Exits().eval()
    one = conditional.OneCell(brt.trace(model).graph, model)
    streams = [_Stream()] * one.num_levels
    with torch.no_grad():
        for exit_idx, flags in enumerate(([False], [True, False], [True, True])):
            x = sure_at(exit_idx)
            like = one.straight([x], streams)
            log.clear()
            out = one.captured([x], streams, like)
            assert log[: len(flags)] == flags
            assert log[-2:] == ["end", "end"]  # the second body is inside the first
            if exit_idx == 2:  # without a device every body runs
                torch.testing.assert_close(out, model(x))
        with pytest.raises(conditional.CannotCaptureError, match="has 2 cells"):
            one.straight([torch.randn(2, DIM)], streams)


def test_one_cell_is_copied_with_its_model() -> None:
    model = Exits().eval()
    model.__dict__["one"] = conditional.OneCell(brt.trace(model).graph, model)
    twin = copy.deepcopy(model)
    assert twin.one is not model.one
    assert twin.one._scope[0] is twin


def test_what_is_no_exit_has_no_conditional_node() -> None:
    model = Layer(result="paths").eval()
    with pytest.raises(brt.PassError, match="a plain scatter of two paths"):
        conditional.OneCell(brt.trace(model).graph, model)


@pytest.mark.cuda
def test_without_conditional_nodes_exits_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "_makers", {})
    model = Exits().eval().cuda()
    fast, x = optimised(model), sure_at(1, "cuda")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert captured_of(fast).replays == 0
