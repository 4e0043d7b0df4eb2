"""Whether a whole graph keeps the rows of its inputs apart: row i of all that it gives is of row i.

`cellflow` tells it of each node, whose rows are those of what it takes. Here the rows of the inputs
are followed to the outputs, also where several dims are merged into the cells of a scatter in
between, and come back from its gather.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from brt import losses
from brt.cellflow.analysis import _analysed, _Analysis
from brt.cellflow.dry import Unknown, quiet, tensors_in
from brt.cellflow.follow import Follow, is_row
from brt.cellflow.routers import KnownCells, KnownRoute
from brt.cellflow.states import Along, Axis, Mixed, Size, as_expr, same
from brt.decision import Decision
from brt.errors import BrtError
from brt.graph import expect
from brt.routers import GatherRouter, Router, ScatterRouter

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class _Source:
    """The cells of a scatter of all rows: where the rows of the inputs lie, and their number."""

    state: Along
    num_cells: Size

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Source)
            and self.state == other.state
            and same(self.num_cells, other.num_cells)
        )

    def __hash__(self) -> int:
        return hash(self.state)


class RowsTogetherError(BrtError):
    """Rows of the inputs are not kept apart, or nobody knows; the message says where and why."""


def rows_apart(graph: fx.GraphModule, sample: Any) -> dict[fx.Node, int]:
    """Prove that row i of every output is made of row i of the inputs, whatever their number.

    All inputs with dims must have one number of rows. Returns, of each scatter that takes all rows,
    how many cells a row is. Raises `RowsTogetherError` where there is no proof. ``sample`` as for
    `cellflow`.
    """
    analysis = _analysed(graph, sample)
    walk = _Walk(graph, analysis)
    with quiet(), torch.no_grad(), enable_python_dispatcher(), analysis._dry.mode, walk.follow:
        walk.run()
    if as_expr(walk.num_rows).is_number:
        raise RowsTogetherError("it takes a certain number of rows only")
    return walk.cells_per_row


class _Walk:
    """One run over the nodes: those on all rows are run, those behind scatters are looked up."""

    def __init__(self, graph: fx.GraphModule, analysis: _Analysis) -> None:
        self.num_rows = _num_rows(analysis)
        self.follow = Follow(Axis(self.num_rows))
        self.cells_per_row: dict[fx.Node, int] = {}
        self._graph, self._analysis = graph, analysis
        self._values: dict[fx.Node, Any] = {}
        self._routed: dict[fx.Node, _Source] = {}

    def run(self) -> None:
        for node in self._graph.graph.nodes:
            known = self._analysis.values[node]
            if node.op == "output":
                for leaf in pytree.tree_leaves(
                    fx.node.map_arg(node.args[0], self._values.__getitem__)
                ):
                    self._check_output(leaf)
            elif _has(known, Unknown):
                raise RowsTogetherError(f"{node.name}: {self._analysis.flows[node].reason}")
            elif node.op == "placeholder":
                for tensor in tensors_in(known):
                    self.follow.mark(tensor, Along(0) if tensor.ndim else None)
                self._values[node] = known
            elif node.op == "get_attr":
                self._values[node] = known
            else:
                self._values[node] = self._value(node, known)

    def _value(self, node: fx.Node, known: Any) -> Any:
        router = _router(self._graph, node)
        behind = {self._routed[n] for n in node.all_input_nodes if n in self._routed}
        if router is None and not behind:
            return self._on_all_rows(node)
        if isinstance(router, ScatterRouter) and not behind:
            self._routed[node] = self._scattered(node, router)
            return known
        flow = self._analysis.flows[node]
        if flow.kind == "mixes" or (flow.kind == "permutes" and router is None):
            raise RowsTogetherError(f"{node.name}: {flow.reason}")
        if len(behind) > 1:
            raise RowsTogetherError(f"{node.name} takes cells of several kinds together")
        if isinstance(router, GatherRouter):
            return self._gathered(node, known, behind.pop() if behind else None)
        for taken in node.all_input_nodes:
            if behind and taken not in self._routed and self._carries(taken, router):
                raise RowsTogetherError(f"{node.name} takes {taken.name}, of all rows, on a path")
        if not behind:
            raise RowsTogetherError(f"{node.name}: nothing is known of {type(router).__name__}")
        self._routed[node] = behind.pop()
        return known

    def _scattered(self, node: fx.Node, router: ScatterRouter) -> _Source:
        """Where rows are among the cells of a scatter of all rows, which decides for each."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        given = inspect.signature(router.forward).bind(*args, **kwargs).arguments
        flows = tensors_in(given["x"])
        decision = self._called(node, router.protocol, (given["scores"], router.num_paths), {})
        states = {self.follow.state_of(t) for t in (*flows, *_tensors_of(decision))}
        (state,) = states if len(states) == 1 else (None,)
        if not isinstance(state, Along) or state.dim or state.moved:
            raise RowsTogetherError(f"{node.name}: {_why(states)}")
        if decision.capacity is not None:
            size = decision.group_size
            apart = isinstance(size, int) and size > 0 and state.outer == 1
            if not apart or state.inner % size or _has(decision.capacity, torch.SymInt):
                raise RowsTogetherError(f"{node.name}: cells of several rows compete for a path")
        self.cells_per_row[node] = state.outer * state.inner
        return _Source(state, flows[0].shape[0])

    def _gathered(self, node: fx.Node, known: Any, source: _Source | None) -> Any:
        """The result of a gather: all rows again, or still some cells."""
        if source is None:
            raise RowsTogetherError(f"{node.name} gathers what no scatter gave")
        state, outs = source.state, tensors_in(known)
        comes_back = all(same(out.shape[0], source.num_cells) for out in outs)
        for taken in node.all_input_nodes:
            if taken in self._routed:
                continue
            of_taken = {self.follow.state_of(t) for t in tensors_in(self._values[taken])}
            if not of_taken <= {state if comes_back else None}:
                raise RowsTogetherError(f"{node.name} takes {taken.name}: {_why(of_taken)}")
        if not comes_back:
            self._routed[node] = source
            return known
        for out in outs:
            self.follow.mark(out, state)
        return known

    def _carries(self, node: fx.Node, router: Router | None) -> bool:
        """Whether a value may be of cells, or of their number."""
        if node.op == "get_attr":
            return False
        leaves = pytree.tree_leaves(self._values[node])
        if any(isinstance(leaf, (KnownRoute, KnownCells)) for leaf in leaves):
            return True
        if any(self.follow.state_of(t) is not None for t in tensors_in(leaves)):
            return True
        # What tells a router which cells they are has their number in it
        return router is None and not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)

    def _on_all_rows(self, node: fx.Node) -> Any:
        if node.target is expect:
            return None
        if getattr(node.target, "__module__", "") == losses.__name__:
            raise RowsTogetherError(f"{node.name}: a loss over all cells")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "call_module":
            target: Any = self._graph.get_submodule(str(node.target))
        elif node.op == "call_method":
            target, args = getattr(args[0], str(node.target)), args[1:]
        else:
            target = node.target
        return self._called(node, target, args, kwargs)

    def _called(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except Exception as error:  # whatever code raises where there is no data
            line = str(error).strip().partition("\n")[0]
            raise RowsTogetherError(f"{node.name}: {type(error).__name__}: {line}"[:200]) from error

    def _check_output(self, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            state = self.follow.state_of(leaf)
            if not is_row(state) or (isinstance(state, Along) and state.moved):
                raise RowsTogetherError(f"a result is not one row for each: {_why({state})}")
        elif not isinstance(leaf, _PLAIN) or isinstance(leaf, Unknown):
            raise RowsTogetherError(f"a result is a {type(leaf).__name__}, not rows")


def _num_rows(analysis: _Analysis) -> Size:
    """The one number of rows of all inputs."""
    inputs = [node for node in analysis.values if node.op == "placeholder"]
    tensors = [t for node in inputs for t in tensors_in(analysis.values[node]) if t.ndim]
    if not tensors or not all(same(t.shape[0], tensors[0].shape[0]) for t in tensors):
        raise RowsTogetherError("its inputs do not have one number of rows")
    return tensors[0].shape[0]


def _router(graph: fx.GraphModule, node: fx.Node) -> Router | None:
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Router) else None


def _tensors_of(decision: Decision) -> list[Tensor]:
    """What a decision says of each cell."""
    if decision.cell_PC is not None:
        raise RowsTogetherError("paths choose among all cells")
    said = (decision.choice_NK, decision.mask_NP, decision.weight, decision.priority_N)
    return [tensor for tensor in said if tensor is not None]


def _why(states: Any) -> str:
    mixed = next((state for state in states if isinstance(state, Mixed)), None)
    if mixed is not None:
        return mixed.reason
    return "rows lie elsewhere, or what it takes is the same for all"


def _has(value: Any, kind: type) -> bool:
    return any(isinstance(leaf, kind) for leaf in pytree.tree_leaves(value))
