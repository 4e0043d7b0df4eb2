"""capture: a region runs as CUDA graphs, replayed with other inputs and numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx, nn

from brt.cellflow.whole import RowsTogetherError
from brt.errors import PassError, TraceError
from brt.grouped import each
from brt.guard import Guarded
from brt.passes.base import Context, Lowering, Pass
from brt.passes.buckets import Padding, may_pad, require_rows_apart, sizes_for
from brt.passes.captured import CapturedRegion
from brt.passes.conditional import OneCell
from brt.passes.exit_batches import Batches
from brt.passes.match import draws_random, module_of, router_of, writes
from brt.routers import EarlyExit, GatherRouter, LoopRouter, ScatterRouter

_HOST_METHODS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__")


@dataclass(frozen=True)
class Capture(Pass):
    """Record the region as a CUDA graph for each shape of its inputs, and replay it.

    A replay launches everything at once: what it costs to launch kernels one by one is gone. Loads
    may differ from call to call, and, where each row is computed by itself, so may their number:
    a call is padded to the next of a few sizes, and its result is cut back. It takes regions that
    do not read the device, which the fusing passes make of scatters. Results are copied out of the
    graph's memory, so that they do not alias. Where gradients are needed, under a compiler, in
    other captures, for no rows, and while its routers are observed the region runs as it is.

    In a region with exits (scatters of two paths) what is behind an exit is a conditional node of
    the graph. Several cells go on together, in front, by the smallest of some sizes that holds
    them; where it cannot be shown that each is computed by itself, they run as the region is.

    Args:
        most_shapes: graphs that are kept; the one used longest ago makes room.
        warm_ups: runs before a capture, in which kernels are chosen and memory is found.
        buckets: numbers of rows (of the first dim of the inputs) that have a graph; "profile"
            takes them from the calls that the profile saw. More rows than the last one, and None:
            a graph for each number.
        batches: whether regions with exits are captured for several cells too.
    """

    name: ClassVar[str] = "capture"
    after: ClassVar[tuple[str, ...]] = (
        "fuse-conv-chains", "fuse-horizontal", "fuse-vertical", "drop-dead-paths",
        "fold-constants", "fold-permanent-paths",
    )  # fmt: skip

    lowering: ClassVar[tuple[Lowering, ...]] = ("conditional",)

    most_shapes: int = 16
    warm_ups: int = 2
    buckets: Literal["profile"] | tuple[int, ...] | None = "profile"
    batches: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        if self.most_shapes < 1 or self.warm_ups < 1:
            raise PassError(
                "capture: most_shapes and warm_ups must be at least 1, got "
                f"{self.most_shapes} and {self.warm_ups}"
            )
        if self.buckets in (None, "profile"):
            return
        if isinstance(self.buckets, str) or not all(
            isinstance(size, int) and size > 0 for size in self.buckets or (0,)
        ):
            raise PassError(
                "capture: buckets are numbers of rows, (1, 8, 64), or 'profile', or None for exact "
                f"shapes; got {self.buckets!r}"
            )

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region on CUDA that draws no random numbers and does not read the device."""
        devices = {t.device.type for t in (*ctx.scope.parameters(), *ctx.scope.buffers())}
        if devices != {"cuda"}:
            raise PassError(
                f"it captures CUDA graphs, and the region is on {', '.join(devices) or 'no device'}"
            )
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")
        for node in graph.graph.nodes:
            why = _reads_device(node, ctx.scope)
            if writes(node, ctx.scope) and any(n.op == "placeholder" for n in node.all_input_nodes):
                raise PassError(f"{node.name} writes to an input; that cannot be captured")
            if why is not None:
                try:
                    OneCell(graph.graph, ctx.scope)
                except PassError as error:
                    raise PassError(
                        f"{node.name} {why}; a graph cannot be captured around that, nor with a "
                        f"conditional node: {error}"
                    ) from error

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Kernels for other numbers of rows round otherwise."""
        relative, absolute = super().tolerance(dtype)
        return 10 * relative if dtype == torch.float32 else relative, absolute

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Let one module stand for the whole region."""
        inner = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        inner.output(inner.graph_copy(graph.graph, copied))
        captured = self._captured(graph, inner, ctx)
        name = ctx.insert(graph, captured, "captured_region")
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        output = next(node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            whole = graph.graph.call_module(name, tuple(inputs))
        output.args = (whole,)
        # Also what writes in place, which the clean-up after a pass would keep: it is inside now
        for node in reversed(list(graph.graph.nodes)):
            if node.op not in ("placeholder", "output") and node not in (whole, *_checks(graph)):
                graph.graph.erase_node(node)
        return True

    def _captured(self, graph: fx.GraphModule, inner: fx.Graph, ctx: Context) -> CapturedRegion:
        """What stands for the region, with what can be shown of calls of other numbers of rows."""
        has_exits = any(_reads_device(n, ctx.scope) is not None for n in graph.graph.nodes)
        one_cell = OneCell(inner, ctx.scope) if has_exits else None
        batches, padding = None, Padding()
        if self.batches if has_exits else may_pad(self.buckets, ctx):
            try:
                apart = require_rows_apart(graph, ctx)
                batches = Batches(inner, ctx.scope) if has_exits else None
                padding = Padding(sizes_for(self.buckets, apart, ctx), apart.shapes)
            except (RowsTogetherError, TraceError, PassError) as error:
                what = "several cells" if has_exits else "other numbers of rows"
                ctx.leave(what, f"padding might change results: {error}")
        form = "" if one_cell is None else ", with conditional nodes at each exit"
        form += "" if one_cell is None or batches is not None else ", of one cell"
        ctx.note(
            f"{len(inner.nodes)} nodes are one CUDA graph for each of {self.most_shapes} shapes"
            f"{form}"
        )
        return CapturedRegion(
            ctx.scope, inner, self.most_shapes, self.warm_ups, one_cell, batches, padding
        )


def _checks(graph: fx.GraphModule) -> list[fx.Node]:
    """What compares arguments with those of the trace, before anything runs."""
    from brt.optimized import expect, expect_given  # it imports the passes' records

    return [node for node in graph.graph.nodes if node.target in (expect, expect_given)]


def _reads_device(node: fx.Node, scope: nn.Module) -> str | None:
    """Why a node waits for the device, in words; None where it does not."""
    router = router_of(node, scope)
    if isinstance(router, ScatterRouter) and router.result == "paths":
        return "gives rows by path, whose number the host must read"
    if isinstance(router, (EarlyExit, LoopRouter)):
        return "drops rows that are finished, whose number the host must read"
    if isinstance(router, GatherRouter) and router.result == "union":
        return "gathers the rows that there are, whose number the host must read"
    if isinstance(module_of(node, scope), Guarded):
        return "checks an assumption on the host"
    if node.target is each:
        return "looks which paths have rows"
    if node.op == "call_method" and node.target in _HOST_METHODS:
        return "brings values to the host"
    return None
