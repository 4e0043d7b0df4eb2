"""Running passes: order, records, errors, and the comparison with the original."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from dynamic_models import DIM, Mixture, Residual, to_paths
from torch import Tensor, fx, nn

import brt
from brt import plugins
from brt.optimize import optimize
from brt.passes import BUILTIN, DEFAULT, Context, DropDeadPaths, FoldPermanentPaths, Pass, Record
from brt.passes.run import order, resolve
from brt.passes.verify import Moved, allowed, cloned, largest_error, without_traces
from brt.profile import profile

X = to_paths([0, 1, 1])


@dataclass(frozen=True)
class Nothing(Pass):
    """Change nothing."""

    name: ClassVar[str] = "acme-nothing"

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        ctx.note("looked")
        ctx.leave("everything", "it is fine")
        return False


@dataclass(frozen=True)
class Doubling(Pass):
    """Double the first linear layer's result by another node."""

    name: ClassVar[str] = "acme-doubling"
    by: float = 2.0
    allowed: float = 0.0

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        node = next(n for n in graph.graph.nodes if str(n.target).startswith("head"))
        with graph.graph.inserting_after(node):
            new = graph.graph.call_function(torch.mul, (node, self.by))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return True

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        return (self.allowed, self.allowed) if self.allowed else super().tolerance(dtype)


def named(name: str, *after: str, act: Any = None) -> Pass:
    """A pass of this name that runs after others, and does something."""

    @dataclass(frozen=True)
    class Made(Pass):
        """One."""

        def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
            return bool(act(graph, ctx)) if act is not None else False

    Made.name, Made.after = name, after
    return Made()


def names(passes: Any) -> list[str]:
    return [one.name for one in passes]


def test_order_is_the_user_s_bent_by_after() -> None:
    a, b, c, d = named("a"), named("b", "d", "unknown"), named("c"), named("d")
    assert names(order([a, b, c, d])) == ["a", "c", "d", "b"]
    assert names(order([d, c, b, a])) == ["d", "c", "b", "a"]
    assert order([]) == ()


def test_a_cycle_lists_its_members() -> None:
    passes = [named("a", "c"), named("b", "a"), named("c", "b"), named("d", "a"), named("e")]
    with pytest.raises(brt.PassError) as caught:
        order(passes)
    message = str(caught.value)
    assert "a after c after b after a" in message
    assert "'d'" not in message
    assert "e" not in message.split(":")[1].split(";")[0].split()
    with pytest.raises(brt.PassError, match="x after x"):
        order([named("x", "x")])


def test_resolve_takes_names_and_instances() -> None:
    assert resolve(["drop-dead-paths"]) == (DropDeadPaths(),)
    assert names(resolve([FoldPermanentPaths(), "drop-dead-paths"])) == [
        "drop-dead-paths",
        "fold-permanent-paths",
    ]
    assert set(DEFAULT) <= {made.name for made in BUILTIN}
    for given, what in (
        ("drop-dead-paths", "takes a list"),
        ([DropDeadPaths], r"make one: DropDeadPaths\(\)"),
        ([3], "got 3"),
        ([DropDeadPaths(), "drop-dead-paths"], "name each once"),
    ):
        with pytest.raises(brt.PassError, match=what):
            resolve(given)  # type: ignore[arg-type]


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(brt.PluginError, match="did you mean 'drop-dead-paths'"):
        resolve(["drop-ded-paths"])


def test_third_parties_offer_passes() -> None:
    module = ModuleType("acme")
    records: list[tuple[Record, bool]] = []

    @brt.hookimpl
    def brt_passes() -> list[brt.PassSpec]:
        return [brt.PassSpec.of(Nothing)]

    @brt.hookimpl
    def brt_pass_ran(record: Record, graph: fx.GraphModule) -> None:
        records.append((record, isinstance(graph, fx.GraphModule)))

    module.brt_passes, module.brt_pass_ran = brt_passes, brt_pass_ran  # type: ignore[attr-defined]
    model = Mixture()
    with plugins.using(module):
        fast = optimize(
            model, profile(model, [X]), passes=["drop-dead-paths", "acme-nothing"], sample=X
        )
    assert [record for record, _ in records] == list(fast.report.records)
    assert all(is_graph for _, is_graph in records)
    record = fast.report.records[1]
    assert (record.name, record.notes) == ("acme-nothing", ("looked",))
    assert record.left[0].what == "everything"
    assert not record.changed
    assert record.nodes_before == record.nodes_after > 0


def test_an_observer_that_raises_is_a_warning() -> None:
    module = ModuleType("acme")

    @brt.hookimpl
    def brt_pass_ran(record: Record) -> None:
        raise RuntimeError("no")

    module.brt_pass_ran = brt_pass_ran  # type: ignore[attr-defined]
    with plugins.using(module), pytest.warns(brt.PluginWarning, match="acme failed"):
        optimize(Residual(), passes=[Nothing()], sample=X)


def test_the_first_pass_that_moves_the_result_is_named() -> None:
    with pytest.raises(
        brt.PassError, match=r"'acme-doubling' changed the result of the model: out"
    ):
        optimize(Residual(), passes=[Nothing(), Doubling()], sample=X)
    fast = optimize(Residual(), passes=[Doubling(1 + 1e-3, allowed=1e-2)], sample=X)
    assert 0 < (fast.report.records[0].max_error or 0) < 1e-2
    assert fast.report.max_error == fast.report.records[0].max_error
    with pytest.raises(brt.PassError, match="differs by up to"):
        optimize(Residual(), passes=[Doubling(1 + 1e-3)], sample=X)


def test_without_verification_nothing_is_compared() -> None:
    for kwargs in ({"sample": X, "verify": False}, {}):
        fast = optimize(Residual(), passes=[Doubling()], **kwargs)  # type: ignore[arg-type]
        assert not fast.report.verified
        assert fast.report.max_error is None
        assert fast.report.records[0].max_error is None
        assert "not verified" in str(fast.report)


def test_a_pass_that_fails_is_named_with_those_before_it() -> None:
    def fail(graph: fx.GraphModule, ctx: Context) -> bool:
        raise KeyError("oh")

    wanted = re.escape("pass 'bad' failed on the model, after ['acme-nothing']: KeyError: 'oh'")
    with pytest.raises(brt.PassError, match=wanted) as caught:
        optimize(Residual(), passes=[Nothing(), named("bad", act=fail)], sample=X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_graph_that_breaks_is_named() -> None:
    def breaks(graph: fx.GraphModule, ctx: Context) -> bool:
        node = next(n for n in graph.graph.nodes if n.target == "head")
        node.args = (graph.graph.placeholder("more") if False else 3,)
        return True

    with pytest.raises(brt.PassError, match="after pass 'bad' the model no longer runs"):
        optimize(Residual(), passes=[named("bad", act=breaks)], sample=X)


def test_names_of_the_state_must_stay() -> None:
    def renames(graph: fx.GraphModule, ctx: Context) -> bool:
        graph.add_submodule("brt_more", nn.Linear(2, 2))
        node = next(n for n in graph.graph.nodes if n.op == "output")
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module("brt_more", (node.args[0],))
        node.args = (new,)
        return True

    with pytest.raises(brt.PassError, match="'bad' inserts a Linear with weights of its own"):
        optimize(Residual(), passes=[named("bad", act=renames)], sample=X)

    def deeper(graph: fx.GraphModule, ctx: Context) -> bool:
        graph.add_submodule("mixture.branches.3", nn.ReLU())
        return True

    with pytest.raises(brt.PassError, match=r"changed the modules.*new \['mixture.branches.3'\]"):
        optimize(Residual(), passes=[named("bad", act=deeper)], sample=X)

    def loses(graph: fx.GraphModule, ctx: Context) -> bool:
        del ctx.scope.mixture.branches[2]  # type: ignore[union-attr]
        return True

    with pytest.raises(brt.PassError, match=r"failed on the model.*nonexistent"):
        optimize(Residual(), passes=[named("bad", act=loses)])

    def inserts(graph: fx.GraphModule, ctx: Context) -> bool:
        ctx.insert(graph, nn.Linear(2, 2), "more")
        return True

    with pytest.raises(brt.PassError, match="with weights of its own"):
        optimize(Residual(), passes=[named("bad", act=inserts)], sample=X)


def test_inserted_modules_that_nothing_calls_are_removed() -> None:
    def inserts(graph: fx.GraphModule, ctx: Context) -> bool:
        guard = ctx.guard("head", "nothing")
        name = ctx.insert(graph, brt.guard.Guarded(guard, ctx.scope), "brt_idle")
        assert name == "brt_idle_0"
        assert ctx.insert(graph, brt.guard.Guarded(guard, ctx.scope), "brt_idle") == "brt_idle_1"
        return True

    fast = optimize(Residual(), passes=[named("idle", act=inserts)], sample=X)
    assert not fast.inserted
    assert not hasattr(fast, "brt_idle_0")


def test_work_in_place_survives_the_clean_up() -> None:
    class InPlace(Mixture):
        def forward(self, x: Tensor) -> Any:
            x = x * 1
            x.add_(1)
            x[:, 0].mul_(2)
            torch.relu_(x)
            return super().forward(x)

    model = InPlace()
    fast = optimize(model, profile(model, [X]), passes=[Nothing(), DropDeadPaths()], sample=X)
    assert torch.equal(fast(X), model(X))


def test_refusals_are_recorded_and_warned_about_where_named() -> None:
    class Refusing(Nothing):
        """Refuse."""

        def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
            raise brt.PassError("not this one")

    with pytest.warns(brt.PluginWarning, match="refused every region: not this one"):
        fast = optimize(Residual(), passes=[Refusing()], sample=X)
    (record,) = fast.report.records
    assert record.refused == "not this one"
    assert "not this one" in str(record)
    model = Mixture().train()
    fast = optimize(model, profile(model.eval(), [X]), sample=X)  # no warning: nothing was named
    assert fast.report.records


def test_context_names_things_in_the_model() -> None:
    ctx = Context("acme", "blocks.3", nn.Module())
    assert ctx.path("scatter") == "blocks.3.scatter"
    assert ctx.path("") == "blocks.3"
    assert Context("acme", "", nn.Module()).path("scatter") == "scatter"
    assert ctx.guard("scatter[1]", "b").name == "acme:blocks.3.scatter[1]"


@dataclass(frozen=True)
class Pair:
    a: Any
    b: Any


@pytest.mark.parametrize("short", [False, True])
def test_tf32_is_allowed_for(short: bool) -> None:
    def found(dtype: torch.dtype, device: str) -> tuple[float, float]:
        with torch.backends.cudnn.flags(allow_tf32=short):
            return allowed(lambda _: (1e-5, 1e-6), dtype, torch.device(device))

    assert found(torch.float32, "cuda") == (1.6e-2 if short else 1e-5, 1e-6)
    assert found(torch.float64, "cuda") == found(torch.float32, "cpu") == (1e-5, 1e-6)
    assert allowed(lambda _: (0.1, 0.0), torch.float32, torch.device("cuda")) == (0.1, 0.0)


def test_largest_error_looks_into_everything() -> None:
    def exact(dtype: torch.dtype) -> tuple[float, float]:
        return 0.0, 0.5

    one = torch.tensor([1.0, float("nan"), float("inf")])
    other = torch.tensor([1.25, float("nan"), float("inf")])
    for found, wanted in (
        (other, one),
        ((other, 3), (one, 3)),
        ([other], (one,)),
        ({"a": other}, {"a": one}),
        (Pair(other, None), Pair(one, None)),
    ):
        assert largest_error(found, wanted, exact) == 0.25
    for found, wanted, what in (
        (one + 1, one, r"output \(float32\[3\]\) differs by up to 1"),
        ((one, one[:1]), (one, one), r"output\[1\] is float32\[1\] instead of float32\[3\]"),
        (one.double(), one, "float64"),
        ({"a": one}, {"b": one}, "dict"),
        (None, one, "NoneType"),
        ((one, 3), (one, 4), r"output\[1\] is 3 instead of 4"),
        (Pair(one, 1), (one, 1), "Pair"),
        ((one,), (one, one), "tuple of 1 instead of tuple of 2"),
        (torch.tensor([True]), torch.tensor([False]), "differs"),
        (torch.tensor([1]), torch.tensor([3]), "differs"),
        (torch.tensor([1.0]), torch.tensor([float("inf")]), "up to inf"),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), "differs"),
    ):
        with pytest.raises(Moved, match=what):
            largest_error(found, wanted, exact)
    assert largest_error(float("nan"), float("nan"), exact) == 0.0

    def relative(dtype: torch.dtype) -> tuple[float, float]:
        return 1e-3, 0.0

    rows = torch.tensor([[1000.0, 1.0], [1.0, 1.0]])
    assert largest_error(rows + torch.tensor([[0, 0.5], [0, 0]]), rows, relative) == 0.5
    with pytest.raises(Moved):
        largest_error(rows + torch.tensor([[0, 0], [0.5, 0]]), rows, relative)
    turned = torch.tensor([1 + 1j])
    assert largest_error(turned, turned, exact) == 0.0
    assert largest_error(torch.zeros(0, 3), torch.zeros(0, 3), exact) == 0.0
    roots = [brt.Cells.of(3) for _ in range(2)]
    assert roots[0].root != roots[1].root
    assert largest_error(*roots, exact) == 0.0


def test_cloned_values_share_nothing() -> None:
    given = {"a": [torch.ones(2), (torch.ones(1), "b")], "c": brt.Cells(brt.Root(1), torch.ones(1))}
    twin = cloned(given)
    twin["a"][0].zero_()
    twin["a"][1][0].zero_()
    twin["c"].cell_R.zero_()
    assert float(given["a"][0].sum() + given["a"][1][0].sum() + given["c"].cell_R.sum()) == 4.0  # type: ignore[union-attr]


def test_sample_runs_leave_no_traces() -> None:
    model = nn.Sequential(nn.BatchNorm1d(DIM), nn.Dropout(0.5)).train()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.random.get_rng_state()
    with without_traces(model):
        first = model(X)
        assert not first.requires_grad
    with without_traces(model):
        assert torch.equal(model(X), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])
