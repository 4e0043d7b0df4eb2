"""Cell flow: "keeps" is never said of what mixes; random modules are checked by moving one cell.

Legend: N cells, D features, L tokens of a cell, C channels, P paths.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import brt
from brt import cellflow, trace
from brt.cellflow import Flow
from brt.protocols import CapacityTopK, Random, Threshold, TopK

N, DIM, LENGTH = 7, 12, 6


class Call(nn.Module):
    """A function, with modules for it to use."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def worst(model: nn.Module, *batch: Tensor, training: bool = False) -> Flow:
    """The flow of the node that does most to cells."""
    graph = trace(model.train(training))
    order = ["keeps", "permutes", "mixes"]
    return max(cellflow(graph, batch).values(), key=lambda flow: order.index(flow.kind))


def rows(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


BLOCK = nn.TransformerEncoderLayer(DIM, 3, 16, batch_first=True)
HEADS = nn.MultiheadAttention(DIM, 3, batch_first=True)
TABLE = nn.Parameter(torch.randn(5, DIM))
OF_N = nn.Parameter(torch.randn(N, 1))

Case = tuple[str, nn.Module, Tensor]

KEEPS: list[Case] = [
    ("linear", nn.Linear(DIM, 3), rows(DIM)),
    ("linear of tokens", nn.Linear(DIM, 3), rows(LENGTH, DIM)),
    ("convolution", nn.Conv2d(3, 4, 3), rows(3, 8, 8)),
    ("transposed convolution", nn.ConvTranspose1d(3, 4, 3), rows(3, 8)),
    ("layer norm", nn.LayerNorm(DIM), rows(LENGTH, DIM)),
    ("rms norm", nn.RMSNorm(DIM), rows(LENGTH, DIM)),
    ("group norm", nn.GroupNorm(2, 4), rows(4, 5, 5)),
    ("instance norm", nn.InstanceNorm2d(3, affine=True), rows(3, 5, 5)),
    ("batch norm", nn.BatchNorm2d(3), rows(3, 5, 5)),
    ("dropout", nn.Dropout(0.5), rows(DIM)),
    ("softmax of features", nn.Softmax(-1), rows(DIM)),
    ("pooling", nn.MaxPool2d(2), rows(3, 8, 8)),
    ("adaptive pooling", nn.AdaptiveAvgPool2d(2), rows(3, 7, 8)),
    ("pixel shuffle", nn.PixelShuffle(2), rows(8, 3, 3)),
    ("upsampling", nn.Upsample(scale_factor=2, mode="bilinear"), rows(3, 4, 4)),
    ("patches", nn.Unfold(2), rows(3, 4, 4)),
    ("padding", nn.ReflectionPad2d(1), rows(3, 4, 4)),
    ("embedding", nn.Embedding(5, 3), torch.randint(5, (N, LENGTH))),
    ("attention over tokens", Call(lambda x, a: a(x, x, x)[0], HEADS), rows(LENGTH, DIM)),
    (
        "attention without its weights",
        Call(lambda x, a: a(x, x, x, need_weights=False)[0], HEADS),
        rows(LENGTH, DIM),
    ),
    ("a transformer's layer", BLOCK, rows(LENGTH, DIM)),
    (
        "a recurrence over tokens",
        Call(lambda x, g: g(x)[0], nn.GRU(DIM, 4, batch_first=True)),
        rows(3, DIM),
    ),
    ("a table", Call(lambda x: x @ TABLE.t()), rows(DIM)),
    ("merged and split", Call(lambda x: x.reshape(-1, 3).view(x.shape[0], -1, 3)), rows(DIM)),
    ("moved and moved back", Call(lambda x: x.transpose(0, 1).relu().transpose(0, 1)), rows(DIM)),
    ("products of tokens", Call(lambda x: torch.einsum("nld,nmd->nlm", x, x)), rows(LENGTH, DIM)),
    ("ranks", Call(lambda x: x.sort(-1).values + x.topk(3).values.sum(-1, True)), rows(DIM)),
    ("windows", Call(lambda x: x.unfold(1, 3, 2)), rows(DIM)),
    ("one-hot", Call(lambda x: F.one_hot(x.argmax(-1), DIM)), rows(DIM)),
    ("zeros", Call(lambda x: torch.zeros(x.shape[0], DIM) + x), rows(DIM)),
    ("channels by index", Call(lambda x: x[:, torch.tensor([2, 0])]), rows(DIM)),
    ("gathered features", Call(lambda x: x.gather(1, x.argsort(1))), rows(DIM)),
    ("in place", Call(lambda x: (x * 2).add_(1).relu_()), rows(DIM)),
    ("normalised", Call(lambda x: F.normalize(x, dim=-1)), rows(DIM)),
    ("split and joined", Call(lambda x: torch.cat(x.chunk(3, 1)[::-1], 1)), rows(DIM)),
]

MIXES: list[Case] = [
    ("sum over cells", Call(lambda x: x.sum(0)), rows(DIM)),
    ("mean of all", Call(lambda x: x - x.mean()), rows(DIM)),
    ("softmax over cells", nn.Softmax(0), rows(DIM)),
    ("cells with tokens merged", Call(lambda x: x.reshape(-1, DIM)), rows(LENGTH, DIM)),
    ("cells in the second dim", Call(lambda x: x.transpose(0, 1)), rows(DIM)),
    ("attention over cells", Call(lambda x, a: a(x, x, x)[0], HEADS), rows(DIM)),
    ("products of cells", Call(lambda x: x @ x.t()), rows(DIM)),
    ("one cell", Call(lambda x: x[0] + x), rows(DIM)),
    ("some cells", Call(lambda x: x[1:]), rows(DIM)),
    ("cells by a mask", Call(lambda x: x[x[:, 0] > 0]), rows(DIM)),
    ("cells sorted", Call(lambda x: x.sort(0).values), rows(DIM)),
    ("running sum", Call(lambda x: x.cumsum(0)), rows(DIM)),
    ("cells joined", Call(lambda x: torch.cat([x, x])), rows(DIM)),
    ("the number of cells", Call(lambda x: x / x.shape[0]), rows(DIM)),
    ("places of cells", Call(lambda x: x + torch.arange(x.shape[0])[:, None]), rows(DIM)),
    ("a constant per cell", Call(lambda x: x + OF_N), rows(DIM)),
    ("random numbers", Call(lambda x: x + torch.rand_like(x)), rows(DIM)),
    ("convolution of one cell", nn.Conv1d(N, 4, 3), torch.randn(N, 8)),
    ("linear of one cell", nn.Linear(N, 4), torch.randn(N)),
    ("moved and added", Call(lambda x: x + x.t().reshape(x.shape)), rows(DIM)),
    ("values that decide", Call(lambda x: x * x.sum().item()), rows(DIM)),
    ("a histogram", Call(lambda x: torch.bincount(x)), torch.randint(4, (N,))),
    (
        "code for a few cells",
        Call(lambda x: x * 2 if x.shape[0] > 5 else x),
        rows(DIM),
    ),
    ("halves of cells", Call(lambda x: x.view(-1, 2, DIM)), torch.randn(8, DIM)),
    ("cells repeated", Call(lambda x: x.repeat(2, 1)), rows(DIM)),
    ("neighbours", Call(lambda x: x + x.roll(1, 0)), rows(DIM)),
    ("mirror images", Call(lambda x: torch.stack([x, x.flip(0)], 1)), rows(DIM)),
]


@pytest.mark.parametrize(("name", "model", "x"), KEEPS, ids=[c[0] for c in KEEPS])
def test_keeps(name: str, model: nn.Module, x: Tensor) -> None:
    # As a whole module without a graph of its own, too: the layer may be any user's code
    flow = whole(model, x)
    assert flow.kind == "keeps", flow


def whole(model: nn.Module, x: Tensor, *, training: bool = False) -> Flow:
    """The flow of a module that stays one node."""
    graph = fx.Graph()
    graph.output(graph.call_module("inside", (graph.placeholder("x"),)))
    module = fx.GraphModule({"inside": model}, graph).train(training)
    (node,) = [n for n in graph.nodes if n.op == "call_module"]
    return cellflow(module, x)[node]


@pytest.mark.parametrize(("name", "model", "x"), MIXES, ids=[c[0] for c in MIXES])
def test_mixes(name: str, model: nn.Module, x: Tensor) -> None:
    inside = whole(model, x)
    assert inside.kind == "mixes", inside
    assert inside.reason
    try:
        trace(model)
    except brt.TraceError:
        return
    if name not in ("neighbours", "mirror images"):  # two nodes there: one permutes, one keeps
        assert worst(model, x).kind == "mixes"


def test_training_mode() -> None:
    assert whole(nn.BatchNorm1d(DIM), rows(DIM), training=True).kind == "mixes"
    assert whole(nn.Dropout(), rows(DIM), training=True).kind == "mixes"
    assert whole(nn.InstanceNorm1d(3), rows(3, DIM), training=True).kind == "keeps"


@pytest.mark.parametrize("function", [lambda x: x.flip(0), lambda x: x.roll(2, 0)])
def test_permutes(function: Callable[[Tensor], Tensor]) -> None:
    assert worst(Call(function), rows(DIM)).kind == "permutes"


def test_an_operator_without_a_rule_mixes() -> None:
    with torch.library._scoped_library("brt_test", "DEF") as library:
        library.define("same(Tensor x) -> Tensor")
        library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")
        flow = worst(Call(lambda x: torch.ops.brt_test.same(x)), rows(DIM))
    assert flow == Flow("mixes", "brt_test::same has no rule")


@pytest.mark.parametrize("num_cells", [0, 1, 2])
def test_any_number_of_cells_in_the_sample(num_cells: int) -> None:
    for name, model, x in KEEPS[:12]:
        few = x[:1].expand(num_cells, *x.shape[1:])
        assert whole(model, few).kind == "keeps", name


def test_without_a_sample_only_what_holds_for_any_shape_is_known() -> None:
    graph = trace(nn.Sequential(nn.ReLU(), nn.Linear(DIM, DIM)))
    kinds = {node.name: flow.kind for node, flow in cellflow(graph).items()}
    assert kinds == {"input_1": "keeps", "_0": "keeps", "_1": "mixes", "output": "keeps"}


def test_a_node_that_cannot_run_without_data_takes_the_sample_s_shapes() -> None:
    class Closed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x if x.sum() > 0 else x

    model = nn.Sequential(Closed(), nn.Linear(DIM, DIM), nn.Softmax(0))
    flows = {node.name: flow for node, flow in cellflow(trace(model), rows(DIM)).items()}
    assert flows["_0"].kind == "mixes"
    assert "DataDependent" in flows["_0"].reason or "data" in flows["_0"].reason
    assert flows["_1"].kind == "keeps"
    assert flows["_2"].kind == "mixes"


class Cross(nn.Module):
    """Queries of one kind of cells to those of another."""

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        weights: Tensor = (queries @ keys.t()).softmax(-1)
        return weights @ keys


def test_the_rows_of_every_input_must_be_kept_apart() -> None:
    graph = fx.Graph()
    inputs = (graph.placeholder("queries"), graph.placeholder("keys"))
    graph.output(graph.call_module("cross", inputs))
    flows = cellflow(
        fx.GraphModule({"cross": Cross()}, graph), (torch.randn(5, 4), torch.randn(9, 4))
    )
    assert [flow.kind for node, flow in flows.items() if node.op == "call_module"] == ["mixes"]


def test_what_comes_from_the_shape_of_a_cell_is_constant() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(LENGTH, DIM)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.table(torch.arange(x.shape[1]))
            return y

    assert worst(Positions(), rows(LENGTH, DIM)).kind == "keeps"


def test_bad_input() -> None:
    with pytest.raises(brt.TraceError, match=r"brt\.trace"):
        cellflow(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(brt.TraceError, match="no value for input 'input'"):
        cellflow(trace(nn.Sequential(nn.ReLU())), ())


# Routers


class Moe(nn.Module):
    def __init__(self, protocol: Any = None, expert: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 3)
        self.scatter = brt.ScatterRouter(protocol or TopK(2), 3)
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM), nn.Identity(), expert or nn.ReLU()])
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        return self.gather(brt.each(self.experts, paths), route)


def kinds(model: nn.Module, x: Tensor) -> dict[str, str]:
    found = cellflow(trace(model.eval()), x)
    names: dict[str, str] = {}
    for node, flow in found.items():
        names[str(node.target) if node.op == "call_module" else node.name] = flow.kind
    return names


def test_routers() -> None:
    found = kinds(Moe(), rows(DIM))
    assert (found["scatter"], found["each"], found["gather"]) == ("permutes", "keeps", "permutes")
    assert kinds(Moe(Threshold(0.4)), rows(DIM))["scatter"] == "permutes"


def test_cells_that_compete_are_mixed() -> None:
    assert kinds(Moe(CapacityTopK(1, capacity_factor=1.0)), rows(DIM))["scatter"] == "mixes"
    assert kinds(Moe(brt.protocols.ExpertChoice(1.0)), rows(DIM))["scatter"] == "mixes"
    assert kinds(Moe(Random(1)), rows(DIM))["scatter"] == "mixes"


def test_each_is_as_its_worst_module() -> None:
    found = cellflow(trace(Moe(expert=nn.Softmax(0))), rows(DIM))
    (flow,) = [flow for node, flow in found.items() if node.target is brt.each]
    assert flow.kind == "mixes"
    assert flow.reason.startswith("path 2: ")


def test_rows_of_a_union_are_cells_of_their_own() -> None:
    class Union(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = Moe()
            self.union = brt.GatherRouter(result="union")
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Any:
            cells, grid = brt.annotate(x, 0)
            paths, route = self.moe.scatter(cells, self.moe.gate(cells), grid.cells)
            some, where = self.union([paths[0], paths[2]], [route[0], route[2]])
            again, last = self.moe.scatter(self.linear(some), self.moe.gate(some), where)
            return self.moe.gather([again[0], again[1]], [last[0], last[1]]) + cells

    found = kinds(Union(), rows(DIM))
    assert found["union"] == "permutes"
    assert found["linear"] == "keeps"
    assert found["add"] == "keeps", "the last gather gives the root's cells again"


def test_losses_and_what_is_asked_of_a_route() -> None:
    class WithLoss(Moe):
        def forward(self, x: Tensor) -> Any:
            probs = self.gate(x).softmax(-1)
            _, route = self.scatter(x, probs)
            return brt.losses.load_balance(route, probs) * 2, route.load_P, x * 2

    found = kinds(WithLoss(), rows(DIM))
    assert found["load_balance"] == "mixes"
    assert found["getattr_1"] == "mixes"
    assert found["mul_1"] == "keeps"


def test_exits_and_loops() -> None:
    class Model(nn.Module):
        def __init__(self, stage: nn.Module, protocol: Any = None) -> None:
            super().__init__()
            stages = [nn.Linear(DIM, DIM), stage]
            self.exit = brt.EarlyExit(stages, [nn.Linear(DIM, 2) for _ in stages])
            self.loop = brt.LoopRouter(Netlet(stage), max_steps=2)

        def forward(self, x: Tensor) -> Any:
            return self.exit(x), self.loop(x, (x,))

    class OnRows(nn.Module):
        """A stage that a trace cannot open, and of which nobody knows what it gives."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) if x.ndim == 2 and len(x.shape) == 2 else x

    class Netlet(nn.Module):
        def __init__(self, step: nn.Module) -> None:
            super().__init__()
            self.step, self.gate = step, nn.Linear(DIM, 2)

        def forward(self, x: Tensor, state: Any) -> Any:
            return self.step(x), self.gate(x), state

    good = kinds(Model(nn.Linear(DIM, DIM)), rows(DIM))
    assert "mixes" not in good.values()
    assert good["loop"] == "keeps"
    bad = kinds(Model(nn.Softmax(0)), rows(DIM))
    assert bad["loop"] == "mixes"
    assert list(bad.values()).count("mixes") > 1, "and the exit's stage"
    closed = kinds(Model(OnRows(nn.Linear(DIM, DIM))), rows(DIM))
    assert (closed["exit"], closed["loop"]) == ("keeps", "keeps")
    closed = kinds(Model(OnRows(nn.Softmax(0))), rows(DIM))
    assert (closed["exit"], closed["loop"]) == ("mixes", "mixes")


# Random modules


Step = Callable[[Any, Tensor], Tensor]


def _parts(rng: random.Random) -> list[Step]:
    """What a random module is made of; some steps cannot run everywhere."""
    dim, dim3, new_dim = rng.choice([0, 1, -1]), rng.choice([0, 1, 2]), rng.choice([1, 2])
    two = rng.sample(range(3), 2)
    return [
        lambda m, x: m.linear(x),
        lambda m, x: m.norm(x),
        lambda m, x: m.batch_norm(x),
        lambda m, x: x.view(x.shape[0], 3, -1),
        lambda m, x: x.t() @ x,
        lambda m, x: x @ x.t() @ x,
        lambda m, x: x[:, m.index] * 2,
        lambda m, x: x[m.index],
        lambda m, x: x.gather(1, x.argsort(1)),
        lambda m, x: torch.stack([x, x * 2, -x], new_dim),
        lambda m, x: m.conv(x),
        lambda m, x: m.heads(x, x, x)[0],
        lambda m, x: m.instance(x),
        lambda m, x: x.transpose(*two).contiguous().transpose(*two),
        lambda m, x: x.transpose(*two),
        lambda m, x: x.permute(1, 2, 0).reshape(x.shape[1], -1),
        lambda m, x: x.flatten(1),
        lambda m, x: x.reshape(-1, x.shape[-1]),
        lambda m, x: torch.einsum("nld,nmd->nlm", x, x),
        lambda m, x: torch.bmm(x, x.transpose(1, 2)),
        lambda m, x: x.amax(dim3),
        lambda m, x: x.sum(1),
        lambda m, x: x.unbind(1)[0],
        lambda m, x: x.select(dim3, 0),
        lambda m, x: x.relu(),
        lambda m, x: torch.where(x > 0, x, x.exp().clamp(max=3)),
        lambda m, x: x.softmax(dim),
        lambda m, x: x - x.mean(dim, keepdim=True),
        lambda m, x: x.cumsum(dim),
        lambda m, x: x.sort(dim).values,
        lambda m, x: x.flip(dim),
        lambda m, x: x.roll(1, dim),
        lambda m, x: torch.cat([x, x + 1], dim),
        lambda m, x: x * x.shape[0],
        lambda m, x: x + torch.ones(x.shape[0]).sum(),
        lambda m, x: x.masked_fill(x < 0, 0.5).tril(),
        lambda m, x: x / (1 + x.std()),
        lambda m, x: (x * 1.5).add_(x).mul_(0.5),
        lambda m, x: F.normalize(x, dim=dim),
        lambda m, x: x.unsqueeze(0).squeeze(0),
        lambda m, x: x.narrow(dim, 0, x.shape[dim] - 1),
        lambda m, x: torch.zeros_like(x) + x,
        lambda m, x: x.clone().index_fill_(dim, m.zero, 2.0),
    ]


class RandomModule(nn.Module):
    """A few random steps, each of which any earlier result may enter."""

    index: Tensor
    zero: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        rng = self.rng
        self.rank = rng.choice([2, 3])
        self.linear = nn.Linear(DIM, DIM)
        self.norm, self.batch_norm = nn.LayerNorm(DIM), nn.BatchNorm1d(DIM)
        self.conv = nn.Conv1d(LENGTH, LENGTH, 3, padding=1)
        self.heads = HEADS
        self.instance = nn.InstanceNorm1d(LENGTH, affine=True)
        self.register_buffer("index", torch.tensor([3, 1, 0, 2]))
        self.register_buffer("zero", torch.tensor([0]))
        self.steps: list[tuple[Step, bool]] = []

    def sample(self, num_cells: int = N) -> Tensor:
        return torch.randn(num_cells, *((LENGTH,) if self.rank == 3 else ()), DIM)

    def grow(self, num_steps: int) -> None:
        """Add steps that can run."""
        x = self.sample()
        while len(self.steps) < num_steps:
            step = self.rng.choice(_parts(self.rng))
            self.steps.append((step, self.rng.random() < 0.2))
            try:
                with torch.no_grad():
                    out = self.eval()(x)
                good = out.ndim >= 2 and out.numel() > 0 and out.numel() < 20_000
            except (RuntimeError, IndexError, ValueError, AssertionError):
                good = False
            if not good:
                self.steps.pop()

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for step, adds in self.steps:
            y = step(self, x)
            before, x = x, y + before if adds else y
        return x


class Inputs(fx.Interpreter):
    """Keeps what every node was given, and what it gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, tuple[Any, Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        copied = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        out = super().run_node(n)
        self.seen[n] = (*copied, pytree.tree_map_only(Tensor, torch.clone, out))
        return out


def again(runner: Inputs, node: fx.Node, change: Callable[[Tensor], Tensor]) -> Any:
    """Run a node once more, on what it was given with the cells of its tensors changed."""
    args, kwargs, _ = runner.seen[node]
    constant = {n for n in node.all_input_nodes if n.op == "get_attr"}
    places = [a for a in node.args if isinstance(a, fx.Node) and a in constant]
    args = [
        value if node.args[i] in places else pytree.tree_map_only(Tensor, change, value)
        for i, value in enumerate(args)
    ]
    args = pytree.tree_map_only(Tensor, torch.clone, args)
    with torch.no_grad():
        return getattr(runner, node.op)(node.target, tuple(args), dict(kwargs))


def changed_rows(a: Any, b: Any, num_rows: int) -> set[int]:
    found = set()
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and x.ndim and x.shape[0] == num_rows:
            same = torch.isclose(x, y, rtol=1e-3, atol=1e-4, equal_nan=True)
            same |= x == y
            found |= set((~same.reshape(num_rows, -1).all(1)).nonzero().flatten().tolist())
        elif isinstance(x, Tensor) and not torch.allclose(x, y, rtol=1e-3, equal_nan=True):
            found |= set(range(num_rows))
    return found


def check_node(runner: Inputs, node: fx.Node, flow: Flow, told: Counter[str]) -> None:
    _, _, out = runner.seen[node]
    leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    if not leaves or leaves[0].ndim == 0:
        return
    num_rows = leaves[0].shape[0]
    reached: dict[int, set[int]] = {}
    for cell in range(num_rows):

        def change(x: Tensor, cell: int = cell) -> Tensor:
            x = x.clone()
            if x.ndim and x.shape[0] == num_rows and x.is_floating_point():
                x[cell] = x[cell] * -3 + 50
            return x

        reached[cell] = changed_rows(out, again(runner, node, change), num_rows)
    apart = all(rows <= {cell} for cell, rows in reached.items())
    from_one = all(n <= 1 for n in Counter(r for rows in reached.values() for r in rows).values())
    told[f"{flow.kind}, and does" if apart or flow.kind != "keeps" else "wrong"] += 1
    told["keeps in truth"] += apart
    if flow.kind == "keeps":
        assert apart, (node.format_node(), flow, reached)
    elif flow.kind == "permutes":
        assert from_one, (node.format_node(), flow, reached)


@pytest.mark.parametrize("group", range(10))
def test_random_modules(group: int) -> None:
    told: Counter[str] = Counter()
    for seed in range(group * 20, group * 20 + 20):
        torch.manual_seed(seed)
        model = RandomModule(seed)
        model.grow(4)
        x = model.sample()
        graph = trace(model)
        flows = cellflow(graph, x)
        runner = Inputs(graph)
        with torch.no_grad():
            runner.run(x)
        for node, flow in flows.items():
            if node.op in ("call_module", "call_function", "call_method"):
                check_node(runner, node, flow, told)
        if all(flow.kind == "keeps" for flow in flows.values()):
            some = torch.tensor([4, 1, 5])
            with torch.no_grad():
                torch.testing.assert_close(
                    graph(x)[some], graph(x[some]), rtol=1e-3, atol=1e-4, equal_nan=True
                )
            told["whole modules that keep"] += 1
    assert told["whole modules that keep"] > 0
    assert told["keeps, and does"] > 0.7 * told["keeps in truth"], told
