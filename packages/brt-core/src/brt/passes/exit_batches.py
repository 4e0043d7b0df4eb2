"""Regions with exits as CUDA graphs, for several cells: those that stay go on together, in front.

Behind each exit the work of its cells is there once for each of some numbers of cells: N, half of
it, and so on down to 1. Conditional nodes run the smallest that holds the cells that are left, and
none where no cell is left; the host reads nothing.

Legend: N cells of the region, S cells of a size, K sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from brt import ops
from brt.errors import PassError
from brt.passes.conditional import Begin, End, body, the_maker
from brt.passes.exit_region import CannotCaptureError, ExitRegion, choice_of, value_of
from brt.passes.match import Chain, Scatter, argument, item_of, router_of, scatters
from brt.routers import GatherRouter, ScatterRouter


class Batches(ExitRegion):
    """Runs a region on several cells, as a straight line of all sizes or as it is captured.

    It is right where each cell is computed by itself: sets of cells are filled up with copies of
    one of them. Raises `PassError` where work behind an exit takes more than its own rows.
    """

    def __init__(self, graph: fx.Graph, scope: nn.Module) -> None:
        super().__init__(graph, scope)
        self.num_levels += 1  # whether any cell is left, and within that of which size
        self._items: dict[fx.Node, tuple[Chain, tuple[int, ...], bool]] = {}
        """Rows of a path as its scatter gives them: which flows, and whether in a tuple."""
        self._behind: dict[fx.Node, list[Chain]] = {}
        """The sets of cells that a scatter makes."""
        hidden: set[fx.Node] = set()
        for found in scatters(graph, scope):
            self._read(found)
            hidden |= {n for n in (found.rows, found.route) if n is not None}
        self._blocks: dict[Chain, list[fx.Node]] = {(): []}
        """The work on each set of cells."""
        self._constant: list[fx.Node] = []
        for node in graph.nodes:
            if node in self._needed and node.op not in ("placeholder", "output"):
                if all(n in self._constant for n in node.all_input_nodes):
                    self._constant.append(node)
                elif node not in self._items and node not in hidden:
                    self._blocks.setdefault(self._chain_of[node], []).append(node)
        self._flows = {chain: self._check_block(chain) for chain in self._blocks}
        for node in graph.nodes:
            if isinstance(router_of(node, scope), GatherRouter):
                self._check_gather(node)

    def _read(self, found: Scatter) -> None:
        """Which nodes are rows of a scatter's paths."""
        x, outer = argument(found.node, 0, "x"), self._chain_of[found.node]
        several = isinstance(x, (tuple, list))
        num_flows = len(x) if several else 1
        self._behind[found.node] = [(*outer, (found.node, p)) for p in range(2)]
        for start in filter(None, found.path_P):
            chain = self._chain_of[start]
            self._items[start] = (chain, tuple(range(num_flows)), several)
            for user in start.users if several else ():
                if user.target is operator.getitem and isinstance(user.args[1], int):
                    self._items[user] = (chain, (user.args[1] % num_flows,), False)

    def _check_block(self, chain: Chain) -> list[int]:
        """The flows that the work on a set of cells takes; raises where it takes anything else."""
        nodes, flows = self._blocks[chain], set[int]()
        for node in nodes:
            if chain and isinstance(router_of(node, self._scope[0]), GatherRouter):
                raise PassError(f"{node.name} gathers some cells only")
            for taken in self._inputs(node):
                item = self._items.get(taken)
                if item is not None and item[0] == chain:
                    flows |= set(item[1])
                elif taken not in (*nodes, *self._constant) and (
                    chain or taken.op != "placeholder"
                ):
                    raise PassError(f"{node.name} takes {taken.name}, of other cells")
        return sorted(flows)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a node takes, but for what tells routers which cells they are."""
        router = router_of(node, self._scope[0])
        if isinstance(router, GatherRouter):
            return []
        if not isinstance(router, ScatterRouter):
            return node.all_input_nodes
        x = argument(node, 0, "x")
        return [*(x if isinstance(x, (tuple, list)) else [x]), argument(node, 1, "scores")]

    def _check_gather(self, node: fx.Node) -> None:
        """Raise unless rows are gathered as those of the cells that they are of."""
        where = argument(node, 1, "where")
        for i, row in enumerate(argument(node, 0, "rows")):
            chain = self._chain_of[row]
            if not chain:
                continue
            scatter, path = chain[-1]
            route = item_of(scatter, 1)
            of_path = where is route and path == i
            if isinstance(where, (tuple, list)) and isinstance(where[i], fx.Node):
                of_path = where[i].args == (route, path)
            if not of_path or self._items.get(row, (chain, (), False))[2]:
                raise PassError(f"{node.name} takes {row.name} for rows of other cells")

    def straight(self, inputs: Sequence[Any], streams: Sequence[Any]) -> _Run:
        """Every stage runs in every size: kernels are chosen, and memory is found."""
        run = _Run(self, streams, {}, None)
        run.all_of(inputs)
        return run

    def captured(self, inputs: Sequence[Any], streams: Sequence[Any], like: _Run) -> Any:
        """What the region gives; the current stream captures it."""
        return _Run(self, streams, like.memory, the_maker()).all_of(inputs)


def sizes_of(num_cells: int) -> tuple[int, ...]:
    """The numbers of cells that work behind an exit is there for, ascending: halves, rounded up."""
    sizes = [num_cells]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return tuple(reversed(sizes))


class _Run:
    """One run over a region.

    Attributes:
        memory: what is handed over between bodies, of which not all run. For a set of cells:
            their number ("count"), which of the N they are ("cells"), and their flows. For a
            gather: its result, with a row more for what is not to be kept.
    """

    def __init__(
        self,
        what: Batches,
        streams: Sequence[Any],
        memory: dict[Any, Tensor],
        maker: tuple[Begin, End] | None,
    ) -> None:
        self._what, self._streams, self._maker = what, streams, maker
        self.memory = memory
        self._constants: dict[fx.Node, Any] = {}
        self._num_cells: dict[Chain, int] = {}

    def all_of(self, inputs: Sequence[Any]) -> Any:
        what = self._what
        given = iter(inputs)
        values = {n: next(given) for n in what._graph.nodes if n.op == "placeholder"}
        for node in what._constant:
            self._constants[node] = self._call(node, self._constants)
        for key, kept in self.memory.items():
            if isinstance(key, fx.Node):  # a cell may take no path
                kept.zero_()
        values |= self._constants
        for node in what._blocks[()]:
            self._run_node((), node, values, None)
            for chain in what._behind.get(node, ()):
                self._go_on(chain, 0)
        (output,) = (node for node in what._graph.nodes if node.op == "output")
        return fx.node.map_arg(output.args[0], values.__getitem__)

    def _go_on(self, chain: Chain, level: int) -> None:
        """The work on a set of cells, and on those that it is parted into."""
        nodes = self._what._blocks.get(chain)
        if nodes is None:
            return
        count_1, num_cells = self.memory[chain, "count"], self._num_cells[chain]
        sizes = sizes_of(num_cells)

        def in_sizes() -> None:
            upper_K = self._keep(("sizes", num_cells), lambda: count_1.new_tensor(sizes))
            lower_K = self._keep(("below", num_cells), lambda: count_1.new_tensor((0, *sizes[:-1])))
            flag_K = (count_1 > lower_K) & (count_1 <= upper_K)
            for i, size in enumerate(sizes):
                self._if(level + 1, flag_K[i : i + 1], partial(self._block, chain, size))
            for node in nodes:
                for inner in self._what._behind.get(node, ()):
                    self._go_on(inner, level + 1)

        self._if(level, count_1 > 0, in_sizes)

    def _if(self, level: int, flag_1: Tensor, then: Callable[[], None]) -> None:
        with body(self._maker, self._streams[level], flag_1):
            then()

    def _block(self, chain: Chain, size: int) -> None:
        """The work on a set of cells, of which there is room for ``size``."""
        what, values = self._what, dict(self._constants)
        flows = {i: self.memory[chain, i][:size] for i in what._flows[chain]}
        for node, (of, taken, several) in what._items.items():
            if of == chain and all(i in flows for i in taken):
                rows = tuple(flows[i] for i in taken)
                values[node] = rows if several else rows[0]
        for node in what._blocks[chain]:
            self._run_node(chain, node, values, size)

    def _run_node(
        self, chain: Chain, node: fx.Node, values: dict[fx.Node, Any], size: int | None
    ) -> None:
        router = router_of(node, self._what._scope[0])
        if isinstance(router, GatherRouter):
            values[node] = self.memory[node][:-1]
        elif isinstance(router, ScatterRouter):
            self._part(chain, node, router, values, size)
        else:
            values[node] = self._call(node, values)
        for gather in self._what._gather_of.get(node, ()):
            num_cells = self._num_cells[chain] if chain else values[node].shape[0]
            cell_S, live_S = self._cells(chain, num_cells, size, values[node].device)
            self._deliver(gather, values[node], num_cells, cell_S, live_S)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return value_of(node, self._what._scope[0], args, kwargs)

    def _part(
        self,
        chain: Chain,
        node: fx.Node,
        router: ScatterRouter,
        values: dict[fx.Node, Any],
        size: int | None,
    ) -> None:
        """Decide for each cell; hand over those of paths that go on, deliver those that do not."""
        what = self._what
        x = fx.node.map_arg(argument(node, 0, "x"), values.__getitem__)
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        choice_S = choice_of(node, router, values[argument(node, 1, "scores")])
        num_cells = self._num_cells[chain] if chain else choice_S.shape[0]
        cell_S, live_S = self._cells(chain, num_cells, size, choice_S.device)
        for path, inner in enumerate(what._behind[node]):
            keep_S = choice_S == path if live_S is None else (choice_S == path) & live_S
            self._num_cells[inner] = num_cells
            for item, (of, taken, _) in what._items.items():
                for gather in what._gather_of.get(item, ()) if of == inner else ():
                    self._deliver(gather, flows[taken[0]], num_cells, cell_S, keep_S)
            if inner in what._blocks:
                self._hand_over(inner, keep_S, cell_S, flows)

    def _hand_over(
        self, chain: Chain, keep_S: Tensor, cell_S: Tensor, flows: tuple[Tensor, ...]
    ) -> None:
        """Put the cells of a path in front, in order, and copies of the first behind them."""
        index_S, count_1 = ops.compact(keep_S)
        index_S = torch.where(index_S < 0, index_S[:1].clamp(min=0), index_S)
        num_cells, size = self._num_cells[chain], index_S.shape[0]
        self._keep((chain, "count"), lambda: torch.zeros_like(count_1)).copy_(count_1)
        parts: dict[Any, Tensor] = {i: flows[i] for i in self._what._flows[chain]}
        for key, part in ({"cells": cell_S} | parts).items():
            room = self._keep((chain, key), partial(part.new_zeros, (num_cells, *part.shape[1:])))
            room[:size].copy_(part.index_select(0, index_S))

    def _cells(
        self, chain: Chain, num_cells: int, size: int | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Which of the N a set's cells are, and which of them are there; None: all."""
        all_N = self._keep(("cells", num_cells), lambda: torch.arange(num_cells, device=device))
        if not chain:
            return all_N, None
        return self.memory[chain, "cells"][:size], all_N[:size] < self.memory[chain, "count"]

    def _deliver(
        self,
        gather: fx.Node,
        rows_S: Any,
        num_cells: int,
        cell_S: Tensor,
        keep_S: Tensor | None,
    ) -> None:
        """Write rows where their gather's result is, and what is not to be kept behind it."""
        if not isinstance(rows_S, Tensor) or rows_S.shape[0] != cell_S.shape[0]:
            raise CannotCaptureError(f"{gather.name} takes something else than a row of each cell")
        to_S = cell_S if keep_S is None else cell_S.masked_fill(~keep_S, num_cells)
        shape = (num_cells + 1, *rows_S.shape[1:])
        self._keep(gather, lambda: rows_S.new_zeros(shape)).index_copy_(0, to_S, rows_S)

    def _keep(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Memory that stays between replays, made before the capture."""
        if key not in self.memory:
            assert self._maker is None, key
            self.memory[key] = make()
        return self.memory[key]
