"""`cellflow`: each node of a graph run on tensors without data, and its cells followed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from brt import losses
from brt.cellflow.dry import UNKNOWN, DryRun, Unknown, quiet, tensors_in
from brt.cellflow.layers import ELEMENTWISE
from brt.cellflow.routers import KnownCells, KnownRoute, each_of, route_of
from brt.cellflow.states import Flow, Size
from brt.cells import Cells
from brt.errors import TraceError
from brt.graph import as_call, expect
from brt.grouped import each, grouped
from brt.route import Route
from brt.routers import Router


def cellflow(graph: fx.GraphModule, sample: Any = None) -> dict[fx.Node, Flow]:
    """What each node does with cells, which are the rows of dim 0 of its inputs.

    Every node is run, operator by operator, on tensors without data whose number of cells is a
    symbol; a table says what each ATen operator does, and an operator that it does not know mixes.
    What depends on the number or the places of cells, or draws random numbers, mixes too. Where
    inputs have different numbers of rows, the node must keep the rows of each apart; parameters,
    constants and single numbers are the same for all cells.

    ``sample`` is a batch as `brt.profile` takes them; only its shapes and dtypes matter, unless a
    node cannot run without data: then the graph runs once on the sample. Without a sample only
    nodes that are alike for any shape are known.
    """
    if not isinstance(graph, fx.GraphModule):
        raise TraceError(f"cellflow: takes a graph (brt.trace(module)), got {type(graph).__name__}")
    if sample is None:
        return {node: _without_shapes(graph, node) for node in graph.graph.nodes}
    return _analysed(graph, sample).flows


def cellflow_with_rows(
    graph: fx.GraphModule, sample: Any
) -> tuple[dict[fx.Node, Flow], dict[fx.Node, Size]]:
    """`cellflow`, and the number of rows of each node that gives one tensor.

    A symbol where it depends on the input: equal symbols are equal for any input.
    """
    found = _analysed(graph, sample)
    rows: dict[fx.Node, Size] = {}
    for node, value in found.values.items():
        if isinstance(value, Tensor) and value.ndim:
            rows[node] = value.shape[0]
    return found.flows, rows


def _analysed(graph: fx.GraphModule, sample: Any) -> _Analysis:
    closed: set[fx.Node] = set()
    while True:
        analysis = _Analysis(graph, as_call(sample), closed)
        with quiet():
            node = analysis.run()
        if node is None:
            return analysis
        closed.add(node)


def _without_shapes(graph: fx.GraphModule, node: fx.Node) -> Flow:
    if node.op in ("placeholder", "get_attr", "output"):
        return Flow("keeps", "does nothing with cells")
    if node.op == "call_module" and type(graph.get_submodule(str(node.target))) in ELEMENTWISE:
        return Flow("keeps", "every element by itself")
    return Flow("mixes", "shapes are needed to tell: cellflow(graph, sample=batch)")


class _Analysis:
    """One run over the nodes of a graph."""

    def __init__(
        self, graph: fx.GraphModule, sample: tuple[Any, Any], closed: set[fx.Node]
    ) -> None:
        self.flows: dict[fx.Node, Flow] = {}
        self._graph = graph
        self._sample = sample
        self._closed = closed
        self._dry = DryRun()
        self.values: dict[fx.Node, Any] = {}
        self._constant: set[fx.Node] = set()
        self._real: dict[fx.Node, Any] | None = None

    def run(self) -> fx.Node | None:
        """Analyse all nodes. One that fixes the number of cells is returned, to be left closed."""
        inputs = _arguments(self._graph, self._sample)
        for node in self._graph.graph.nodes:
            if node in self._closed:
                flow, value = Flow("mixes", "takes a certain number of cells only"), UNKNOWN
            elif node.op == "placeholder":
                flow, value = Flow("keeps", "an input"), self._without_data(inputs[node])
            else:
                flow, value = self._node(node)
                if self._dry.fixed:
                    return node
            if node.op != "output" and _has(value, Unknown):
                value = self._as_on_sample(node)
            if self._is_constant(node, value):
                self._constant.add(node)
            self.flows[node], self.values[node] = flow, value
        return None

    def _is_constant(self, node: fx.Node, value: Any) -> bool:
        """Whether a value is the same whatever the cells are, and however many."""
        if node.op != "placeholder" and all(n in self._constant for n in node.all_input_nodes):
            return True
        return not _has(
            value, (Tensor, torch.SymInt, torch.SymFloat, Unknown, KnownRoute, KnownCells)
        )

    def _node(self, node: fx.Node) -> tuple[Flow, Any]:
        if node.op == "output":
            return Flow("keeps", "the output"), None
        if node.op == "get_attr":
            return Flow("keeps", "a constant"), operator.attrgetter(str(node.target))(self._graph)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        inputs = node.all_input_nodes
        if any(_has(self.values[n], Unknown) for n in inputs):
            return Flow("mixes", "what it takes is not known without data"), UNKNOWN
        cells = [t for n in inputs if n not in self._constant for t in tensors_in(self.values[n])]
        if node.op == "call_module":
            target: Any = self._graph.get_submodule(str(node.target))
            if isinstance(target, Router):
                return route_of(self._dry, target, args, kwargs)
        elif node.op == "call_method":
            if isinstance(args[0], (KnownRoute, KnownCells)):
                return Flow("mixes", f"{node.target} of a route"), UNKNOWN
            target, args = getattr(args[0], str(node.target)), args[1:]
        else:
            target = node.target
            known = self._function(target, args)
            if known is not None:
                return known
        return self._dry.call(target, args, kwargs, cells, _entries_used(node))

    def _function(self, target: Any, args: Any) -> tuple[Flow, Any] | None:
        """What is known of some functions without following their cells."""
        if target is expect:
            return Flow("keeps", "checks an argument"), None
        if target is each:
            return each_of(self._dry, *args)
        if target is grouped:
            modules, rows, _ = args
            return self._dry.call(modules[0], (rows,), {}, [rows])
        if getattr(target, "__module__", "") == losses.__name__:
            with self._dry.mode:
                return Flow("mixes", "a loss over all cells"), torch.empty(())
        if target is operator.getitem and not isinstance(args[0], Tensor):
            return Flow("keeps", "a part of something"), args[0][args[1]]
        if _has(args, (KnownRoute, KnownCells)):
            return Flow("mixes", "a function of a route"), UNKNOWN
        return None

    def _as_on_sample(self, node: fx.Node) -> Any:
        """What the node gives for the sample, without its data."""
        if self._real is None:
            recorder = _Recorder(self._graph)
            try:
                with torch.no_grad():
                    recorder.run(*_positional(self._graph, self._sample))
            except Exception:  # the sample does not fit: what is unknown stays so
                recorder.seen.clear()
            self._real = recorder.seen
        return self._without_data(self._real.get(node, UNKNOWN))

    def _without_data(self, value: Any) -> Any:
        if isinstance(value, Cells):
            return KnownCells(value.root.num_cells)
        if isinstance(value, Route):
            return KnownRoute(value.num_cells, value.cells.root.num_cells, value.num_paths)
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(self._without_data(v) for v in value)
        return pytree.tree_map_only(Tensor, self._dry.like, value)


class _Recorder(fx.Interpreter):
    """Runs a graph, and keeps what its nodes gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _entries_used(node: fx.Node) -> set[Any] | None:
    """The entries of a tuple that anything uses; None = all of what the node gives."""
    users = [u for u in node.users if u.op == "call_function" and u.target is operator.getitem]
    if node.op != "call_module" or not users or len(users) < len(node.users):
        return None
    entries = [u.args[1] for u in users]
    return set(entries) if all(isinstance(e, int) for e in entries) else None


def _arguments(graph: fx.GraphModule, sample: tuple[Any, Any]) -> dict[fx.Node, Any]:
    """What each input of a graph is, for the arguments of one call."""
    args, kwargs = list(sample[0]), dict(sample[1])
    found: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("**"):
            found[node] = kwargs
        elif name.startswith("*"):
            found[node] = tuple(args)
            args = []
        elif args:
            found[node] = args.pop(0)
        elif name in kwargs:
            found[node] = kwargs.pop(name)
        elif node.args:
            found[node] = node.args[0]
        else:
            raise TraceError(f"cellflow: the sample has no value for input {name!r}")
    return found


def _positional(graph: fx.GraphModule, sample: tuple[Any, Any]) -> list[Any]:
    return [
        one
        for node, value in _arguments(graph, sample).items()
        for one in (value if str(node.target).startswith("*") else [value])
    ]


def _has(value: Any, kind: type | tuple[type, ...]) -> bool:
    return any(isinstance(leaf, kind) for leaf in pytree.tree_leaves(value))
