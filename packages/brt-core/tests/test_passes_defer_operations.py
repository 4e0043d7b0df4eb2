"""defer-operations: what only continuing cells need comes behind the exit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exit_models import check_everywhere, check_gradients, conv_exits, images
from torch import Tensor, nn

import brt
from brt.passes import DeferOperations
from brt.protocols import TopK
from brt.testing import check_pass


def optimised(model: nn.Module, sample: Any) -> Any:
    return brt.optimize(model, passes=[DeferOperations()], sample=sample, measure=False)


def record_of(fast: Any) -> Any:
    (record,) = fast.report.regions[0].records
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_images", [1, 5])
def test_equals_the_original_everywhere(num_images: int, dtype: torch.dtype) -> None:
    model = conv_exits(dtype)
    fast = optimised(model, images(num_images, 1, dtype))
    assert record_of(fast).changed
    check_everywhere(fast, model, dtype)


def test_keeps_the_rules_of_passes() -> None:
    check_pass(DeferOperations(), conv_exits(), [(images(5),), (images(1),)])


def test_gradients() -> None:
    model = conv_exits()
    check_gradients(optimised(model, images(5)), model)


def test_only_cells_that_stay_compute_what_moved() -> None:
    model = conv_exits()
    fast = optimised(model, images(5))
    rows: dict[tuple[int, str], int] = {}
    for i, stage in enumerate(fast.stages):
        for name, layer in (("fine", stage.fine[0]), ("down", stage.down)):
            layer.register_forward_hook(
                lambda m, args, out, key=(i, name): rows.__setitem__(key, len(out))
            )
    with torch.no_grad():
        fast(images(32))
    assert rows[0, "down"] == 32
    assert rows[0, "fine"] == rows[1, "down"] < 32
    assert rows[1, "fine"] == rows[2, "down"] < rows[1, "down"]
    assert (2, "fine") not in rows, "nobody reads it"


class Parts(nn.Module):
    """One scatter; ``make`` computes from x what path 1 alone reads."""

    def __init__(self, make: Any, *, read_on_both: bool = False, weighted: bool = False) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.scatter = brt.ScatterRouter(TopK(1), 2, weighted=weighted)
        self.gather = brt.GatherRouter(weighted=False)
        self.make, self.read_on_both = make, read_on_both

    def forward(self, x: Tensor) -> Tensor:
        flow = self.make(self, x)
        (a, b), route = self.scatter((x, flow), x[:, :2].sigmoid())
        first = a[0] + a[1] if self.read_on_both else a[0]
        return self.gather([first, b[1].tanh()], route)


MOVES: dict[str, Any] = {
    "layer": lambda m, x: m.linear(x),
    "chain": lambda m, x: torch.cat([x, m.norm(m.linear(x)).relu()], 1)[:, 4:],
    "constant": lambda m, x: m.linear(x) * m.linear.weight.sum(),
}
STAYS: dict[str, tuple[Any, dict[str, bool]]] = {
    "mixes cells": (lambda m, x: m.linear(x - x.mean(0)) - m.linear(x).mean(0), {}),
    "no layer": (lambda m, x: x * 2, {}),
    "read on both": (MOVES["layer"], {"read_on_both": True}),
    "weighted on the way in": (MOVES["layer"], {"weighted": True}),
    "written in place": (lambda m, x: m.linear(x.clone().mul_(2)) + x.add_(1), {}),
}


@pytest.mark.parametrize("case", MOVES)
def test_what_moves(case: str) -> None:
    model = Parts(MOVES[case]).eval()
    fast = optimised(model, torch.randn(6, 4))
    assert record_of(fast).changed
    with torch.no_grad():
        for x in (torch.randn(6, 4), torch.randn(1, 4), torch.randn(0, 4)):
            torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case: str) -> None:
    make, settings = STAYS[case]
    model = Parts(make, **settings).eval()
    fast = optimised(model, torch.randn(6, 4))
    moved = " ".join(record_of(fast).notes)
    assert not record_of(fast).changed or case == "mixes cells", moved
    with torch.no_grad():
        for x in (torch.randn(6, 4), torch.randn(1, 4)):
            torch.testing.assert_close(fast(x.clone()), model(x.clone()))


def test_one_flow_becomes_several() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scatter = nn.Linear(4, 4), brt.ScatterRouter(TopK(1), 2)
            self.gate, self.gather = nn.Linear(4, 2), brt.GatherRouter()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            flow = self.linear(x) + self.linear(y)
            (_, b), route = self.scatter(flow, self.gate(x).softmax(1))
            return self.gather([b * 2], [route[1]])

    model = One().eval()
    fast = optimised(model, (torch.randn(6, 4), torch.randn(6, 4)))
    assert record_of(fast).changed
    with torch.no_grad():
        for num_cells in (6, 1, 0):
            given = torch.randn(num_cells, 4), torch.randn(num_cells, 4)
            torch.testing.assert_close(fast(*given), model(*given))


def test_refuses_without_a_sample() -> None:
    with pytest.warns(brt.PluginWarning, match="shapes are needed"):
        brt.optimize(conv_exits(), passes=["defer-operations"])


def test_refuses_large_graphs() -> None:
    with pytest.warns(brt.PluginWarning, match="most_nodes=...\\) allows it"):
        brt.optimize(conv_exits(), passes=[DeferOperations(most_nodes=10)], sample=images(2))
