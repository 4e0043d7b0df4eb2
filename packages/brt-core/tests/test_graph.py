"""Tracing: every style of writing a dynamic network, and a clear word where it cannot be.

Legend: N cells, D features, P paths.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_networks import RandomNetwork, batches
from torch import Tensor, fx, nn

import brt
from brt import annotate as imported_annotate
from brt import each as imported_each
from brt.graph import OPAQUE, expect, has_routers, netlet, regions, trace
from brt.protocols import TopK

DIM, PATHS = 4, 3


class Moe(nn.Module):
    """Gate, scatter, experts, gather; subclasses change how it is written."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, PATHS)
        self.scatter = brt.ScatterRouter(TopK(2), PATHS, **options)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(PATHS))
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        return self.gather([e(p) for e, p in zip(self.experts, paths, strict=True)], route)


class Annotated(Moe):
    def forward(self, x: Tensor) -> Tensor:
        cells, grid = brt.annotate(x.unsqueeze(0), (0, 1))
        paths, route = self.scatter(cells, self.gate(cells), grid.cells)
        outs = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        return grid.restore(self.gather(outs, route)).squeeze(0)


class Imported(Moe):
    def forward(self, x: Tensor) -> Tensor:
        made = imported_annotate(x, 0)
        cells, grid = made[0], made[1]
        paths, route = self.scatter(cells, self.gate(cells))
        return grid.restore(self.gather(imported_each(self.experts, paths), route))


class Each(Moe):
    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x))
        first, *rest = brt.each(self.experts, paths)
        return self.gather([first * 2, *rest], route)


class Grouped(Moe):
    def __init__(self) -> None:
        super().__init__(result="packed")

    def forward(self, x: Tensor) -> Tensor:
        rows, route = self.scatter(x, self.gate(x))
        return self.gather(brt.grouped(self.experts, rows, route), route)


class Flows(Moe):
    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter((x, x[:, :1]), self.gate(x))
        outs = [(e(rows) + side, side) for e, (rows, side) in zip(self.experts, paths, strict=True)]
        sums, sides = self.gather(outs, route)
        return sums + sides


class PathByPath(Moe):
    """Paths by index, the route as a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x))
        assert len(paths) == len(route) == route.num_paths
        outs, where = [], []
        for p, cells in enumerate(route):
            outs.append(self.experts[p](paths[p]))
            where.append(cells)
        return self.gather(outs, where)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = Moe(), Moe()
        self.union = brt.GatherRouter(result="union")

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.outer.scatter(x, self.outer.gate(x))
        inner, deeper = self.inner.scatter(paths[1], self.inner.gate(paths[1]), route[1])
        rows = [paths[0], inner[0], inner[1], paths[2]]
        where = [route[0], deeper[0], deeper[1], route[2]]
        delivered, cells = self.union(rows, where)
        again, last = self.inner.scatter(delivered, self.inner.gate(delivered), cells)
        return self.outer.gather(list(again), [last[p] for p in range(PATHS)])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = Moe()

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.moe(x)) + self.moe.gate(x).sum(-1, keepdim=True)


class Star(nn.Module):
    """Modules called with * and **."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()
        self.moe = Moe()

    def forward(self, x: Tensor) -> Tensor:
        args, kwargs = (x,), {"scale": 2.0, "shift": x}
        return self.moe(self.inner(*args, **kwargs))


class Scaled(nn.Module):
    def forward(self, x: Tensor, *rest: Any, scale: float = 1.0, **more: Any) -> Tensor:
        shift: Tensor = more["shift"]
        return x * scale + shift


class Sizes(Moe):
    """Functions that take a size, which does not show that it came from a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        place_N = torch.arange(x.shape[0])
        return super().forward(x) + place_N[:, None] + torch.zeros(x.shape[0], DIM)


class Buffers(Moe):
    kept: Tensor
    passing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(DIM))
        self.register_buffer("passing", torch.ones(DIM), persistent=False)
        self.plain = torch.full((DIM,), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.kept + self.passing) + self.plain


class WithLoss(Moe):
    def forward(self, x: Tensor) -> Any:
        probs = self.gate(x).softmax(-1)
        paths, route = self.scatter(x, probs)
        out = self.gather([e(p) for e, p in zip(self.experts, paths, strict=True)], route)
        return out, brt.losses.load_balance(route, probs) + brt.losses.router_z_loss(probs)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loop = brt.LoopRouter(Netlet(), max_steps=3)

    def forward(self, x: Tensor) -> Tensor:
        out, (count,) = self.loop(x, (x[:, 0],))
        return out + count[:, None]


class Netlet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe, self.gate = Moe(), nn.Linear(DIM, 2)

    def forward(self, x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor]]:
        return self.moe(x), self.gate(x), (state[0] + 1,)


class Exits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stages = [nn.Linear(DIM, DIM), Moe(), nn.Linear(DIM, DIM)]
        self.exit = brt.EarlyExit(stages, [nn.Linear(DIM, 2) for _ in stages])

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(x)


STYLES: list[Callable[[], nn.Module]] = [
    *(Moe, Annotated, Imported, Each, Grouped, Flows, PathByPath, Nested, Twice, Star, Sizes),
    *(Buffers, WithLoss, Looped, Exits),
]


@pytest.mark.parametrize("make", STYLES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("num_cells", [0, 1, 9])
def test_a_trace_computes_the_same(make: Callable[[], nn.Module], num_cells: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    attributes = {path: set(vars(m)) for path, m in model.named_modules()}
    graph = trace(model)
    assert {path: set(vars(m)) for path, m in model.named_modules()} == attributes
    x = torch.randn(num_cells, DIM)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), equal_nan=True)


@pytest.mark.parametrize("make", STYLES, ids=lambda m: m.__name__)
def test_a_trace_holds_the_models_own_tensors(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    graph = trace(model)
    assert list(graph.state_dict()) == list(model.state_dict())
    ours, theirs = dict(graph.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert not any(module.training for module in graph.modules())


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int) -> None:
    model = RandomNetwork(seed)
    found = regions(model)
    assert any(region.graph is not None for region in found)
    for region in found:
        if region.graph is None:
            assert region.reason
            continue
        original = model.get_submodule(region.path)
        for x in batches(seed, (0, 1, 6), torch.float32):
            args = (x, ()) if region.path.endswith("netlet") else (x,)
            with torch.no_grad():
                wanted = original(*(a.clone() if isinstance(a, Tensor) else a for a in args))
                torch.testing.assert_close(region.graph(*args), wanted)


def targets(graph: fx.GraphModule, op: str) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == op]


def test_the_paths_of_a_scatter_are_taken_apart_once() -> None:
    graph = trace(Moe())
    (scatter,) = [n for n in graph.graph.nodes if n.target == "scatter"]
    taken = {user.args[1]: user for user in scatter.users}
    assert set(taken) == {0, 1}, "one node for the paths, one for the route"
    assert [user.args[1] for user in taken[0].users] == list(range(PATHS))
    assert all(user.target is operator.getitem for user in taken[0].users)


def test_leaves_are_routers_layers_and_functions_of_brt() -> None:
    graph = trace(Each())
    assert targets(graph, "call_module") == ["gate", "scatter", "gather"]
    (node,) = [n for n in graph.graph.nodes if n.target is brt.each]
    modules, paths = node.args
    assert [m.target for m in modules] == [f"experts.{p}" for p in range(PATHS)]
    assert len(paths) == PATHS
    assert brt.grouped in targets(trace(Grouped()), "call_function")
    assert brt.annotate in targets(trace(Imported()), "call_function")
    assert brt.losses.load_balance in targets(trace(WithLoss()), "call_function")
    assert targets(trace(Exits()), "call_module") == ["exit"]
    assert targets(trace(Looped()), "call_module") == ["loop"]


def test_a_module_used_twice_is_two_nodes_and_one_module() -> None:
    assert targets(trace(Twice()), "call_module").count("moe.scatter") == 2


def test_containers_are_new_so_that_a_rewrite_leaves_the_model_alone() -> None:
    model = Twice()
    graph: Any = trace(model)
    graph.moe.scatter = nn.Identity()
    assert isinstance(model.moe.scatter, brt.ScatterRouter)
    assert graph.moe is not model.moe
    assert graph.moe.experts[0] is model.moe.experts[0]


def test_constants_are_no_state() -> None:
    model = Buffers()
    graph = trace(model)
    assert "plain" in dict(graph.named_buffers())
    assert list(graph.state_dict()) == list(model.state_dict())
    assert graph.kept is model.kept
    around = Around(model, nn.Identity()).eval()
    graph, x = trace(around), torch.randn(3, DIM)
    torch.testing.assert_close(graph(x), around(x))
    assert list(graph.state_dict()) == list(around.state_dict())


def test_a_trace_can_be_copied_and_compiled() -> None:
    model = Annotated().eval()
    graph = copy.deepcopy(trace(model))
    x = torch.randn(5, DIM)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
        compiled = torch.compile(graph, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_loops_netlet_is_opened() -> None:
    model = Looped().eval()
    body = netlet(model.loop)
    assert "moe.scatter" in targets(body, "call_module")
    x = torch.randn(3, DIM)
    out, scores, (count,) = body(x, (x[:, 0],))
    wanted = model.loop.netlet(x, (x[:, 0],))
    torch.testing.assert_close((out, scores, (count,)), wanted)


# Arguments


class Optional(Moe):
    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        if mask is not None:
            x = x * mask
        if double:
            x = x * 2
        return super().forward(x)


def test_plain_defaults_are_fixed_and_guarded() -> None:
    model = Optional()
    graph = trace(model)
    x, mask = torch.randn(5, DIM), torch.rand(5, 1)
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(graph(x, None, double=False), model(x))
    with pytest.raises(brt.TraceError, match=r"double=True.*traced with double=False.*sample"):
        graph(x, double=True)
    with pytest.raises(brt.TraceError, match="mask=tensor"):
        graph(x, mask)


def test_a_sample_tells_which_arguments_are_inputs() -> None:
    model = Optional()
    x, mask = torch.randn(5, DIM), torch.rand(5, 1)
    graph = trace(model, sample={"x": x, "mask": mask, "double": True})
    torch.testing.assert_close(graph(x, mask * 2, True), model(x, mask * 2, True))
    assert targets(graph, "call_function").count(expect) == 1
    with pytest.raises(brt.TraceError, match="double=False"):
        graph(x, mask)
    with pytest.raises(brt.TraceError, match=r"Optional cannot be traced.*argument"):
        trace(model, sample=(x, mask, True, 4))


class Variadic(Moe):
    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        x = sum(xs)
        assert isinstance(x, (Tensor, fx.Proxy))
        return super().forward(self.add(x, **more))

    def add(self, x: Any, shift: Any) -> Any:
        return x + shift


def test_star_arguments_need_a_sample() -> None:
    model = Variadic()
    with pytest.raises(brt.TraceError, match=r"iterates.*\*args.*sample"):
        trace(model)

    class Only(Moe):
        def forward(self, *xs: Tensor) -> Tensor:
            first, *rest = xs
            return super().forward(first + rest[0] + len(rest))

    x = torch.randn(5, DIM)
    only = Only()
    torch.testing.assert_close(trace(only, sample=(x, x))(x, x + 1), only(x, x + 1))


# What cannot be traced


class Branches(Moe):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Closed(nn.Module):
    """Branches on values, and has no routers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        return -y if y.sum() > 0 else y


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * 2


class Around(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


@pytest.mark.parametrize("inner", [Closed, Frozen], ids=lambda m: m.__name__)
def test_a_part_without_routers_stays_closed(inner: type[nn.Module]) -> None:
    model = Around(Moe(), inner(), Around(inner(), Moe()))
    graph = trace(model)
    assert set(graph.meta[OPAQUE]) == {"parts.1", "parts.2.parts.0"}
    assert all(inner.__name__ in why for why in graph.meta[OPAQUE].values())
    assert "parts.2.parts.1.scatter" in targets(graph, "call_module")
    x = torch.randn(6, DIM, requires_grad=True)
    for sign in (1, -1):
        torch.testing.assert_close(graph(sign * x), model(sign * x))


def test_the_error_says_where_why_and_what_to_do() -> None:
    with pytest.raises(brt.TraceError) as raised:
        trace(Around(nn.Linear(DIM, DIM), Branches()))
    message = str(raised.value)
    assert "Branches at 'parts.1'" in message
    assert "branches on a value" in message
    assert "test_graph.py" in message
    assert "if x.sum() > 0:" in message
    assert "brt.regions(model)" in message


class KeepsLast(Moe):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class Autocasts(Moe):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Iterates(Moe):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([row * 2 for row in x]))


class Raises(Moe):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("left")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (KeepsLast, "sets self.last"),
        (Autocasts, "autocast begins inside it"),
        (Iterates, "iterates over a value"),
        (Raises, "KeyError: 'left'"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_what_a_graph_would_get_wrong_is_an_error(make: type[nn.Module], words: str) -> None:
    model = make()
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    with pytest.raises(brt.TraceError, match=words):
        trace(model)
    assert {path: dict(vars(m)) for path, m in model.named_modules()} == before


def test_bad_input() -> None:
    with pytest.raises(brt.TraceError, match=r"nn\.Module"):
        trace(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(brt.TraceError, match="one node of the graph"):
        trace(Moe().scatter)
    with pytest.raises(brt.TraceError, match="netlet"):
        trace(Looped().loop)
    patched = Moe()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(brt.TraceError, match="replaced on the instance"):
        trace(patched)
    hooked = Moe()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(brt.TraceError, match="forward hooks"):
        trace(hooked)


# Regions


def paths_of(model: nn.Module) -> dict[str, bool]:
    return {region.path: region.graph is not None for region in regions(model)}


def test_regions_are_the_largest_parts_that_can_be_traced() -> None:
    assert paths_of(Around(Moe(), Moe())) == {"": True}
    model = Around(Moe(), Branches(), Around(nn.Linear(DIM, DIM), Moe()), nn.Linear(DIM, DIM))
    assert paths_of(model) == {
        "": False,
        "parts": False,
        "parts.0": True,
        "parts.1": False,
        "parts.2": True,
    }
    assert all((region.graph is None) == bool(region.reason) for region in regions(model))


def test_regions_inside_routers() -> None:
    assert paths_of(Exits()) == {"": True, "exit.stages.1": True}
    assert paths_of(Looped()) == {"": True, "loop.netlet": True}


def test_a_model_that_is_a_router() -> None:
    model = Exits().exit
    assert paths_of(model) == {"": False, "stages.1": True}
    assert "EarlyExit" in str(regions(model)[0].reason)


def test_regions_of_a_model_without_routers() -> None:
    model = nn.Linear(2, 2)
    assert not has_routers(model)
    assert regions(model) == []


def test_regions_tell_what_stays_closed_by_its_path_in_the_model() -> None:
    model = Around(Branches(), Around(Closed(), Moe()))
    (region,) = [r for r in regions(model) if r.graph is not None]
    assert region.path == "parts.1"
    assert set(region.opaque) == {"parts.1.parts.0"}


def test_a_region_that_the_model_shares_is_one() -> None:
    moe = Moe()
    assert paths_of(Around(Branches(), moe, moe)) == {
        "": False,
        "parts": False,
        "parts.0": False,
        "parts.1": True,
    }
