"""ScatterRouter and GatherRouter: what each path sees, and what comes back.

Legend: N cells, P paths, R routed rows, S trailing cell dims, F flows.
"""

from __future__ import annotations

import copy

import pytest
import torch
from core_cases import FLOATS, NUM_CELLS, close, grads_of, mixed_layouts, one_hot_scores, top_k
from torch import Tensor, nn

import brt
from brt import GatherRouter, ScatterRouter
from brt.protocols import CapacityTopK, Label, Threshold


def plain_paths(x: Tensor, mask: Tensor) -> list[Tensor]:
    """Rows of each path, picked cell by cell."""
    paths = []
    for p in range(mask.shape[1]):
        picked = [x[n] for n in range(x.shape[0]) if mask[n, p]]
        paths.append(torch.stack(picked) if picked else x.new_zeros((0, *x.shape[1:])))
    return paths


def same(paths: object, wanted: list[Tensor]) -> None:
    assert len(paths) == len(wanted)
    for p, (came, want) in enumerate(zip(paths, wanted, strict=True)):
        assert came.shape == want.shape, p
        assert torch.equal(came, want), p


# The behaviours of the original's router_test


@pytest.mark.parametrize("shape", [(8, 10), (8, 2, 10), (8, 2, 10, 2)], ids=str)
@pytest.mark.parametrize("which", ["all", "upper", "lower", "odd"])
@pytest.mark.parametrize("target", [0, 1])
def test_experts_see_exactly_their_rows(
    target: int, which: str, shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(shape, device=device)
    there = [which == "all" or (n < 4) == (which == "upper") for n in range(8)]
    if which == "odd":
        there = [n % 2 == 1 for n in range(8)]
    route_to = [target if yes else 1 - target for yes in there]
    paths, route = ScatterRouter(top_k(), 2)(x, one_hot_scores(route_to, 2, device))
    index = torch.tensor([n for n in range(8) if there[n]], dtype=torch.int64, device=device)
    other = torch.tensor([n for n in range(8) if not there[n]], dtype=torch.int64, device=device)
    assert torch.equal(paths[target], x[index])
    assert torch.equal(paths[1 - target], x[other])
    assert route.load_P.tolist() == [route_to.count(0), route_to.count(1)]
    assert route.sizes == (route_to.count(0), route_to.count(1))
    # All cells, in order
    assert torch.equal(GatherRouter()(list(paths), route), x)
    # Only those of one path, in order: the original's gather, which compacts
    rows, cells = GatherRouter(result="union")([paths[target]], [route[target]])
    assert torch.equal(rows, x[index])
    assert torch.equal(cells.cell_R, index)


@pytest.mark.parametrize("target", [(0,), (1,), (0, 1)], ids=str)
def test_single_cell(target: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(1, 3, device=device)
    mask = torch.tensor([[0 in target, 1 in target]], device=device)
    paths, route = ScatterRouter(Threshold(0.5), 2)(x, mask.float())
    same(paths, plain_paths(x, mask))
    close(GatherRouter(weighted=False)(paths, route), x * len(target))
    # The weights count for one cell as for any number (the original ignored them)
    paths, route = ScatterRouter(top_k(2), 2)(x, torch.tensor([[0.25, 0.5]], device=device))
    close(GatherRouter()(paths, route), x * 0.75)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_weights_before_or_after(k: int, device: torch.device) -> None:
    """Of linear branches without bias, weights in and weights out are the same."""
    x = torch.randn(8, 10, device=device)
    scores = torch.rand(8, 4, device=device)
    weight = torch.randn(4, 10, 6, device=device)
    outs = []
    for weighted in (False, True):
        paths, route = ScatterRouter(top_k(k), 4, weighted=weighted)(x, scores)
        assert route.weighted == weighted
        rows = [path @ weight[p] for p, path in enumerate(paths)]
        outs.append(GatherRouter(weighted=not weighted)(rows, route))
    wanted = torch.zeros(8, 6, device=device)
    for n in range(8):
        for p in scores[n].topk(k).indices.tolist():
            wanted[n] += scores[n, p] * (x[n] @ weight[p])
    close(outs[0], wanted, factor=5)
    close(outs[1], wanted, factor=5)


def test_weights_twice_are_an_error(device: torch.device) -> None:
    x, scores = torch.randn(4, 2, device=device), torch.rand(4, 2, device=device)
    paths, route = ScatterRouter(top_k(), 2, weighted=True)(x, scores)
    for rows, where in ((list(paths), route), ([paths[1]], [route[1]])):
        with pytest.raises(brt.RouteError, match=r"weighted these rows already .* weight them"):
            GatherRouter()(rows, where)
    GatherRouter(weighted=False)([paths[1]], [route[1]])
    with pytest.raises(brt.RouteError, match="multiplied by their weights already"):
        ScatterRouter(top_k(), 2, inherit_weights=True)(
            paths[0], one_hot_scores([0] * len(paths[0]), 2, device), route[0]
        )
    # Without weights there is nothing to do twice
    ids = torch.tensor([0, 1, 1, 0], device=device)
    paths, route = ScatterRouter(Label(), 2, weighted=True)(x, ids)
    assert route.weight_R is None
    assert torch.equal(GatherRouter()(paths, route), x)


# Round trips


@pytest.mark.parametrize("num_paths", [1, 2, 16, 256])
@pytest.mark.parametrize("num_cells", NUM_CELLS)
def test_round_trip_is_k_times_the_input(
    num_cells: int, num_paths: int, device: torch.device
) -> None:
    """O8 of the original: unweighted top-k gives k * x; weighted, the sum of weights times x."""
    k = min(2, num_paths)
    x = torch.randn(num_cells, 3, device=device)
    scores = torch.rand(num_cells, num_paths, device=device)
    paths, route = ScatterRouter(top_k(k), num_paths)(x, scores)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k).indices, True)
    assert sum(len(path) for path in paths) == k * num_cells
    path_loads = mask.sum(0).tolist()
    assert [len(path) for path in paths] == path_loads == route.load_P.tolist()
    if num_cells * num_paths < 50_000:
        same(paths, plain_paths(x, mask))
    close(GatherRouter(weighted=False)(paths, route), x * k)
    close(GatherRouter()(paths, route), x * scores.topk(k).values.sum(1, keepdim=True), factor=2)


@pytest.mark.parametrize("how", ["all-on-one", "none", "empty-paths"])
def test_extremes(how: str, device: torch.device) -> None:
    x = torch.randn(9, 3, device=device)
    mask = torch.zeros(9, 4, dtype=torch.bool, device=device)
    if how == "all-on-one":
        mask[:, 2] = True
    elif how == "empty-paths":
        mask[::2, 1] = True
        mask[1::3, 3] = True
    paths, route = ScatterRouter(Threshold(0.5), 4)(x, mask.float())
    same(paths, plain_paths(x, mask))
    close(GatherRouter(weighted=False)(paths, route), x * mask.sum(1, keepdim=True))
    rows, cells = GatherRouter(result="union", weighted=False)(paths, route)
    on_a_path = mask.any(1)
    close(rows, (x * mask.sum(1, keepdim=True))[on_a_path])
    assert torch.equal(cells.cell_R, on_a_path.nonzero().squeeze(1))


def test_no_cells(device: torch.device) -> None:
    x, scores = torch.randn(0, 3, device=device), torch.rand(0, 4, device=device)
    for protocol in (top_k(2), Threshold(0.5), CapacityTopK(k=2, capacity_factor=1.0)):
        paths, route = ScatterRouter(protocol, 4)(x, scores)
        assert [tuple(path.shape) for path in paths] == [(0, 3)] * 4
        rows = [path @ torch.ones(3, 5, device=device) for path in paths]
        assert GatherRouter()(rows, route).shape == (0, 5)
        rows, cells = GatherRouter(result="union")(paths, route)
        assert rows.shape == (0, 3)
        assert cells.num_rows == 0


def test_other_layouts(device: torch.device) -> None:
    for shape in ((7, 4), (7, 3, 4, 5)):
        layouts = mixed_layouts(torch.randn(shape, device=device))
        scores = mixed_layouts(torch.rand(7, 3, device=device))["transposed"]
        for name, x in layouts.items():
            paths, route = ScatterRouter(top_k(2), 3)(x, scores)
            mask = torch.zeros(7, 3, dtype=torch.bool, device=device)
            same(paths, plain_paths(x, mask.scatter(1, scores.topk(2).indices, True)))
            strided = [path.transpose(0, 1).contiguous().transpose(0, 1) for path in paths]
            close(GatherRouter(weighted=False)(strided, route), x * 2, name)


# Flows


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool], ids=str)
def test_flows_travel_together(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(6, 3, device=device)
    other = torch.randint(0, 2, (6, 2, 2), device=device).to(dtype)
    index = torch.arange(6, device=device)
    scores = torch.rand(6, 3, device=device)
    paths, route = ScatterRouter(top_k(), 3)((x, other, index), scores)
    assert len(paths) == 3
    for p in range(3):
        assert isinstance(paths[p], tuple)
        rows, others, indices = paths[p]
        assert torch.equal(rows, x[indices])
        assert torch.equal(others, other[indices])
        assert indices.tolist() == (scores.argmax(1) == p).nonzero().flatten().tolist()
    came = GatherRouter(weighted=False)(list(paths), route)
    assert isinstance(came, tuple)
    for a, b in zip(came, (x, other, index), strict=True):
        close(a, b)
    (alone,), route = ScatterRouter(top_k(), 1)((x,), scores[:, :1])
    assert isinstance(alone, tuple)
    assert len(alone) == 1
    assert isinstance(GatherRouter()([alone], route), tuple)


def test_weighted_flows_must_be_floats(device: torch.device) -> None:
    x, index = torch.randn(6, 3, device=device), torch.arange(6, device=device)
    scores = torch.rand(6, 3, device=device)
    paths, route = ScatterRouter(top_k(), 3)((x, index), scores)
    with pytest.raises(brt.RouteError, match=r"only floats can be weighted, got rows of torch"):
        GatherRouter()(list(paths), route)
    with pytest.raises(brt.RouteError, match=r"flow 1 is torch\.int64"):
        ScatterRouter(top_k(), 3, weighted=True)((x, index), scores)


@pytest.mark.parametrize("k", [1, 2])
def test_per_path_flows(k: int, device: torch.device) -> None:
    """Path p takes ``[:, p]``: the original's 2-d routing."""
    x, per_path = torch.randn(5, 4, device=device), torch.randn(5, 3, 4, 2, device=device)
    scores = torch.rand(5, 3, device=device)
    scatter = ScatterRouter(top_k(k), 3, per_path=(False, True))
    paths, route = scatter((x, per_path), scores)
    chosen = scores.topk(k).indices.tolist()
    for p in range(3):
        cells = [n for n in range(5) if p in chosen[n]]
        assert torch.equal(paths[p][0], x[cells])
        assert torch.equal(paths[p][1], per_path[cells, p])
    alone, route = ScatterRouter(top_k(k), 3, per_path=True, weighted=True)(per_path, scores)
    for p in range(3):
        cells = [n for n in range(5) if p in chosen[n]]
        close(alone[p], per_path[cells, p] * scores[cells, p][:, None, None])
    total = GatherRouter(weighted=False)(alone, route)
    weights = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, scores.topk(k).values)
    close(total, (per_path * weights[:, :, None, None]).sum(1), factor=2)


def test_per_path_gradient(device: torch.device) -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    scores = torch.rand(4, 3, dtype=torch.float64, device=device, requires_grad=True)

    def run(x: Tensor, scores: Tensor) -> Tensor:
        paths, route = ScatterRouter(top_k(2), 3, per_path=True)(x, scores)
        return GatherRouter()([path * (p + 1) for p, path in enumerate(paths)], route)

    assert torch.autograd.gradcheck(run, (x, scores))


def test_packed_rows(device: torch.device) -> None:
    x, scores = torch.randn(9, 4, device=device), torch.rand(9, 3, device=device)
    index = torch.arange(9, device=device)
    rows, route = ScatterRouter(top_k(2), 3, result="packed")(x, scores)
    assert route.sizes is None  # nothing on the host knows the loads
    paths, sized = ScatterRouter(top_k(2), 3)(x, scores)
    assert torch.equal(rows[:18], torch.cat(paths))
    close(GatherRouter()(rows.sin(), route), GatherRouter()([p.sin() for p in paths], sized))
    assert route.with_sizes().sizes == sized.sizes
    assert torch.equal(route.with_sizes().split(rows)[1], paths[1])
    flows, route = ScatterRouter(top_k(2), 3, result="packed")((x, index), scores)
    assert torch.equal(flows[0], x[flows[1]])
    # Rows that no cell owns (here: cells on one path only) hold zeros
    rows, route = ScatterRouter(Threshold(0.5), 3, result="packed")(x, scores)
    assert rows.shape == (27, 4)
    assert bool((rows[int(route.offsets_P1[-1]) :] == 0).all())


# Cells that no path delivers


@pytest.mark.parametrize("shape", [(5, 3), (5,), (5, 2, 3, 2)], ids=str)
def test_policies(shape: tuple[int, ...], device: torch.device) -> None:
    x, residual = torch.randn(shape, device=device), torch.randn(shape, device=device)
    mask = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0], [0, 1]], device=device)
    paths, route = ScatterRouter(Threshold(0.5), 2)(x, mask.float())
    rows = [path * (p + 2) for p, path in enumerate(paths)]
    factor = torch.tensor([2.0, 0.0, 5.0, 0.0, 3.0], device=device).view(5, *[1] * (x.ndim - 1))
    nowhere = (factor == 0).float()
    close(GatherRouter(weighted=False)(rows, route), x * factor)
    close(
        GatherRouter(weighted=False, overflow="residual")(rows, route, residual),
        x * factor + residual * nowhere,  # replaced, not added
    )
    close(
        GatherRouter(weighted=False, add_residual=True)(rows, route, residual),
        x * factor + residual,
    )
    union, cells = GatherRouter(weighted=False, result="union", add_residual=True)(
        rows, route, residual
    )
    kept = [0, 2, 4]
    close(union, (x * factor + residual)[kept])
    assert cells.cell_R.tolist() == kept
    if device.type == "cpu":
        with pytest.raises(brt.RouteError, match=r"cells that no path delivers: 2 of 5"):
            GatherRouter(overflow="error")(rows, route)


@pytest.mark.parametrize("num_cells", [1, 2])
def test_residual_of_one_cell(num_cells: int, device: torch.device) -> None:
    """The original added the residual for one cell and replaced it for more."""
    x, residual = torch.randn(num_cells, 2, device=device), torch.randn(num_cells, 2, device=device)
    scores = torch.ones(num_cells, 2, device=device)
    scores[:, 1] = 0
    paths, route = ScatterRouter(Threshold(0.5), 2)(x, scores)
    gather = GatherRouter(weighted=False, overflow="residual")
    close(gather(paths, route, residual), x)
    paths, route = ScatterRouter(Threshold(2.0), 2)(x, scores)
    close(gather(paths, route, residual), residual)


def test_overflow_error_on_cuda_is_deferred(device: torch.device) -> None:
    x = torch.randn(4, 2, device=device)
    paths, route = ScatterRouter(Threshold(0.5), 2)(x, torch.zeros(4, 2, device=device))
    gather = GatherRouter(overflow="error")
    if device.type == "cpu":
        with pytest.raises(brt.RouteError, match="4 of 4"):
            gather(paths, route)
        return
    gather(paths, route)
    with pytest.raises(brt.RouteError, match="cells that no path delivers"):
        brt.check()
    brt.check()  # once


def test_residuals_of_flows(device: torch.device) -> None:
    x, other = torch.randn(4, 2, device=device), torch.randn(4, 3, device=device)
    scores = torch.tensor([[1.0], [0.0], [1.0], [0.0]], device=device)
    paths, route = ScatterRouter(Threshold(0.5), 1)((x, other), scores)
    gather = GatherRouter(weighted=False, overflow="residual")
    came = gather(paths, route, (x * 2, other * 3))
    close(came[0], torch.where(scores > 0, x, x * 2))
    close(came[1], torch.where(scores > 0, other, other * 3))
    with pytest.raises(brt.RouteError, match="1 residuals for 2 flows"):
        gather(paths, route, (x,))


def test_capacity_drops(device: torch.device) -> None:
    x = torch.randn(6, 2, device=device)
    protocol = CapacityTopK(k=1, capacity_factor=0.5)
    paths, route = ScatterRouter(protocol, 2)(x, one_hot_scores([0, 0, 0, 1, 0, 0], 2, device))
    capacity = route.load_P.max().item()
    assert capacity < 5
    assert torch.equal(paths[0], x[[0, 1, 2, 4, 5][:capacity]])
    came = GatherRouter(weighted=False)(paths, route)
    dropped = [0, 1, 2, 4, 5][capacity:]
    assert bool((came[dropped] == 0).all())
    came = GatherRouter(weighted=False, overflow="residual")(paths, route, x)
    close(came, x)
    # The decision as it was carried out
    assert route.decision().mask_NP.any(1).logical_not().nonzero().flatten().tolist() == dropped


# Dtypes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scores_dtype", FLOATS, ids=str)
def test_result_has_the_dtype_of_the_rows(
    dtype: torch.dtype, scores_dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(16, 4).to(device, dtype)
    scores = torch.rand(16, 4).to(device, scores_dtype)
    paths, route = ScatterRouter(top_k(2), 4)(x, scores)
    assert all(path.dtype == dtype for path in paths)
    assert route.weight_R.dtype == scores_dtype  # top-k's weights are the scores it was given
    came = GatherRouter()(paths, route)
    assert came.dtype == dtype
    total = scores.topk(2).values.double().sum(1, keepdim=True)
    close(came, (x.double() * total).to(dtype), factor=2)
    weighted, route = ScatterRouter(top_k(2), 4, weighted=True)(x, scores)
    assert all(path.dtype == dtype for path in weighted)
    close(GatherRouter(weighted=False)(weighted, route), came, factor=2)


# Gradients


def test_gradcheck(device: torch.device) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    residual = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    scores = torch.rand(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    protocol = CapacityTopK(k=2, capacity_factor=0.75)
    for weighted in (False, True):

        def run(x: Tensor, scores: Tensor, residual: Tensor) -> Tensor:
            scatter = ScatterRouter(protocol, 4, weighted=weighted)  # noqa: B023
            paths, route = scatter(x, scores)
            rows = [path.sin() * (p + 1) for p, path in enumerate(paths)]
            gather = GatherRouter(weighted=not weighted, overflow="residual")  # noqa: B023
            return gather(rows, route, residual)

        assert torch.autograd.gradcheck(run, (x, scores, residual))
        assert torch.autograd.gradgradcheck(run, (x, scores, residual))


def test_gradcheck_of_unions(device: torch.device) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    scores = torch.rand(5, 3, dtype=torch.float64, device=device) + 0.5

    def run(x: Tensor, scores: Tensor) -> Tensor:
        paths, route = ScatterRouter(Threshold(1.0), 3)(x, scores)
        rows = [path.sin() * (p + 1) for p, path in enumerate(paths)]
        return GatherRouter(result="union")(rows[:2], [route[0], route[1]])[0]

    assert torch.autograd.gradcheck(run, (x, scores.requires_grad_()))


def test_gradients_of_branches_without_cells_are_zero(device: torch.device) -> None:
    """Not None: data parallel training waits for every gradient."""
    branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)).to(device)
    x = torch.randn(5, 3, device=device)
    paths, route = ScatterRouter(top_k(), 4)(x, one_hot_scores([2] * 5, 4, device))
    out = GatherRouter()([m(p) for m, p in zip(branches, paths, strict=True)], route)
    out.sum().backward()
    for p, branch in enumerate(branches):
        for parameter in branch.parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).any()) == (p == 2)


def test_gradient_of_scores(device: torch.device) -> None:
    x, scores = torch.randn(6, 3, device=device), torch.rand(6, 4, device=device)

    def run(x: Tensor, scores: Tensor) -> Tensor:
        paths, route = ScatterRouter(top_k(2), 4)(x, scores)
        return GatherRouter()([path * (p + 1) for p, path in enumerate(paths)], route)

    def plain(x: Tensor, scores: Tensor) -> Tensor:
        top = scores.topk(2)
        return x * (top.values * (top.indices + 1)).sum(1, keepdim=True)

    came, wanted = grads_of(run, x, scores), grads_of(plain, x, scores)
    for a, b in zip((*came[0], *came[1]), (*wanted[0], *wanted[1]), strict=True):
        close(a, b, factor=3)


# The record


def test_route_turns_back_into_the_decision(device: torch.device) -> None:
    scores = torch.rand(40, 5, device=device)
    for protocol in (top_k(2), Threshold(0.6), CapacityTopK(k=2, capacity_factor=10.0)):
        decision = protocol(scores, 5).to_mask()
        for result in ("paths", "packed"):
            _, route = ScatterRouter(protocol, 5, result=result)(scores, scores)
            found = route.decision()
            assert torch.equal(found.mask_NP, decision.mask_NP)
            assert (found.weight is None) == (decision.weight is None)
            if decision.weight is not None:
                close(found.weight, decision.weight * decision.mask_NP)


def test_cells_of_paths(device: torch.device) -> None:
    x, scores = torch.randn(6, 2, device=device), torch.rand(6, 3, device=device)
    _, grid = brt.annotate(x, 0)
    paths, route = ScatterRouter(top_k(2), 3)(x, scores, grid.cells)
    assert len(route) == 3
    for p, cells in enumerate(route):
        assert cells.root == grid.cells.root
        assert torch.equal(x[cells.cell_R], paths[p])
        close(cells.weight_R, scores[cells.cell_R, p])
    assert torch.equal(route[-1].cell_R, route[2].cell_R)
    with pytest.raises(brt.RouteError, match=r"route\[3\]: the route has 3 paths"):
        route[3]


def test_routes_are_frozen(device: torch.device) -> None:
    x = torch.randn(6, 2, device=device)
    _, route = ScatterRouter(top_k(), 3)(x, torch.rand(6, 3, device=device))
    with pytest.raises(AttributeError):
        route.num_paths = 4
    with pytest.raises(AttributeError):
        route[0].weight_R = None


def test_two_calls_do_not_alias(device: torch.device) -> None:
    x, scores = torch.randn(6, 2, device=device), torch.rand(6, 3, device=device)
    scatter, gather = ScatterRouter(top_k(), 3), GatherRouter()
    first, first_route = scatter(x, scores)
    kept = [path.clone() for path in first]
    second, second_route = scatter(x * 2, scores.flip(1))
    out, again = gather(first, first_route), gather(second, second_route)
    out_kept = out.clone()
    again.zero_()
    for path in second:
        path.zero_()
    same(first, kept)
    assert torch.equal(out, out_kept)


def test_observers(device: torch.device) -> None:
    seen = []
    scatter = ScatterRouter(top_k(), 3)
    handle = scatter.register_observer(lambda *args: seen.append(args))
    x, scores = torch.randn(6, 2, device=device), torch.rand(6, 3, device=device)
    _, route = scatter(x, scores)
    assert len(seen) == 1
    assert seen[0][0] is scatter
    assert seen[0][1] is route
    assert seen[0][2] is scores
    copied = copy.deepcopy(scatter)
    copied(x, scores)
    assert len(seen) == 1  # a copy has no observers
    handle.remove()
    scatter(x, scores)
    assert len(seen) == 1
    scatter(x, scores)


def test_modules_have_no_state(device: torch.device) -> None:
    scatter = ScatterRouter(top_k(2), 4, weighted=True)
    assert scatter.state_dict() == {}
    assert "num_paths=4" in repr(scatter)
    assert "weighted=True" in repr(scatter)
    assert "result='union'" in repr(GatherRouter(result="union"))
    assert repr(GatherRouter()) == "GatherRouter()"


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ScatterRouter("topk", 4),
            r"must be a brt\.protocols\.Protocol, got 'topk'; by",
        ),
        (lambda: ScatterRouter(top_k(), 0), "num_paths must be at least 1, got 0"),
        (lambda: ScatterRouter(top_k(), 4, result="rows"), "'paths' or 'packed', got 'rows'"),
        (lambda: GatherRouter(result="some"), "result must be 'all' or 'union', got 'some'"),
        (lambda: GatherRouter(overflow="keep"), "overflow must be 'drop', 'residual' or 'error'"),
        (lambda: GatherRouter(result="union", overflow="error"), "needs result='all'"),
        (lambda: GatherRouter(overflow="residual", add_residual=True), "leave overflow='drop'"),
    ],
)
def test_bad_options(make: object, message: str) -> None:
    with pytest.raises(brt.RouteError, match=message):
        make()


X, SCORES = torch.zeros(4, 3), torch.rand(4, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, SCORES[:3]), {}, brt.RouteError, "rows of x and cells that the scores.* got 4 and 3"),
        ((X, torch.rand(4, 3)), {}, brt.ProtocolError, r"shape \(4, 3\) came for 2 paths"),
        ((X, torch.rand(4)), {}, brt.ProtocolError, r"scores must be \[N, P\], got shape \(4,\)"),
        ((X, SCORES.long()), {}, brt.ProtocolError, r"must be floats, got torch\.int64"),
        ((X, SCORES.log().sqrt()), {}, brt.ProtocolError, r"scores hold NaN: \d of 8, the first"),
        ((X, SCORES.to("meta")), {}, brt.RouteError, "flow 0 is on cpu, the scores on meta"),
        ((X.to("meta"), SCORES), {}, brt.RouteError, "flow 0 is on meta, the scores on cpu"),
        ((torch.tensor(1.0), SCORES), {}, brt.RouteError, r"x must be rows \[N, \.\.\.\]"),
        (((), SCORES), {}, brt.RouteError, "or a tuple of such flows"),
        (((X, X[:2]), SCORES), {}, brt.RouteError, "cells of flow 1 and of flow 0.*got 2 and 4"),
        (
            (X, SCORES),
            {"per_path": True},
            brt.RouteError,
            r"must be \[N, 2, .*\], got \[4, 3\]",
        ),
        ((X, SCORES), {"per_path": (True, False)}, brt.RouteError, "names 2 flows, x has 1"),
        ((X, SCORES, "cells"), {}, brt.RouteError, "takes a Cells record .* got str"),
        (
            (X, SCORES, brt.Cells.of(5)),
            {},
            brt.RouteError,
            r"rows of x and of cells= .*route\[p\]\) must be equal in number, got 4 and 5",
        ),
        (
            (X, SCORES, brt.Cells(brt.Root(9), torch.arange(4, device="meta"))),
            {},
            brt.RouteError,
            "cells= is on meta, but the scores are on cpu",
        ),
    ],
)
def test_bad_scatter(args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ScatterRouter(top_k(), 2, **options)(*args)


def test_more_choices_than_paths() -> None:
    with pytest.raises(brt.ProtocolError, match=r"k=3 paths, but there are 2; lower k or raise"):
        ScatterRouter(top_k(3), 2)(X, SCORES)


def test_nan_scores_on_cuda_are_deferred(device: torch.device) -> None:
    x, scores = torch.zeros(4, 3, device=device), torch.full((4, 2), float("nan"), device=device)
    scatter = ScatterRouter(top_k(), 2)
    if device.type == "cuda":
        scatter(x, scores)
        with pytest.raises(brt.ProtocolError, match="scores hold NaN"):
            brt.check(device)
    else:
        with pytest.raises(brt.ProtocolError, match="scores hold NaN"):
            scatter(x, scores)


def test_choices_outside_the_paths(device: torch.device) -> None:
    class Wrong(brt.protocols.Protocol):
        name, paper = "wrong", "none"

        def decide(self, scores: Tensor, num_paths: int) -> brt.Decision:
            choice = torch.full((scores.shape[0], 1), num_paths, device=scores.device)
            return brt.Decision(num_paths, choice_NK=choice)

    x, scores = torch.zeros(4, 3, device=device), torch.rand(4, 2, device=device)
    if device.type == "cuda":
        paths, _ = ScatterRouter(Wrong(), 2)(x, scores)
        assert all(len(path) == 0 for path in paths)
        with pytest.raises(brt.RouteError, match=r"a choice must be a path in range\(2\)"):
            brt.check()
    else:
        with pytest.raises(brt.RouteError, match=r"range\(2\) or -1: got values from 2 to 2"):
            ScatterRouter(Wrong(), 2)(x, scores)


def test_bad_gather() -> None:
    x = torch.randn(4, 3)
    paths, route = ScatterRouter(top_k(), 2)(x, one_hot_scores([0, 1, 1, 1], 2))
    _, other = ScatterRouter(top_k(), 2)(x, one_hot_scores([0, 1, 1, 1], 2))
    gather = GatherRouter()
    for rows, where, message in (
        (paths[:1], route, "1 sets of rows for 2 paths of the route"),
        ([paths[1], paths[0]], route, r"rows of path 0 \(flow 0\) and its load .* got 3 and 1"),
        (paths, [route[0]], "2 sets of rows for 1 Cells in where"),
        (paths, "route", r"where must be a Route, or a list of Cells .* got str"),
        (paths, [], "at least one, got list"),
        (paths[0], [route[0]], "rows in one tensor need the route they are packed for"),
        ([(paths[0], paths[0]), (paths[1],)], route, "as many as the others"),
        ([paths[0], (paths[1],)], route, "one tensor, or a tuple of as many"),
        (
            [paths[0], paths[1][:, :2]],
            route,
            r"differ in the shape of their rows: \[\[2\], ",
        ),
        (torch.zeros(5, 3), route, "rows given and rows of the route.*got 5 and 4"),
        (paths, [route[0], other[1]], r"rows 1 belong to another root .*pass the same cells="),
        ([p.to("meta") for p in paths], route, r"different devices \(cpu, meta\)"),
        ([paths[0].to("meta")], [route[0]], "the rows are on meta, but the cells of rows 0 on cpu"),
    ):
        with pytest.raises(brt.RouteError, match=message):
            gather(rows, where)
    with pytest.raises(brt.RouteError, match="residual is not used"):
        gather(paths, route, x)
    with pytest.raises(brt.RouteError, match="residual is needed"):
        GatherRouter(overflow="residual")(paths, route)
    with pytest.raises(brt.RouteError, match=r"residual is \[4, 2\], the result \[4, 3\]"):
        GatherRouter(add_residual=True)(paths, route, x[:, :2])
