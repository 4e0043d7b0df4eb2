"""LoopRouter: cells go through a netlet until they are finished.

Legend: N cells, S trailing dims of a row.
"""

from __future__ import annotations

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
    (``torch.while_loop``; unrolled under capture), with equal results and gradients. There the
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
        leaves, spec = pytree.tree_flatten(state)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                raise RouteError(
                    f"LoopRouter: state leaf {i} is {type(leaf).__name__}, not a tensor"
                )
            ops.same_size(f"LoopRouter: rows of state leaf {i} and of x", leaf.shape[0], x.shape[0])
        if torch.compiler.is_compiling():
            rows = self._carried((x, *leaves), spec)
        elif x.is_cuda and torch.cuda.is_current_stream_capturing():
            rows = self._unrolled((x, *leaves), spec)
        else:
            rows = self._compacted((x, *leaves), spec)
        return rows[0], pytree.tree_unflatten(list(rows[1:]), spec)

    def _step(
        self, rows: tuple[Tensor, ...], spec: pytree.TreeSpec
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """One pass through the netlet: (rows, scores)."""
        x, scores, state = self.netlet(rows[0], pytree.tree_unflatten(list(rows[1:]), spec))
        leaves, new_spec = pytree.tree_flatten(state)
        if new_spec != spec:
            raise RouteError(
                f"LoopRouter: the netlet must return state as it got it, {spec}, not {new_spec}"
            )
        new = (x, *leaves)
        for i, (a, b) in enumerate(zip(rows, new, strict=True)):
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                what = "x" if i == 0 else f"state leaf {i - 1}"
                raise RouteError(
                    f"LoopRouter: the netlet changed {what} from {a.dtype}{list(a.shape)} to "
                    f"{b.dtype}{list(b.shape)}; rows must keep their shape: allocate buffers of "
                    "the final size and keep the position in the state"
                )
        return new, scores

    def _compacted(self, rows: tuple[Tensor, ...], spec: pytree.TreeSpec) -> tuple[Tensor, ...]:
        cells = Cells.of(rows[0].shape[0])
        done: list[tuple[Tensor, ...]] = []
        where: list[Cells] = []
        for step in range(self.max_steps):
            # The netlet runs at least once, so that its gradients are zeros for no cells, not None
            if step and rows[0].shape[0] == 0:
                break
            rows, scores = self._step(rows, spec)
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
        self, active_N: Tensor, rows: tuple[Tensor, ...], spec: pytree.TreeSpec
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        new, scores = self._step(rows, spec)
        decision = self.protocol(scores, 2).to_mask()
        assert decision.mask_NP is not None
        kept = tuple(
            torch.where(active_N.view(-1, *([1] * (a.ndim - 1))), b, a)
            for a, b in zip(rows, new, strict=True)
        )
        return active_N & ~decision.mask_NP[:, _FINISHED], kept

    def _carried(self, rows: tuple[Tensor, ...], spec: pytree.TreeSpec) -> tuple[Tensor, ...]:
        def goes_on(step: Tensor, active_N: Tensor, *rows: Tensor) -> Tensor:
            return (step < self.max_steps) & active_N.any()

        def body(step: Tensor, active_N: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            active_N, rows = self._masked_step(active_N, rows, spec)
            return (step + 1, active_N, *(row.clone() for row in rows))

        step = torch.zeros((), dtype=torch.int64, device=rows[0].device)
        active_N = torch.ones(rows[0].shape[0], dtype=torch.bool, device=rows[0].device)
        start = (step, active_N, *self._differentiable(rows))
        _, active_N, *out = torch.while_loop(goes_on, body, start)
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

    def _unrolled(self, rows: tuple[Tensor, ...], spec: pytree.TreeSpec) -> tuple[Tensor, ...]:
        active_N = torch.ones(rows[0].shape[0], dtype=torch.bool, device=rows[0].device)
        for _ in range(self.max_steps):
            active_N, rows = self._masked_step(active_N, rows, spec)
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


def _split(row: Tensor, route: Route) -> tuple[Tensor, ...]:
    return route.split(ops.dispatch(row, route.cell_R, route.row_NK))
