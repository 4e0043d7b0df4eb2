"""What routers do with cells, and what they return, as far as that is known without data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from brt.cellflow.dry import UNKNOWN, DryRun, tensors_in
from brt.cellflow.states import ORDER, Flow, Size
from brt.route import Route
from brt.routers import EarlyExit, GatherRouter, LoopRouter, Router, ScatterRouter


@dataclass(frozen=True)
class KnownCells:
    """What is known of `Cells` without data."""

    num_root: Size


@dataclass(frozen=True)
class KnownRoute:
    """What is known of a `Route` without data."""

    num_cells: Size
    num_root: Size
    num_paths: int

    def __getitem__(self, path: int) -> KnownCells:
        return KnownCells(self.num_root)


class CompetitionError(Exception):
    """Whether a cell takes a path depends on other cells."""


def route_of(dry: DryRun, router: Router, args: Any, kwargs: Any) -> tuple[Flow, Any]:
    """What a router does with cells, and what it returns."""
    given = dict(inspect.signature(router.forward).bind(*args, **kwargs).arguments)
    if isinstance(router, ScatterRouter):
        return _scatter(dry, router, **given)
    if isinstance(router, GatherRouter):
        return _gather(dry, router, **given)
    if isinstance(router, EarlyExit):
        return _early_exit(dry, router, **given)
    if isinstance(router, LoopRouter):
        return _loop(dry, router, **given)
    return Flow("mixes", f"nothing is known of {type(router).__name__}"), UNKNOWN


def each_of(dry: DryRun, modules: list[nn.Module], paths: list[Any]) -> tuple[Flow, Any]:
    """What `brt.each` does."""
    found, values = Flow("keeps", "every module keeps the rows of its path apart"), []
    for p, (module, path) in enumerate(zip(modules, paths, strict=True)):
        args = path if isinstance(path, tuple) else (path,)
        flow, value = dry.call(module, args, {}, tensors_in(path))
        values.append(value)
        if ORDER.index(flow.kind) > ORDER.index(found.kind):
            found = Flow(flow.kind, f"path {p}: {flow.reason}")
    return found, values


def _scatter(
    dry: DryRun, router: ScatterRouter, x: Any, scores: Tensor, cells: Any = None
) -> tuple[Flow, Any]:
    flows = (x,) if isinstance(x, Tensor) else tuple(x)
    num_cells = flows[0].shape[0]
    num_root = num_cells if cells is None else _num_root(cells)
    paths: list[Any] = []
    for _ in range(router.num_paths if router.result == "paths" else 1):
        num_rows = dry.new_size()
        rows = tuple(
            dry.empty(num_rows, tuple(flow.shape[1 + router._is_per_path(i) :]), flow)
            for i, flow in enumerate(flows)
        )
        paths.append(rows[0] if isinstance(x, Tensor) else rows)
    known = KnownRoute(num_cells, num_root, router.num_paths)
    value = (tuple(paths) if router.result == "paths" else paths[0], known)
    flow, _ = dry.call(_decide, (router.protocol, scores, router.num_paths), {}, [scores])
    if flow.kind == "keeps":
        flow = Flow("permutes", "the rows of a path are cells, in their order")
    return flow, value


def _gather(
    dry: DryRun, router: GatherRouter, rows: Any, where: Any, residual: Any = None
) -> tuple[Flow, Any]:
    one = rows if isinstance(rows, Tensor) else rows[0]
    flows = (one,) if isinstance(one, Tensor) else tuple(one)
    if isinstance(where, KnownRoute):
        num_cells, num_root = where.num_cells, where.num_root
    elif isinstance(where, Route):  # of a module that a pass put in place of the scatter
        num_cells, num_root = where.num_cells, where.cells.root.num_cells
    else:
        num_cells = num_root = _num_root(where[0])
    if router.result == "union":
        num_cells = dry.new_size()
    out = tuple(dry.empty(num_cells, tuple(flow.shape[1:]), flow) for flow in flows)
    value: Any = out[0] if isinstance(one, Tensor) else out
    if router.result == "union":
        value = (value, KnownCells(num_root))
    return Flow("permutes", "each cell is made of its own rows"), value


def _early_exit(dry: DryRun, router: EarlyExit, x: Any) -> tuple[Flow, Any]:
    def all_exits(x: Any) -> list[Any]:
        seen: list[Any] = []
        for i, (stage, head) in enumerate(zip(router.stages, router.heads, strict=True)):
            x = stage(x) if isinstance(x, Tensor) else stage(*x)
            logits = head(x) if isinstance(x, Tensor) else head(*x)
            if i < len(router.scatters):
                scatter = router.scatters[i]
                assert isinstance(scatter, ScatterRouter)
                seen.append(_decide(scatter.protocol, logits, scatter.num_paths))
            seen += [x, logits]
        return seen

    flow, value = dry.call(all_exits, (x,), {}, tensors_in(x))
    return flow, value if value is UNKNOWN else value[-1]


def _loop(dry: DryRun, router: LoopRouter, x: Tensor, state: Any = None) -> tuple[Flow, Any]:
    def step(x: Tensor, state: Any) -> list[Any]:
        out, scores, state = router.netlet(x, state)
        return [out, state, _decide(router.protocol, scores, 2)]

    flow, _ = dry.call(step, (x, state), {}, tensors_in((x, state)))
    return flow, (x, state)  # a netlet keeps shapes


def _decide(protocol: Any, scores: Tensor, num_paths: int) -> list[Tensor | None]:
    decision = protocol(scores, num_paths)
    if decision.capacity is not None:
        raise CompetitionError("cells compete for the capacity of a path")
    return [decision.choice_NK, decision.mask_NP, decision.cell_PC, decision.weight]


def _num_root(cells: Any) -> Size:
    return cells.num_root if isinstance(cells, KnownCells) else cells.root.num_cells
