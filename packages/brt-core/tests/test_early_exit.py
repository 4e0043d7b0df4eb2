"""EarlyExit against one cell at a time.

Legend: N cells, C classes, D features.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import close, grads_of
from torch import Tensor, nn

import brt
from brt import EarlyExit
from brt.protocols import BinaryThreshold, TopK


def make(num_stages: int = 4, thresholds: tuple[float, ...] | None = None) -> EarlyExit:
    protocol = BinaryThreshold(0.45) if thresholds is None else None
    return EarlyExit(
        (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(num_stages)),
        (nn.Linear(6, 3) for _ in range(num_stages)),
        [BinaryThreshold(t) for t in thresholds] if protocol is None else protocol,
    )


def plain(model: EarlyExit, x_ND: Tensor) -> tuple[Tensor, list[int]]:
    """(logits, exit of each cell), one cell after another."""
    answers, exits = [], []
    for x in x_ND:
        for i, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            x = stage(x)
            logits = head(x)
            last = i == len(model.stages) - 1
            if last or logits.softmax(0).max() >= model.scatters[i].protocol.threshold:
                answers.append(logits)
                exits.append(i)
                break
    return torch.stack(answers) if answers else x_ND.new_zeros((0, 3)), exits


@pytest.mark.parametrize("num_cells", [0, 1, 2, 40])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_against_one_cell_at_a_time(num_stages: int, num_cells: int, device: torch.device) -> None:
    model = make(num_stages).to(device)
    x = torch.randn(num_cells, 6, device=device)
    logits, cells = model.with_exits(x)
    wanted, exits = plain(model, x)
    close(logits, wanted)
    assert len(cells) == num_stages
    for i, left in enumerate(cells):
        assert left.cell_R.tolist() == [n for n, e in enumerate(exits) if e == i]
    close(model(x), wanted)
    if num_cells:
        came = grads_of(model, x)
        want = grads_of(lambda x: plain(model, x)[0], x)
        close(came[1][0], want[1][0], factor=10)


@pytest.mark.parametrize("thresholds", [(0.0, 2.0), (2.0, 0.0), (2.0, 2.0)], ids=str)
def test_all_leave_at_one_exit(thresholds: tuple[float, ...], device: torch.device) -> None:
    model = make(3, thresholds).to(device)
    x = torch.randn(5, 6, device=device)
    logits, cells = model.with_exits(x)
    wanted, exits = plain(model, x)
    close(logits, wanted)
    assert [left.num_rows for left in cells] == [exits.count(i) for i in range(3)]
    logits.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None  # also of stages that no cell reached


def test_only_those_that_stay_are_computed(device: torch.device) -> None:
    model = make(3, (0.44, 0.4)).to(device)
    seen: list[int] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    x = torch.randn(40, 6, device=device)
    _, cells = model.with_exits(x)
    first, second, _ = (left.num_rows for left in cells)
    assert 0 < first < 40
    assert seen == [40, 40 - first, 40 - first - second]


def test_stages_of_several_tensors(device: torch.device) -> None:
    """MSDNet's stages hand on features of several scales."""

    class Stage(nn.Module):
        def __init__(self, takes: int) -> None:
            super().__init__()
            self.linear = nn.Linear(6 * takes, 6)

        def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
            made = self.linear(torch.cat(scales, 1)).tanh()
            return (*scales[-1:], made)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, *scales: Tensor) -> Tensor:
            return self.linear(torch.cat(scales, 1))

    model = EarlyExit(
        [Stage(1), Stage(2), Stage(2)], [Head() for _ in range(3)], BinaryThreshold(0.45)
    ).to(device)
    x = torch.randn(20, 6, device=device)
    came, cells = model.with_exits(x)
    assert all(left.num_rows for left in cells)
    alone = torch.cat([model(x[n : n + 1]) for n in range(20)])
    close(came, alone)
    flows = EarlyExit([Stage(2), Stage(2)], [Head(), Head()], BinaryThreshold(0.45)).to(device)
    close(flows((x, x * 2)), torch.cat([flows((c, c * 2)) for c in x.split(1)]))


def test_default_protocol_and_others() -> None:
    stages, heads = [nn.Identity()] * 3, [nn.Linear(6, 2)] * 3
    assert [s.protocol for s in EarlyExit(stages, heads).scatters] == [BinaryThreshold(0.9)] * 2
    EarlyExit(stages, heads, TopK(1))(torch.randn(4, 6))  # two classes: class 0 leaves


@pytest.mark.parametrize(
    ("stages", "heads", "protocol", "message"),
    [
        (0, 0, None, "a head for each of at least one stage, got 0 stages and 0 heads"),
        (2, 1, None, "got 2 stages and 1 heads"),
        (3, 3, [BinaryThreshold(0.5)], "1 protocols for 2 exits before the last"),
    ],
)
def test_bad_options(stages: int, heads: int, protocol: object, message: str) -> None:
    with pytest.raises(brt.RouteError, match=message):
        EarlyExit([nn.Identity()] * stages, [nn.Identity()] * heads, protocol)


class Around(nn.Module):
    def __init__(self, exits: EarlyExit) -> None:
        super().__init__()
        self.exits = exits

    def forward(self, x: Tensor) -> Tensor:
        return self.exits(x).relu()


def test_a_trace_shows_stages_heads_and_routers() -> None:
    model = Around(make(3)).eval()
    graph = brt.trace(model)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert {"exits.stages.1.0", "exits.heads.2", "exits.scatters.1", "exits.gather"} <= called
    x = torch.randn(20, 6)
    close(graph(x), model(x))
    fast = brt.optimize(model, brt.profile(model, [x]), sample=x)
    assert [region.path for region in fast.report.regions] == [""]
    for other in (x, -x, x[:1], x[:0]):
        close(fast(other), model(other))


def test_exits_stay_closed_where_nobody_knows_what_a_stage_gives() -> None:
    class Stage(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.ndim == 2 else x

    stages = [Stage(), Stage()]
    model = Around(EarlyExit(stages, [nn.Linear(6, 3), nn.Linear(6, 3)], BinaryThreshold(0.45)))
    graph = brt.trace(model.eval())
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert called == {"exits"}
    x = torch.randn(8, 6)
    close(graph(x), model(x))
    fast = brt.optimize(model, brt.profile(model, [x]), sample=x)
    (left,) = (region for region in fast.report.regions if region.path == "exits")
    assert left.reason is not None
    assert "how many tensors" in left.reason
