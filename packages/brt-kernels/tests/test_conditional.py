"""Conditional nodes of CUDA graphs: a captured network with exits runs what its cell needs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import brt
import brt_kernels._plugin as plugin
from brt import plugins
from brt.passes.captured import CapturedRegion
from brt.protocols import BinaryThreshold

pytestmark = pytest.mark.cuda
DIM = 16


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with plugins.using(plugin):
        yield


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


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_exits_of_one_cell_are_conditional_nodes() -> None:
    model = Exits().eval().cuda()
    fast = brt.optimize(model, passes=["capture"])
    (region,) = (m for m in fast.inserted.values() if isinstance(m, CapturedRegion))
    cells = [sure_at(i, "cuda") for i in (0, 1, 2, 1, 0, 2)]
    with torch.no_grad():
        wanted = [model(x) for x in cells]
        fast(cells[0])
        try:
            torch.cuda.set_sync_debug_mode("error")
            found = [fast(x) for x in cells]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for came, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(came, right, rtol=1e-4, atol=1e-4)
        assert region.replays == 7
        several = torch.cat(cells)
        torch.testing.assert_close(fast(several), model(several), rtol=1e-4, atol=1e-4)
        assert region.replays == 7
        other = copy.deepcopy(fast)
        torch.testing.assert_close(other(cells[1]), wanted[1], rtol=1e-4, atol=1e-4)
        for _ in range(12):  # more captures than torch has streams for
            model.heads[0].weight.mul_(1.0)
            torch.testing.assert_close(fast(cells[2]), wanted[2], rtol=1e-4, atol=1e-4)
    assert region.replays == 19


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_several_cells_go_through_exits_without_waiting() -> None:
    model = Exits().eval().cuda()
    batches = [2 * torch.randn(12, DIM, device="cuda") for _ in range(4)]
    # All leave at one exit, or none stays apart from one
    batches += [sure_at(i, "cuda").repeat(12, 1) for i in (0, 1, 2)]
    batches.append(torch.cat([sure_at(0, "cuda").repeat(11, 1), sure_at(2, "cuda")]))
    fast = brt.optimize(model, passes=["capture"], sample=batches[0], verify=False)
    (region,) = (m for m in fast.inserted.values() if isinstance(m, CapturedRegion))
    with torch.no_grad():
        wanted = [model(x) for x in batches]
        fast(batches[0])
        assert region.replays == 1, str(fast.report)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            found = [fast(x) for x in batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for came, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(came, right, rtol=1e-4, atol=1e-4)
        assert region.replays == 1 + len(batches)
        for num_cells in (2, 5, 1):
            x = batches[0][:num_cells]
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert region.replays == 4 + len(batches)
    assert len(region._graphs) == 4
