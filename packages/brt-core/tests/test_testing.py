"""The contract checks: what brt offers keeps the rules, and each broken rule is named.

Legend: N cells, P paths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from dynamic_models import DIM, Mixture, Residual, to_paths
from torch import Tensor, fx, nn

import brt
from brt import ops, protocols, reference
from brt.decision import Decision
from brt.passes import Context, DropDeadPaths, FoldPermanentPaths, Pass
from brt.testing import check_kernel, check_pass, check_protocol, check_router

X = to_paths([0, 1, 1])

# Protocols


@pytest.mark.parametrize(
    "protocol",
    [
        protocols.TopK(2),
        protocols.TopK(1, renormalise=True),
        protocols.Threshold(0.3),
        protocols.Threshold(0.3, residual_path=1),
        protocols.CapacityTopK(2),
        protocols.Switch(),
        protocols.ExpertChoice(),
        protocols.Random(),
    ],
    ids=lambda p: p.name,
)
def test_protocols_of_brt_keep_the_rules(protocol: protocols.Protocol) -> None:
    check_protocol(protocol)


def test_protocols_of_ids_keep_the_rules() -> None:
    def ids(num_cells: int, num_paths: int) -> Tensor:
        return torch.arange(num_cells) % num_paths

    check_protocol(protocols.Label(), scores=ids)
    check_protocol(protocols.Hash(num_tasks=4), scores=ids)


@dataclass(frozen=True)
class First(protocols.Protocol):
    """Every cell takes path 0."""

    name: ClassVar[str] = "acme-first"
    paper: ClassVar[str] = "none"

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        return Decision(num_paths, choice_NK=torch.zeros(len(scores), 1, dtype=torch.int64))

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        return num_cells


def choosing(make: Callable[[Tensor, int], Decision], **fields: Any) -> protocols.Protocol:
    @dataclass(frozen=True)
    class Odd(First):
        """Odd."""

        def decide(self, scores: Tensor, num_paths: int) -> Decision:
            return make(scores, num_paths)

    for name, value in fields.items():
        setattr(Odd, name, value)
    return Odd()


def chosen(*columns: int) -> Callable[[Tensor, int], Decision]:
    def make(scores: Tensor, num_paths: int) -> Decision:
        return Decision(
            num_paths,
            choice_NK=torch.tensor([columns] * len(scores), dtype=torch.int64).view(
                -1, len(columns)
            ),
        )

    return make


def drawn(scores: Tensor, num_paths: int) -> Decision:
    return Decision(num_paths, choice_NK=torch.randint(0, num_paths, (len(scores), 1)))


def scribbled(scores: Tensor, num_paths: int) -> Decision:
    scores.zero_()
    return chosen(0)(scores, num_paths)


def best(scores: Tensor, num_paths: int) -> Decision:
    return Decision(num_paths, choice_NK=scores.argmax(-1, keepdim=True).clamp(max=num_paths - 1))


class BlindTopK(protocols.TopK):
    """Lets NaN pass."""

    def check(self, scores: Tensor, num_paths: int) -> None:
        if not scores.isnan().any():
            super().check(scores, num_paths)


def detached(scores: Tensor, num_paths: int) -> Decision:
    decision = chosen(0)(scores, num_paths)
    return dataclasses.replace(decision, weight=torch.ones(len(scores), 1))


def test_a_small_protocol_keeps_the_rules() -> None:
    check_protocol(First())


@pytest.mark.parametrize(
    ("protocol", "rule"),
    [
        (lambda: 3, r"is a brt\.protocols\.Protocol"),
        (lambda: choosing(chosen(0), name="Not Kebab"), "kebab-case"),
        (lambda: choosing(chosen(0), paper=""), "names its source"),
        (lambda: choosing(chosen(9)), "chooses a path in range"),
        (lambda: choosing(chosen(1, 1)), "at most once"),
        (lambda: choosing(lambda s, p: 3), "returns a brt.Decision"),
        (lambda: choosing(lambda s, p: chosen(0)(s[:1], p)), "about every cell"),
        (lambda: choosing(lambda s, p: chosen(0)(s, p + 1)), "paths that it is asked about"),
        (lambda: choosing(scribbled), "leaves the scores as they are"),
        (lambda: choosing(drawn), "is `stochastic`"),
        (lambda: choosing(detached), "differentiable in the scores"),
        (lambda: choosing(chosen(0, 1)), "max_rows"),
        (lambda: choosing(best, check=lambda *_: None), "refuses NaN by a ProtocolError"),
        (lambda: choosing(lambda s, p: s[5] and None), "decides for any number of cells"),
    ],
)  # fmt: skip
def test_a_protocol_that_breaks_a_rule(protocol: Callable[[], Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_protocol(protocol())


def test_nan_must_be_refused_by_who_looks() -> None:
    check_protocol(protocols.Uniform())
    with pytest.raises(AssertionError, match="refuses NaN by a ProtocolError"):
        check_protocol(BlindTopK(1))


def test_options_of_a_protocol_are_frozen() -> None:
    class Loose(First):
        """Loose."""

        __dataclass_params__ = None  # type: ignore[assignment]

    with pytest.raises(AssertionError, match="frozen dataclass"):
        check_protocol(Loose())


# Routers


def scattered(num_cells: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(num_cells)
    x = torch.randn(num_cells, DIM, generator=made)
    return x, x[:, :3].softmax(-1)


def test_routers_of_brt_keep_the_rules() -> None:
    for settings in ({}, {"weighted": True}, {"result": "packed"}):
        check_router(brt.ScatterRouter(protocols.TopK(2), 3, **settings), scattered)  # type: ignore[arg-type]
    check_router(brt.ScatterRouter(protocols.Random(), 3), scattered)
    layers = [nn.Linear(DIM, DIM) for _ in range(2)]
    check_router(brt.EarlyExit(layers, layers).eval(), lambda n: (torch.randn(n, DIM),))
    scatter = brt.ScatterRouter(protocols.TopK(2), 3)
    check_router(brt.GatherRouter(), lambda n: scatter(*scattered(n)))


class OddScatter(brt.ScatterRouter):
    def __init__(self, change: Callable[[Any, brt.Route, Tensor], Any]) -> None:
        super().__init__(protocols.TopK(1), 3)
        self.change = change

    def forward(self, x: Any, scores: Tensor, cells: Any = None) -> Any:
        paths, route = super().forward(x, scores, cells)
        return self.change(paths, route, x)


class Silent(OddScatter):
    def _observe(self, route: brt.Route, scores: Tensor) -> None:
        pass


class Deaf(OddScatter):
    def _observe(self, route: brt.Route, scores: Tensor) -> None:
        self.kept = [*getattr(self, "kept", []), *self._observers.values()]
        for observer in self.kept:
            observer(self, route, scores)


class Uncopied(OddScatter):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no")


def kept_one(paths: Any, route: brt.Route, x: Tensor) -> Any:
    return paths, route


@pytest.mark.parametrize(
    ("router", "rule"),
    [
        (lambda: nn.Linear(2, 2), r"is a brt\.routers\.Router"),
        (lambda: OddScatter(lambda p, r, x: (p[:1], r)), "rows of every path"),
        (lambda: OddScatter(lambda p, r, x: ([q[:0] for q in p], r)), "as many rows as its load"),
        (lambda: OddScatter(lambda p, r, x: (p, r, x)), "other memory at the next call"),
        (lambda: OddScatter(lambda p, r, x: (x.zero_(), p, r)[1:]), "leaves its input"),
        (lambda: OddScatter(lambda p, r, x: (p, r, torch.rand(3))), "the same for the same input"),
        (lambda: OddScatter(lambda p, r, x: (p, r, x[0] * 2)), "any number of cells"),
        (lambda: Silent(kept_one), "tells its observers of each decision once"),
        (lambda: Deaf(kept_one), "forgets an observer"),
        (lambda: Uncopied(kept_one), "survives copy.deepcopy"),
    ],
)
def test_a_router_that_breaks_a_rule(router: Callable[[], Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_router(router(), scattered)


# Passes


def test_passes_of_brt_keep_the_rules() -> None:
    for one in (DropDeadPaths(), FoldPermanentPaths()):
        check_pass(one, Residual(), [X, to_paths([0])], others=[to_paths([2, 1]), to_paths([])])
        check_pass(one, Mixture(), [{"x": to_paths([1, 1])}])


def doing(act: Callable[[fx.GraphModule, Context], Any], **fields: Any) -> Pass:
    @dataclass(frozen=True)
    class Odd(Pass):
        """Odd."""

        name: ClassVar[str] = "acme-odd"

        def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
            return act(graph, ctx)  # type: ignore[no-any-return]

    for name, value in fields.items():
        setattr(Odd, name, value)
    return Odd()


def multiply(graph: fx.GraphModule, by: float) -> bool:
    node = next(n for n in graph.graph.nodes if n.op == "output")
    result = node.args[0]
    with graph.graph.inserting_before(node):
        node.args = (graph.graph.call_function(torch.mul, (result, by)),)
    return True


def multiply_once(graph: fx.GraphModule, by: float) -> bool:
    node = next(n for n in graph.graph.nodes if n.op == "output")
    return node.args[0].target is not torch.mul and multiply(graph, by)


def dead_from_the_profile(graph: fx.GraphModule, ctx: Context) -> bool:
    """Drop what the profile did not see, without a guard."""
    node = next(n for n in graph.graph.nodes if str(n.target).endswith("branches.2.1"))
    if not node.users:
        return False
    with graph.graph.inserting_after(node):
        node.replace_all_uses_with(graph.graph.call_function(torch.zeros, ((0, DIM),)))
    return True


def scale_weights(graph: fx.GraphModule, ctx: Context) -> bool:
    with torch.no_grad():
        ctx.scope.head.weight.mul_(2)  # type: ignore[operator, union-attr]
    return False


def refuse(graph: fx.GraphModule, ctx: Context) -> bool:
    raise brt.PassError("no")


@pytest.mark.parametrize(
    ("one", "rule"),
    [
        (lambda: 3, r"is a brt\.passes\.Pass"),
        (lambda: doing(lambda g, c: False, name="Bad Name"), "kebab-case"),
        (lambda: doing(lambda g, c: False, after="drop-dead-paths"), "`after` is a tuple"),
        (lambda: doing(lambda g, c: False, after=("acme-odd",)), "does not wait for itself"),
        (lambda: doing(lambda g, c: False, lowering=("hope",)), "`lowering` is a tuple"),
        (lambda: doing(lambda g, c: False, needs_profile=True), "says how it guards"),
        (lambda: doing(lambda g, c: None), "returns whether it changed"),
        (lambda: doing(lambda g, c: True), "says truthfully"),
        (lambda: doing(lambda g, c: not multiply_once(g, 1.0)), "says truthfully"),
        (lambda: doing(lambda g, c: multiply(g, 1.0)), "idempotent"),
        (lambda: doing(lambda g, c: multiply_once(g, 1.5)), "changed the result of the model"),
        (lambda: doing(refuse), "refuses in `requires`"),
        (lambda: doing(scale_weights), "leaves the model it is given as it is"),
        (lambda: doing(dead_from_the_profile), "unlike the profile"),
    ],
)  # fmt: skip
def test_a_pass_that_breaks_a_rule(one: Callable[[], Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_pass(one(), Residual(), [X], others=[to_paths([2])])


def test_a_pass_may_refuse() -> None:
    class Refusing(DropDeadPaths):
        """Refuse."""

        def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
            raise brt.PassError("not this one")

    check_pass(Refusing(), Residual(), [X])


# Kernels

CHOICE = torch.tensor([[0, 1], [1, -1], [2, 0], [-1, -1]])
ROUTED = ops.route(CHOICE, 3)
CELL, _, ROW, OFFSETS = ROUTED
WEIGHT = torch.linspace(0.5, 1.5, len(CELL))
CALLS = [
    (torch.randn(4, 5), CELL, ROW),
    (torch.randn(4, 2, 3), CELL, ROW, WEIGHT),
    (torch.randn(0, 3), CELL[:0], ROW[:0]),
]


def dispatching(forward: Any = reference.dispatch, **fields: Any) -> brt.KernelSpec:
    given = {
        "op": "dispatch", "device": "cpu", "name": "acme", "forward": forward,
        "estimate": lambda *args: 1.0,
    }  # fmt: skip
    return brt.KernelSpec(**(given | fields))


def by_value(x: Tensor, *args: Any) -> float:
    return float(x.abs().sum())


def unlike(x: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None) -> Tensor:
    return reference.dispatch(x, cell_R, row_NK, weight_R) + 0.01


def destroying(x: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None) -> Tensor:
    out = reference.dispatch(x, cell_R, row_NK, weight_R)
    x.zero_()
    return out


def failing(*args: Any) -> Tensor:
    raise RuntimeError("no")


def test_kernels_of_brt_keep_the_rules() -> None:
    check_kernel(dispatching(), CALLS)
    packed = torch.randn(len(CELL), 5)
    for op, forward, calls in (
        ("combine", reference.combine, [(packed, ROW, CELL), (packed, ROW, CELL, WEIGHT)]),
        ("route", reference.route, [(CHOICE, 3), (CHOICE, 3, [1], None, 2, 4)]),
    ):
        check_kernel(dispatching(forward, op=op), calls)  # type: ignore[arg-type]
    some = dispatching(refuses=lambda x, *args: "too large" if x.ndim == 3 else None)
    check_kernel(some, CALLS)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (lambda: 3, r"is a brt\.KernelSpec"),
        (lambda: dispatching(op="despatch"), "is for an operator of brt"),
        (lambda: dispatching(name="reference"), "name of its own"),
        (lambda: dispatching(device="cuda"), "is called on its device, cuda"),
        (lambda: dispatching(refuses=lambda *args: "no"), "takes at least one of the calls"),
        (lambda: dispatching(refuses=lambda *args: True), "returns a reason, or None"),
        (lambda: dispatching(refuses=failing), "`refuses` answers for any arguments"),
        (lambda: dispatching(estimate=failing), "`estimate` answers"),
        (lambda: dispatching(estimate=lambda *args: -1.0), "returns microseconds"),
        (lambda: dispatching(estimate=by_value), "go by shapes only"),
        (lambda: dispatching(unlike), "gives what the reference gives.*differs by up to 0.01"),
        (lambda: dispatching(lambda *args: reference.dispatch(*args)[:1]), "gives what the ref"),
        (lambda: dispatching(destroying), "leaves its arguments"),
        (lambda: dispatching(failing), "runs what it does not refuse"),
    ],
)
def test_a_kernel_that_breaks_a_rule(spec: Callable[[], Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_kernel(spec(), CALLS)
