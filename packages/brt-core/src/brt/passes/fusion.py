"""What passes share that put one module in place of all branches between a scatter and its gather.

Legend: P paths, R routed rows, S trailing dims of a cell.
"""

from __future__ import annotations

import operator
import statistics
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from brt.errors import PassError, TraceError
from brt.graph import trace
from brt.grouped import each
from brt.passes.base import Context, Pass
from brt.passes.match import Scatter, argument, draws_random, module_of, scatters
from brt.race import now, race
from brt.route import Route
from brt.routers import GatherRouter, ScatterRouter

_REPEATS = 3
_SECONDS = 0.5
# The fused form must be this much faster than the branches to be worth another form of the region
_GAIN = 0.95


class NotFusableError(Exception):
    """A region or a branch cannot be fused; the message says where and why."""


class FusedBranches(nn.Module, ABC):
    """All branches of a region: ``forward(rows, route)``, packed rows to packed rows.

    It refers to the parameters of the model's own modules, and holds none.
    """

    label = "fused_branches"
    """What its node is called."""

    def forward(self, rows_RS: Tensor, route: Route) -> Tensor:
        """Rows of all paths -> their results, in the same order."""
        return self.run(rows_RS, route.offsets_P1)

    @abstractmethod
    def run(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin."""

    @abstractmethod
    def kernel(self, rows_RS: Tensor, offsets_P1: Tensor) -> str | None:
        """Name of the kernel that would run these rows."""

    @abstractmethod
    def example(self) -> tuple[Tensor, Tensor]:
        """Rows and offsets as there might be: to ask for the kernel where there is no sample."""

    def alternatives(self) -> list[FusedBranches]:
        """Itself, and other forms of the same to measure."""
        return [self]

    @abstractmethod
    def describe(self) -> str:
        """What it is, for the record: "4 branches of [2, 6] steps are one operator"."""


class Reader(ABC):
    """Reads branches one after the other; `module` makes of them what takes their place."""

    scope: nn.Module
    """What the targets of a branch's nodes are names in; set before each `read`."""

    @abstractmethod
    def read(
        self, graph: fx.GraphModule, entry: fx.Node, nodes: list[fx.Node], result: fx.Node
    ) -> None:
        """One branch: ``nodes`` lead from its rows to its result. Raises `NotFusableError`."""

    @abstractmethod
    def module(self) -> FusedBranches:
        """All of them as one. Raises `NotFusableError` where they do not go together."""


@dataclass(eq=False)
class Fusion:
    """A region that can be fused: its scatter, its gather, and the nodes between."""

    scatter: Scatter
    gather: fx.Node
    inside: set[fx.Node]
    fused: FusedBranches
    forms: list[FusedBranches] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        graph: fx.GraphModule,
        ctx: Context,
        scatter: Scatter,
        reader: Reader,
        most_choices: int,
    ) -> Fusion:
        """Read the branches of a scatter.

        A protocol that may route more than ``most_choices`` rows a cell is left alone: packed rows
        are allocated for all that it may route.
        """
        require_plain(scatter, most_choices)
        gather, inside = branches_of(graph, ctx, scatter, reader)
        return cls(scatter, gather, inside, reader.module())

    def is_faster(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Whether it beats the branches on the sample, or, without one, by its kernel."""
        self.forms = self.fused.alternatives()
        if not ctx.decide(self.scatter.name, lambda: self._measure(graph, ctx)):
            return False
        for form in self.forms[1:]:
            if ctx.decide(f"{self.scatter.name} as {form.label}", partial(self._is_chosen, form)):
                self.fused = form
        return True

    def _is_chosen(self, form: FusedBranches) -> bool:
        return self.fused is form

    def _measure(self, graph: fx.GraphModule, ctx: Context) -> bool:
        call = next((c for c in ctx.sample if not c.kwargs), None)
        if call is None:
            return self._has_kernel(ctx)
        with torch.no_grad():
            timed = _Timed(graph, self)
            timed.run(*call.args)
            rows, offsets_P1 = timed.rows, timed.offsets_P1
            before = statistics.median(timed.again(call.args) for _ in range(_REPEATS))
            runs = [partial(form.run, rows, offsets_P1) for form in self.forms]
            times = race(runs, rows.device, seconds=max(4 * before, _SECONDS))
        best = min(range(len(times)), key=times.__getitem__)
        self.fused = self.forms[best]
        each = ", ".join(
            f"{1e3 * seconds:.2f} ms as one ({form.kernel(rows, offsets_P1)})"
            for form, seconds in zip(self.forms, times, strict=True)
        )
        what = f"measured {1e3 * before:.2f} ms as branches, {each} on {rows.shape[0]} rows"
        if times[best] > _GAIN * before:
            ctx.leave(self.scatter.name, what)
            return False
        ctx.note(f"{self.scatter.name}: {what}")
        return True

    def _has_kernel(self, ctx: Context) -> bool:
        chosen = self.fused.kernel(*self.fused.example())
        if chosen == "reference":
            ctx.leave(self.scatter.name, "no sample to measure on, and no kernel but the reference")
            return False
        ctx.note(f"{self.scatter.name}: no sample to measure on; kernel {chosen} takes it")
        return True

    def apply(self, graph: fx.GraphModule, ctx: Context) -> None:
        """Put a packed scatter and the fused branches in place of the scatter and the branches."""
        old, packed = self.scatter.node, pack(self.scatter)
        scatter_name = ctx.insert(graph, packed, "packed_scatter")
        fused_name = ctx.insert(graph, self.fused, self.fused.label)
        with graph.graph.inserting_after(old):
            scatter = graph.graph.call_module(scatter_name, old.args, old.kwargs)
        with graph.graph.inserting_after(scatter):
            rows = graph.graph.call_function(operator.getitem, (scatter, 0))
        with graph.graph.inserting_after(rows):
            route = graph.graph.call_function(operator.getitem, (scatter, 1))
        with graph.graph.inserting_after(route):
            fused = graph.graph.call_module(fused_name, (rows, route))
        assert self.scatter.route is not None
        self.scatter.route.replace_all_uses_with(route)
        if self.gather.args:
            self.gather.args = (fused, *self.gather.args[1:])
        else:
            self.gather.kwargs = {**self.gather.kwargs, "rows": fused}
        ctx.note(f"{self.scatter.name}: {self.fused.describe()}")


def require_plain(scatter: Scatter, most_choices: int) -> None:
    """Raise `NotFusableError` unless a scatter's rows may as well be packed in one tensor."""
    router = scatter.router
    if scatter.guarded or type(router) is not ScatterRouter or router.result != "paths":
        raise NotFusableError("it is not a plain scatter to paths")
    if router.protocol.max_rows(64, router.num_paths) > most_choices * 64:
        raise NotFusableError(
            "its protocol may send a cell along many paths, and packed rows are allocated for "
            "all of them"
        )
    if not isinstance(argument(scatter.node, 0, "x"), fx.Node):
        raise NotFusableError("several flows travel through it")


def branches_of(
    graph: fx.GraphModule, ctx: Context, scatter: Scatter, reader: Reader
) -> tuple[fx.Node, set[fx.Node]]:
    """Read all branches of a scatter; the gather that takes them back, and their nodes."""
    gather, results = _gather_of(ctx, scatter)
    inside = set[fx.Node]()
    for path, (entry, result) in enumerate(zip(scatter.path_P, results, strict=True)):
        if entry is None:
            raise NotFusableError(f"nothing reads the rows of path {path}")
        try:
            inside |= _read(graph, ctx, reader, entry, result, path)
        except NotFusableError as error:
            raise NotFusableError(f"branch {path}: {error}") from error
    for node in {*filter(None, scatter.path_P), *inside}:
        outside = set(node.users) - inside - {gather}
        if outside:
            raise NotFusableError(f"{node.name} is also read by {min(n.name for n in outside)}")
    return gather, inside


def pack(scatter: Scatter) -> ScatterRouter:
    """A scatter that decides as another does, and gives packed rows."""
    router = scatter.router
    packed = ScatterRouter(
        router.protocol,
        router.num_paths,
        weighted=router.weighted,
        per_path=router.per_path,
        inherit_weights=router.inherit_weights,
        result="packed",
    )
    packed.stands_for = scatter.target
    return packed


class _Timed(fx.Interpreter):
    """Runs a region and tells how long the nodes inside a fusion took, and what rows they got."""

    def __init__(self, graph: fx.GraphModule, fusion: Fusion) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._fusion = fusion
        self._spent = 0.0
        self.rows = self.offsets_P1 = torch.empty(0)

    def again(self, args: tuple[Any, ...]) -> float:
        """Seconds that the branches take in one more run."""
        self._spent = 0.0
        self.run(*args)
        return self._spent

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; time it if it is inside."""
        if n is self._fusion.gather:
            found = [self.env[node] for node in self._fusion.scatter.path_P if node is not None]
            self.rows = torch.cat(found)
            loads = torch.tensor([0, *(len(rows) for rows in found)], device=self.rows.device)
            self.offsets_P1 = loads.cumsum(0)
        if n not in self._fusion.inside:
            return super().run_node(n)
        start = now(self._device())
        out = super().run_node(n)
        self._spent += now(self._device()) - start
        return out

    def _device(self) -> torch.device:
        entry = self._fusion.scatter.path_P[0]
        assert entry is not None
        found = self.env.get(entry)
        return found.device if isinstance(found, Tensor) else torch.device("cpu")


def _read(
    graph: fx.GraphModule, ctx: Context, reader: Reader, entry: fx.Node, result: fx.Node, path: int
) -> set[fx.Node]:
    """Let the reader have one branch; the nodes of the region that it is made of."""
    source = result.args[0] if result.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.target is each:
        modules, rows = source.args[:2]
        if not isinstance(modules, (list, tuple)) or not isinstance(rows, (list, tuple)):
            raise NotFusableError("brt.each is called with something other than lists")
        at = result.args[1]
        if at != path or rows[path] is not entry:
            raise NotFusableError("brt.each runs its module on another path")
        module = ctx.scope.get_submodule(str(modules[path].target))  # type: ignore[union-attr]
        read_module(reader, module)
        return {source, result, *modules}
    nodes, wanted = [], {result}
    for node in reversed(graph.graph.nodes):
        if node in wanted and node is not entry:
            nodes.append(node)
            wanted |= set(node.all_input_nodes)
    nodes.reverse()
    if entry not in wanted:
        raise NotFusableError("its result does not depend on its rows")
    if any(node.op == "placeholder" for node in nodes):
        raise NotFusableError("it reads more than its rows")
    reader.scope = ctx.scope
    reader.read(graph, entry, nodes, result)
    return set(nodes)


def read_module(reader: Reader, module: nn.Module) -> None:
    """Let the reader have a branch that is a module of its own."""
    # Inside another module a layer of torch is one node; on its own it would be opened
    is_layer = type(module).__module__.startswith("torch.nn.") and not [*module.children()]
    try:
        reader.scope = nn.Sequential(module) if is_layer else module
        traced = trace(reader.scope)
    except TraceError as error:
        raise NotFusableError(str(error)) from error
    entries = [n for n in traced.graph.nodes if n.op == "placeholder"]
    result = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    inner = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    if len(entries) != 1 or not isinstance(result, fx.Node):
        raise NotFusableError("it does not take and give one tensor")
    reader.read(traced, entries[0], inner, result)


def _gather_of(ctx: Context, scatter: Scatter) -> tuple[fx.Node, list[fx.Node]]:
    """The one gather that takes back a scatter's route, and the results of the branches."""
    gathers = []
    for node in scatter.route.users if scatter.route is not None else ():
        takes_it = argument(node, 1, "where") is scatter.route
        if takes_it and isinstance(module_of(node, ctx.scope), GatherRouter):
            gathers.append(node)
    if len(gathers) != 1:
        raise NotFusableError(f"{len(gathers)} gathers take back its route, not one")
    rows = argument(gathers[0], 0, "rows")
    if not isinstance(rows, (list, tuple)) or not all(isinstance(r, fx.Node) for r in rows):
        raise NotFusableError("its gather does not take a list of tensors")
    return gathers[0], list(rows)


class FusePass(Pass):
    """Puts one module in place of the branches between each scatter and its gather.

    The rewrite holds for any input, so that it needs no guard; with a sample it is measured, and
    kept only where it is faster.
    """

    most_choices: ClassVar[int]
    """Rows a cell for which packed rows may be allocated; more is too wasteful."""

    @abstractmethod
    def reader(self) -> Reader:
        """What reads the branches of one scatter."""

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region without random numbers."""
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Fuse what lies between each scatter and its gather."""
        changed = False
        for scatter in scatters(graph.graph, ctx.scope):
            try:
                fusion = Fusion.of(graph, ctx, scatter, self.reader(), self.most_choices)
            except NotFusableError as error:
                ctx.leave(scatter.name, str(error))
                continue
            if fusion.is_faster(graph, ctx):
                fusion.apply(graph, ctx)
                changed = True
        return changed
