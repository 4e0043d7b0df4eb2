"""Routes that nest and merge, against plain Python that moves one cell at a time.

Legend: N cells, P paths, S trailing cell dims, D features.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import close, grads_of, one_hot_scores, top_k
from torch import Tensor, nn

import brt
from brt import Cells, GatherRouter, ScatterRouter
from brt.protocols import Label, Threshold


class FourExits(nn.Module):
    """Four levels of early exit, nested by hand; each level answers for the cells that leave."""

    def __init__(self, num_features: int = 6, num_levels: int = 4) -> None:
        super().__init__()
        made = range(num_levels)
        self.stages = nn.ModuleList(nn.Linear(num_features, num_features) for _ in made)
        self.heads = nn.ModuleList(nn.Linear(num_features, 3) for _ in made)
        self.gates = nn.ModuleList(nn.Linear(num_features, 2) for _ in made)
        self.scatter = ScatterRouter(top_k(), 2)
        self.gather = GatherRouter(weighted=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        cells = Cells.of(x_ND.shape[0])
        left, where = [], []
        for i, (stage, head, gate) in enumerate(
            zip(self.stages, self.heads, self.gates, strict=True)
        ):
            x_ND = stage(x_ND).tanh()
            if i == len(self.stages) - 1:
                left.append(head(x_ND))
                where.append(cells)
                break
            (leaves, stays), route = self.scatter(x_ND, gate(x_ND), cells)
            left.append(head(leaves))
            where.append(route[0])
            x_ND, cells = stays, route[1]
        return self.gather(left, where)

    def plain(self, x_ND: Tensor) -> Tensor:
        """One cell after another."""
        answers = []
        for x in x_ND:
            for i, (stage, head, gate) in enumerate(
                zip(self.stages, self.heads, self.gates, strict=True)
            ):
                x = stage(x).tanh()
                if i == len(self.stages) - 1 or int(gate(x).argmax()) == 0:
                    answers.append(head(x))
                    break
        return torch.stack(answers) if answers else x_ND.new_zeros((0, 3))


@pytest.mark.parametrize("num_cells", [0, 1, 2, 33])
def test_four_level_early_exit(num_cells: int, device: torch.device) -> None:
    model = FourExits().to(device)
    x = torch.randn(num_cells, 6, device=device)
    came, wanted = grads_of(model, x), grads_of(model.plain, x)
    close(came[0][0], wanted[0][0], f"{num_cells=}")
    if num_cells:
        close(came[1][0], wanted[1][0], f"{num_cells=}", factor=10)


def test_every_cell_leaves_at_one_level(device: torch.device) -> None:
    x = torch.randn(5, 6, device=device)
    for level in range(4):
        model = FourExits().to(device)
        for i, gate in enumerate(model.gates):
            nn.init.zeros_(gate.weight)
            gate.bias.data = torch.tensor([1.0, 0.0] if i == level else [0.0, 1.0], device=device)
        close(model(x), model.plain(x), f"{level=}")


KEEP, UP, DOWN = 0, 1, 2


class Cell(nn.Module):
    """One node of the grid: a transform, and a gate that sends each cell on to its neighbours."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.transform = nn.Linear(num_features, num_features)
        self.gate = nn.Linear(num_features, 3)
        self.moves = nn.ModuleList(nn.Linear(num_features, num_features) for _ in range(3))


class DynamicRouting(nn.Module):
    """Three scales by three layers: each node keeps a cell, and sends it up or down, or none.

    A scale of the next layer is fed by the scatters of up to three neighbours, and computes only
    the cells that reach it.
    """

    def __init__(self, num_features: int = 4, threshold: float = 0.0) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(
            nn.ModuleList(Cell(num_features) for _ in range(3)) for _ in range(3)
        )
        self.threshold = threshold
        self.scatter = ScatterRouter(Threshold(threshold), 3)
        self.union = GatherRouter(result="union")
        self.gather = GatherRouter(weighted=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, list[list[int]]]:
        """(the sum over scales for each cell, how many cells each node computed)."""
        root = Cells.of(x_ND.shape[0])
        nowhere = Cells(root.root, torch.empty(0, dtype=torch.int64, device=x_ND.device))
        at = [(x_ND, root), (x_ND[:0], nowhere), (x_ND[:0], nowhere)]
        computed: list[list[int]] = []
        for layer in self.nodes:
            fed: list[list[tuple[Tensor, Cells]]] = [[], [], []]
            computed.append([])
            for scale, node in enumerate(layer):
                rows, cells = at[scale]
                computed[-1].append(rows.shape[0])
                rows = node.transform(rows).tanh()
                paths, route = self.scatter(rows, node.gate(rows), cells)
                for path, step in ((KEEP, 0), (UP, -1), (DOWN, 1)):
                    if 0 <= scale + step < 3:
                        fed[scale + step].append((node.moves[path](paths[path]), route[path]))
            at = [self.union([r for r, _ in sets], [c for _, c in sets]) for sets in fed]
        return self.gather([rows for rows, _ in at], [cells for _, cells in at]), computed

    def plain(self, x_ND: Tensor) -> tuple[Tensor, list[list[int]]]:
        """One cell after another."""
        outs, computed = [], [[0] * 3 for _ in range(3)]
        for x in x_ND:
            at: list[Tensor | None] = [x, None, None]
            for i, layer in enumerate(self.nodes):
                fed: list[Tensor | None] = [None] * 3
                for scale, node in enumerate(layer):
                    here = at[scale]
                    if here is None:
                        continue
                    computed[i][scale] += 1
                    here = node.transform(here).tanh()
                    scores = node.gate(here)
                    for path, step in ((KEEP, 0), (UP, -1), (DOWN, 1)):
                        to = scale + step
                        if 0 <= to < 3 and scores[path] > self.threshold:
                            moved = node.moves[path](here) * scores[path]
                            fed[to] = moved if fed[to] is None else fed[to] + moved
                at = fed
            arrived = [out for out in at if out is not None]
            outs.append(sum(arrived) if arrived else torch.zeros_like(x))
        return torch.stack(outs) if outs else x_ND, computed


@pytest.mark.parametrize("num_cells", [0, 1, 2, 17])
@pytest.mark.parametrize("threshold", [-9.0, -0.2, 0.0, 0.3, 9.0])
def test_three_scales_by_three_layers(
    threshold: float, num_cells: int, device: torch.device
) -> None:
    model = DynamicRouting(threshold=threshold).to(device)
    x = torch.randn(num_cells, 4, device=device)
    _, computed = model(x)
    _, wanted_computed = model.plain(x)
    assert computed == wanted_computed  # a cell that no path feeds is not computed on zeros
    came = grads_of(lambda x: model(x)[0], x)
    wanted = grads_of(lambda x: model.plain(x)[0], x)
    close(came[0][0], wanted[0][0], f"{threshold=} {num_cells=}")
    if num_cells:
        grads = [g if g is not None else torch.zeros_like(x) for g in (came[1][0], wanted[1][0])]
        close(grads[0], grads[1], f"{threshold=} {num_cells=}", factor=10)


def test_gather_of_paths_from_several_depths(device: torch.device) -> None:
    """Lists of `route[p]` of different routes, some paths left out, in any order."""
    x = torch.arange(8.0, device=device)[:, None]
    _, grid = brt.annotate(x, 0)
    scatter, gather = ScatterRouter(Label(), 2), GatherRouter()
    first = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], device=device)
    (even, odd), outer = scatter(x, first, grid.cells)
    (low, high), inner = scatter(odd, torch.tensor([0, 0, 1, 1], device=device), outer[1])
    assert inner[1].cell_R.tolist() == [5, 7]
    assert inner[0].root == grid.cells.root
    out = gather([high * 100, even * 10], [inner[1], outer[0]])
    assert out.flatten().tolist() == [0, 0, 20, 0, 40, 500, 60, 700]
    # A cell that several sets deliver is summed
    out = gather([even, even, low], [outer[0], outer[0], inner[0]])
    assert out.flatten().tolist() == [0, 1, 4, 3, 8, 0, 12, 0]
    rows, cells = GatherRouter(result="union")([high, low], [inner[1], inner[0]])
    assert rows.flatten().tolist() == [1, 3, 5, 7]
    assert cells.cell_R.tolist() == [1, 3, 5, 7]
    # All cells of the root, next to some
    out = gather([x, high], [grid.cells, inner[1]])
    assert out.flatten().tolist() == [0, 1, 2, 3, 4, 10, 6, 14]
    alone = gather([x], [grid.cells])
    assert torch.equal(alone, x)


def test_union_of_a_nested_route_keeps_the_root(device: torch.device) -> None:
    x = torch.arange(6.0, device=device)[:, None]
    scatter = ScatterRouter(Threshold(0.5), 2)
    scores = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1], [0, 1], [1, 0]], device=device).float()
    paths, outer = scatter(x, scores)
    inner_scores = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], device=device)
    inner_paths, inner = scatter(paths[1], inner_scores, outer[1])
    rows, cells = GatherRouter(result="union")(inner_paths, inner)
    assert cells.root == outer.cells.root
    assert cells.cell_R.tolist() == [0, 4]
    assert rows.flatten().tolist() == [0, 4]
    rows, cells = GatherRouter(result="union")([rows, paths[0]], [cells, outer[0]])
    assert cells.cell_R.tolist() == [0, 1, 3, 4, 5]
    assert rows.flatten().tolist() == [0, 1, 3, 4, 5]
    # result="all" of a nested route has a row for each cell of its scatter's input
    out = GatherRouter()(inner_paths, inner)
    assert out.flatten().tolist() == [0, 0, 4]


def test_weights_multiply_only_where_asked(device: torch.device) -> None:
    x = torch.ones(2, 1, device=device)
    paths, outer = ScatterRouter(top_k(), 2)(x, torch.tensor([[0.5, 0], [0.25, 0]], device=device))
    scores = torch.tensor([[0.0, 0.5], [0.5, 0.0]], device=device)
    gather = GatherRouter()
    for inherits, wanted in ((False, [0.5, 0.5]), (True, [0.25, 0.125])):
        scatter = ScatterRouter(top_k(), 2, inherit_weights=inherits)
        inner_paths, inner = scatter(paths[0], scores, outer[0])
        out = gather(list(inner_paths), [inner[0], inner[1]])
        assert out.flatten().tolist() == wanted
        assert gather(inner_paths, inner).flatten().tolist() == wanted
    # Rows of a route without weights count as they are beside those of one with weights
    _, labels = ScatterRouter(Label(), 1)(x, torch.zeros(2, dtype=torch.int64, device=device))
    assert labels.weight_R is None
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    rows, route = ScatterRouter(Label(), 1)(x, ids, outer.cells)
    out = gather([paths[0], rows[0]], [outer[0], route[0]])
    assert out.flatten().tolist() == [1.5, 1.25]
    inherited, route = ScatterRouter(Label(), 1, inherit_weights=True)(paths[0], ids, outer[0])
    assert gather(inherited, route).flatten().tolist() == [0.5, 0.25]


def test_another_root_is_an_error(device: torch.device) -> None:
    x = torch.randn(4, 2, device=device)
    scatter, scores = ScatterRouter(top_k(), 2), one_hot_scores([0, 1, 0, 1], 2, device)
    first_paths, first = scatter(x, scores)
    other_paths, other = scatter(x, scores)
    with pytest.raises(brt.RouteError, match=r"rows 1 belong to another root \(4 cells\)"):
        GatherRouter()([first_paths[0], other_paths[1]], [first[0], other[1]])
    _, grid = brt.annotate(x, 0)
    first_paths, first = scatter(x, scores, grid.cells)
    other_paths, other = scatter(x, scores, grid.cells)
    out = GatherRouter(weighted=False)([first_paths[0], other_paths[1]], [first[0], other[1]])
    assert torch.equal(out, x)


def test_cells_of_another_number_are_an_error(device: torch.device) -> None:
    x = torch.randn(4, 2, device=device)
    scatter = ScatterRouter(top_k(), 2)
    paths, route = scatter(x, one_hot_scores([0, 1, 0, 0], 2, device))
    with pytest.raises(brt.RouteError, match=r"got 3 and 1"):
        scatter(paths[0], one_hot_scores([0, 0, 0], 2, device), route[1])


def test_gradcheck_through_two_levels(device: torch.device) -> None:
    x = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    scores = torch.rand(5, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(x: Tensor, scores: Tensor) -> Tensor:
        scatter = ScatterRouter(top_k(), 2, inherit_weights=True)
        paths, outer = scatter(x, scores)
        inner_paths, inner = scatter(paths[1].sin(), paths[1], outer[1])
        rows = [paths[0] * 2, inner_paths[0] * 3, inner_paths[1].cos()]
        return GatherRouter()(rows, [outer[0], inner[0], inner[1]])

    assert torch.autograd.gradcheck(run, (x, scores))


def test_flows_at_several_depths(device: torch.device) -> None:
    x, index = torch.randn(5, 2, device=device), torch.arange(5, device=device)
    scatter = ScatterRouter(Label(), 2)
    paths, outer = scatter((x, index), torch.tensor([0, 1, 1, 0, 1], device=device))
    inner_paths, inner = scatter(paths[1], torch.tensor([1, 0, 1], device=device), outer[1])
    gathered = GatherRouter()(
        [paths[0], inner_paths[0], inner_paths[1]], [outer[0], inner[0], inner[1]]
    )
    assert torch.equal(gathered[0], x)
    assert torch.equal(gathered[1], index)
