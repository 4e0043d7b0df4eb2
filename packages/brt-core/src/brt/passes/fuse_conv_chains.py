"""fuse-conv-chains: the small convolutional branches of a region become one operator.

Legend: N cells, P paths, R routed rows, C channels, H W height and width.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from brt import ops
from brt.conv_steps import ConvStep, flatten_branches
from brt.errors import PassError, TraceError
from brt.graph import trace
from brt.grouped import each
from brt.passes.base import Context, Pass
from brt.passes.conv_matching import Matcher, NoChainError, Params
from brt.passes.match import Scatter, draws_random, module_of, scatters
from brt.route import Route
from brt.routers import GatherRouter, ScatterRouter

_REPEATS = 3
# A chain must be this much faster than the branches to be worth another form of the region
_GAIN = 0.95
# Packed rows are allocated for every choice; more than this many a cell is too wasteful
_MOST_CHOICES = 2


@dataclass(frozen=True)
class FuseConvChains(Pass):
    """Run all branches between a scatter and its gather as one `brt.ops.conv_chain`.

    The branches may differ in width and depth. Each must be made of 3x3 and 1x1 convolutions that
    keep the size, ReLU, PReLU, additions and pixel shuffles. The rewrite holds for any input, so
    that it needs no guard; with a sample it is measured, and kept only where it is faster.
    """

    name: ClassVar[str] = "fuse-conv-chains"

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
                fusion = _Fusion.of(graph, ctx, scatter)
            except NoChainError as error:
                ctx.leave(scatter.name, str(error))
                continue
            if fusion.is_faster(graph, ctx):
                fusion.apply(graph, ctx)
                changed = True
        return changed


class ConvChains(nn.Module):
    """The branches of a region: ``forward(rows, route)``, packed rows to packed rows.

    It refers to the parameters of the model's own convolutions, and holds none.
    """

    def __init__(self, params: Params, branches: list[list[ConvStep]]) -> None:
        super().__init__()
        self._owned = tuple(params.owned)
        self.branches = tuple(tuple(branch) for branch in branches)

    def forward(self, rows_RCHW: Tensor, route: Route) -> Tensor:
        """``[R, C, H, W]`` -> ``[R, C', H', W']``."""
        return self.run(rows_RCHW, route.offsets_P1)

    def run(self, rows_RCHW: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin."""
        params = [owned.get() for owned in self._owned]
        return ops.conv_chain(rows_RCHW, offsets_P1, params, self.branches)

    def extra_repr(self) -> str:
        """How many steps each branch has."""
        return f"steps of each path: {[len(branch) for branch in self.branches]}"


@dataclass(eq=False)
class _Fusion:
    """A region that can be fused: its scatter, its gather, and the nodes between."""

    scatter: Scatter
    gather: fx.Node
    inside: set[fx.Node]
    chains: ConvChains

    @classmethod
    def of(cls, graph: fx.GraphModule, ctx: Context, scatter: Scatter) -> _Fusion:
        """Read the branches of a scatter; `NoChainError` says why they are left alone."""
        router = scatter.router
        if scatter.guarded or type(router) is not ScatterRouter or router.result != "paths":
            raise NoChainError("it is not a plain scatter to paths")
        if router.protocol.max_rows(64, router.num_paths) > _MOST_CHOICES * 64:
            raise NoChainError(
                "its protocol may send a cell along many paths, and packed rows are allocated for "
                "all of them"
            )
        if not isinstance(_argument(scatter.node, 0, "x"), fx.Node):
            raise NoChainError("several flows travel through it")
        gather, results = _gather_of(ctx, scatter)
        params, branches, inside = Params(), [], set[fx.Node]()
        for path, (entry, result) in enumerate(zip(scatter.path_P, results, strict=True)):
            if entry is None:
                raise NoChainError(f"nothing reads the rows of path {path}")
            try:
                steps, nodes = _branch(graph, ctx, params, entry, result, path)
            except NoChainError as error:
                raise NoChainError(f"branch {path}: {error}") from error
            branches.append(steps)
            inside |= nodes
        for node in {*filter(None, scatter.path_P), *inside}:
            outside = set(node.users) - inside - {gather}
            if outside:
                raise NoChainError(f"{node.name} is also read by {min(n.name for n in outside)}")
        return cls(scatter, gather, inside, ConvChains(params, branches))

    def is_faster(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Whether the chain beats the branches on the sample, or, without one, by its kernel."""
        call = next((c for c in ctx.sample if not c.kwargs), None)
        if call is None:
            return self._has_kernel(ctx)
        with torch.no_grad():
            timed = _Timed(graph, self)
            timed.run(*call.args)
            rows, offsets_P1 = timed.rows, timed.offsets_P1
            chosen = self._explain(rows, offsets_P1).chosen
            before = statistics.median(timed.again(call.args) for _ in range(_REPEATS))
            after = statistics.median(
                _seconds(lambda: self.chains.run(rows, offsets_P1), rows.device)
                for _ in range(_REPEATS + 1)
            )
        what = f"{1e3 * before:.2f} ms as branches, {1e3 * after:.2f} ms as a chain ({chosen})"
        if after > _GAIN * before:
            ctx.leave(self.scatter.name, f"measured {what} on {rows.shape[0]} rows")
            return False
        ctx.note(f"{self.scatter.name}: measured {what} on {rows.shape[0]} rows")
        return True

    def _has_kernel(self, ctx: Context) -> bool:
        weight = self.chains._owned[0].get()
        rows = weight.new_empty((64, weight.shape[1], 32, 32))
        offsets = torch.zeros(len(self.chains.branches) + 1, dtype=torch.int64, device=rows.device)
        chosen = self._explain(rows, offsets).chosen
        if chosen == "reference":
            ctx.leave(self.scatter.name, "no sample to measure on, and no kernel but the reference")
            return False
        ctx.note(f"{self.scatter.name}: no sample to measure on; kernel {chosen} takes it")
        return True

    def _explain(self, rows: Tensor, offsets_P1: Tensor) -> ops.Explanation:
        params = [owned.get() for owned in self.chains._owned]
        steps, scales, step_offsets = flatten_branches(self.chains.branches)
        return ops.explain("conv_chain", rows, offsets_P1, params, steps, step_offsets, scales)

    def apply(self, graph: fx.GraphModule, ctx: Context) -> None:
        """Put a packed scatter and the chain in place of the scatter and the branches."""
        old, router = self.scatter.node, self.scatter.router
        packed = ScatterRouter(
            router.protocol,
            router.num_paths,
            weighted=router.weighted,
            per_path=router.per_path,
            inherit_weights=router.inherit_weights,
            result="packed",
        )
        scatter_name = ctx.insert(graph, packed, "packed_scatter")
        chains_name = ctx.insert(graph, self.chains, "conv_chains")
        with graph.graph.inserting_after(old):
            scatter = graph.graph.call_module(scatter_name, old.args, old.kwargs)
        with graph.graph.inserting_after(scatter):
            rows = graph.graph.call_function(operator.getitem, (scatter, 0))
        with graph.graph.inserting_after(rows):
            route = graph.graph.call_function(operator.getitem, (scatter, 1))
        with graph.graph.inserting_after(route):
            chained = graph.graph.call_module(chains_name, (rows, route))
        assert self.scatter.route is not None
        self.scatter.route.replace_all_uses_with(route)
        if self.gather.args:
            self.gather.args = (chained, *self.gather.args[1:])
        else:
            self.gather.kwargs = {**self.gather.kwargs, "rows": chained}
        steps = [len(branch) for branch in self.chains.branches]
        ctx.note(f"{self.scatter.name}: {len(steps)} branches of {steps} steps are one operator")


class _Timed(fx.Interpreter):
    """Runs a region and tells how long the nodes inside a fusion took, and what rows they got."""

    def __init__(self, graph: fx.GraphModule, fusion: _Fusion) -> None:
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
        start = _now(self._device())
        out = super().run_node(n)
        self._spent += _now(self._device()) - start
        return out

    def _device(self) -> torch.device:
        entry = self._fusion.scatter.path_P[0]
        assert entry is not None
        found = self.env.get(entry)
        return found.device if isinstance(found, Tensor) else torch.device("cpu")


def _branch(
    graph: fx.GraphModule,
    ctx: Context,
    params: Params,
    entry: fx.Node,
    result: fx.Node,
    path: int,
) -> tuple[list[ConvStep], set[fx.Node]]:
    """(steps, nodes of the region) of one branch."""
    source = result.args[0] if result.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.target is each:
        modules, rows = source.args[:2]
        if not isinstance(modules, (list, tuple)) or not isinstance(rows, (list, tuple)):
            raise NoChainError("brt.each is called with something other than lists")
        at = result.args[1]
        if at != path or rows[path] is not entry:
            raise NoChainError("brt.each runs its module on another path")
        module = ctx.scope.get_submodule(str(modules[path].target))  # type: ignore[union-attr]
        return _branch_of_module(module, params), {source, result, *modules}
    nodes, wanted = [], {result}
    for node in reversed(graph.graph.nodes):
        if node in wanted and node is not entry:
            nodes.append(node)
            wanted |= set(node.all_input_nodes)
    nodes.reverse()
    if entry not in wanted:
        raise NoChainError("its result does not depend on its rows")
    if any(node.op == "placeholder" for node in nodes):
        raise NoChainError("it reads more than its rows")
    return Matcher(graph, params).match(entry, nodes, result), set(nodes)


def _branch_of_module(module: nn.Module, params: Params) -> list[ConvStep]:
    try:
        traced = trace(module)
    except TraceError as error:
        raise NoChainError(str(error)) from error
    entries = [n for n in traced.graph.nodes if n.op == "placeholder"]
    result = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    inner = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    if len(entries) != 1 or not isinstance(result, fx.Node):
        raise NoChainError("it does not take and give one tensor")
    return Matcher(traced, params).match(entries[0], inner, result)


def _gather_of(ctx: Context, scatter: Scatter) -> tuple[fx.Node, list[fx.Node]]:
    """The one gather that takes back a scatter's route, and the results of the branches."""
    gathers = []
    for node in scatter.route.users if scatter.route is not None else ():
        takes_it = _argument(node, 1, "where") is scatter.route
        if takes_it and isinstance(module_of(node, ctx.scope), GatherRouter):
            gathers.append(node)
    if len(gathers) != 1:
        raise NoChainError(f"{len(gathers)} gathers take back its route, not one")
    rows = _argument(gathers[0], 0, "rows")
    if not isinstance(rows, (list, tuple)) or not all(isinstance(r, fx.Node) for r in rows):
        raise NoChainError("its gather does not take a list of tensors")
    return gathers[0], list(rows)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = _now(device)
    run()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
