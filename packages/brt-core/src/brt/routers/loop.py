"""LoopRouter: cells go through a netlet until they are finished.

Legend: N cells, S trailing dims of a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from brt import checks, ops
from brt.cells import Cells
from brt.errors import RouteError
from brt.protocols.base import Protocol
from brt.protocols.top_k import TopK
from brt.route import Route, make_route
from brt.routers.base import Router
from brt.routers.gather import GatherRouter

_FINISHED = 1


class LoopRouter(Router):
    """Sends cells through a netlet again and again, until a protocol says that they are finished.

    ``forward(x, state=None)`` takes rows ``x [N, *S]`` and any nest of tensors ``state`` whose dim
    0 are the same rows (a key-value cache, a buffer of tokens), and returns both as each cell left
    them, in cell order. The netlet is ``netlet(x, state) -> (x, scores, state)``; it must treat
    rows apart from each other and keep shapes and dtypes.

    Eager calls compact: a finished cell takes no further part. Under ``torch.compile``,
    ``torch.export`` and CUDA graph capture all rows are carried with a mask of those still active
    (``torch.while_loop``; unrolled under capture), with equal results and gradients (those of a
    compiled loop work in torch 2.13; 2.11 raises where they are asked for). There the
    netlet is given finished cells too, as they were when they finished, and its results for them
    are dropped: it must not fail on them (clamp a position that has reached the end of a buffer).

    Args:
        netlet: the body of the loop.
        max_steps: most times that a cell goes through it.
        on_limit: what happens to cells that are not finished by then: "keep" their last values, or
            "error".
        protocol: two paths, 0 goes on and 1 is finished; by default the larger of the two scores
            ``[N, 2]``.

    Source: the loop router of Brainstorm (OSDI 2023, section 3.2).
    """

    def __init__(
        self,
        netlet: nn.Module,
        max_steps: int,
        on_limit: Literal["keep", "error"] = "keep",
        protocol: Protocol | None = None,
    ) -> None:
        super().__init__()
        if max_steps < 1:
            raise RouteError(f"LoopRouter: max_steps must be at least 1, got {max_steps}")
        if on_limit not in ("keep", "error"):
            raise RouteError(f"LoopRouter: on_limit must be 'keep' or 'error', got {on_limit!r}")
        self.netlet = netlet
        self.max_steps = max_steps
        self.on_limit = on_limit
        self.protocol = TopK(1) if protocol is None else protocol
        self.gather = GatherRouter(weighted=False)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Rows and their state -> both, as each cell left the loop."""
        leaves, nest = _flatten(state)
        for i, leaf in enumerate(leaves):
            ops.same_size(f"LoopRouter: rows of state leaf {i} and of x", leaf.shape[0], x.shape[0])
        if torch.compiler.is_compiling():
            rows = self._carried((x, *leaves), nest)
        elif x.is_cuda and torch.cuda.is_current_stream_capturing():
            rows = self._unrolled((x, *leaves), nest)
        else:
            rows = self._compacted((x, *leaves), nest)
        return rows[0], nest.filled(rows[1:])

    def _step(self, rows: tuple[Tensor, ...], nest: _Nest) -> tuple[tuple[Tensor, ...], Tensor]:
        """One pass through the netlet: (rows, scores)."""
        x, scores, state = self.netlet(rows[0], nest.filled(rows[1:]))
        leaves, new_nest = _flatten(state)
        if new_nest != nest:
            raise RouteError(
                f"LoopRouter: the netlet must return state as it got it, {nest}, not {new_nest}"
            )
        new = (x, *leaves)
        for i, (a, b) in enumerate(zip(rows, new, strict=True)):
            what = "x" if i == 0 else f"state leaf {i - 1}"
            ops.same_size(
                f"LoopRouter: rows of {what} after a step and before it", b.shape[0], a.shape[0]
            )
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                raise RouteError(
                    f"LoopRouter: the netlet changed {what} from {a.dtype}{list(a.shape)} to "
                    f"{b.dtype}{list(b.shape)}; rows must keep their shape: allocate buffers of "
                    "the final size and keep the position in the state"
                )
        return new, scores

    def _compacted(self, rows: tuple[Tensor, ...], nest: _Nest) -> tuple[Tensor, ...]:
        cells = Cells.of(rows[0].shape[0])
        done: list[tuple[Tensor, ...]] = []
        where: list[Cells] = []
        for step in range(self.max_steps):
            # The netlet runs at least once, so that its gradients are zeros for no cells, not None
            if step and rows[0].shape[0] == 0:
                break
            rows, scores = self._step(rows, nest)
            route = make_route(self.protocol(scores, 2), rows[0].shape[0], cells).with_sizes()
            self._observe(route, scores)
            paths = [_split(row, route) for row in rows]
            going, finished = 1 - _FINISHED, _FINISHED
            done.append(tuple(path[finished] for path in paths))
            where.append(route[finished])
            rows = tuple(path[going] for path in paths)
            cells = route[going]
        if self.on_limit == "error" and rows[0].shape[0]:
            raise RouteError(
                f"LoopRouter: {rows[0].shape[0]} of {cells.root.num_cells} cells are not finished "
                f"after max_steps={self.max_steps}; raise it, or on_limit='keep'"
            )
        index = cells.index_R(rows[0].device)
        done.append(rows)
        where.append(Cells(cells.root, index))
        return self.gather(done, where)

    def _masked_step(
        self, active_N: Tensor, rows: tuple[Tensor, ...], nest: _Nest
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        new, scores = self._step(rows, nest)
        decision = self.protocol(scores, 2).to_mask()
        assert decision.mask_NP is not None
        kept = tuple(
            torch.where(active_N.view(-1, *([1] * (a.ndim - 1))), b, a)
            for a, b in zip(rows, new, strict=True)
        )
        return active_N & ~decision.mask_NP[:, _FINISHED], kept

    def _carried(self, rows: tuple[Tensor, ...], nest: _Nest) -> tuple[Tensor, ...]:
        def goes_on(step: Tensor, active_N: Tensor, *rows: Tensor) -> Tensor:
            return (step < self.max_steps) & active_N.any()

        def body(step: Tensor, active_N: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            active_N, rows = self._masked_step(active_N, rows, nest)
            return (step + 1, active_N, *(_contiguous_clone(row) for row in rows))

        step = torch.zeros((), dtype=torch.int64, device=rows[0].device)
        active_N = torch.ones(rows[0].shape[0], dtype=torch.bool, device=rows[0].device)
        start = (step, active_N, *self._differentiable(tuple(row.contiguous() for row in rows)))
        _, active_N, *out = _while_loop(goes_on, body, start)
        if self.on_limit == "error":
            torch._assert_async(
                ~active_N.any(), f"LoopRouter: cells not finished after max_steps={self.max_steps}"
            )
        return tuple(out)

    def _differentiable(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rows, all floats among them requiring gradients where anything does.

        torch.while_loop (2.9 to 2.13) takes what requires none at its start for a constant, and the
        gradients that pass through it are then silently wrong.
        """
        sources = (t for t in (*rows, *self.netlet.parameters()) if t.requires_grad)
        source = next(sources, None) if torch.is_grad_enabled() else None
        if source is None:
            return rows
        nothing = source.reshape(-1)[:0].sum()
        return tuple(r + nothing.to(r.dtype) if r.is_floating_point() else r for r in rows)

    def _unrolled(self, rows: tuple[Tensor, ...], nest: _Nest) -> tuple[Tensor, ...]:
        active_N = torch.ones(rows[0].shape[0], dtype=torch.bool, device=rows[0].device)
        for _ in range(self.max_steps):
            active_N, rows = self._masked_step(active_N, rows, nest)
        if self.on_limit == "error":
            checks.check_values(
                ~active_N.any(),
                f"LoopRouter: cells not finished after max_steps={self.max_steps}",
                error=RouteError,
            )
        return rows

    def extra_repr(self) -> str:
        """The settings of the loop."""
        return f"max_steps={self.max_steps}, on_limit={self.on_limit!r}, {self.protocol!r}"


@dataclass(frozen=True)
class _Nest:
    """What holds the tensors of a state together; None may stand in their place."""

    spec: pytree.TreeSpec
    there: tuple[bool, ...]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The nest with these tensors."""
        left = iter(tensors)
        leaves = [next(left) if there else None for there in self.there]
        return pytree.tree_unflatten(leaves, self.spec)

    def __str__(self) -> str:
        return str(self.filled(["tensor"] * sum(self.there)))  # type: ignore[list-item]


def _flatten(state: Any) -> tuple[list[Tensor], _Nest]:
    """(tensors, what held them)."""
    leaves, spec = pytree.tree_flatten(state)
    for i, leaf in enumerate(leaves):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise RouteError(f"LoopRouter: state leaf {i} is {type(leaf).__name__}, not a tensor")
    nest = _Nest(spec, tuple(leaf is not None for leaf in leaves))
    return [leaf for leaf in leaves if leaf is not None], nest


def _while_loop(goes_on: Any, body: Any, start: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if torch.compiler.is_dynamo_compiling():
        return torch.while_loop(goes_on, body, start)
    with warnings.catch_warnings():
        # torch.export looks at the .grad of what `_differentiable` computed
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        return torch.while_loop(goes_on, body, start)


def _contiguous_clone(row: Tensor) -> Tensor:
    # torch.while_loop wants outputs that alias nothing and have the strides of its inputs
    return row.clone(memory_format=torch.contiguous_format)


def _split(row: Tensor, route: Route) -> tuple[Tensor, ...]:
    return route.split(ops.dispatch(row, route.cell_R, route.row_NK))
