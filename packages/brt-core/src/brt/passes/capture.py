"""capture: a region runs as a CUDA graph, replayed with other inputs of the same shapes."""

from __future__ import annotations

import operator
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from brt.errors import PassError, PluginWarning
from brt.grouped import each
from brt.guard import Guarded, compiled
from brt.passes.base import Context, Lowering, Pass
from brt.passes.conditional import CannotCaptureError, OneCell, can_capture, different_streams
from brt.passes.derived import Slots, state_of
from brt.passes.match import draws_random, module_of, router_of, writes
from brt.routers import EarlyExit, GatherRouter, LoopRouter, ScatterRouter

_HOST_METHODS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__")


@dataclass(frozen=True)
class Capture(Pass):
    """Record the region as a CUDA graph for each shape of its inputs, and replay it.

    A replay launches everything at once: what it costs to launch kernels one by one is gone. Loads
    may differ from call to call. It takes regions that do not read the device, which the fusing
    passes make of scatters. Results are copied out of the graph's memory, so that they do not
    alias. Where gradients are needed, under a compiler, and in other captures the region runs as
    it is.

    A region with exits (scatters of two paths) is captured for one cell, where what is behind an
    exit is a conditional node of the graph; with other numbers of cells it runs as it is.

    Args:
        most_shapes: graphs that are kept; the one used longest ago makes room.
        warm_ups: runs before a capture, in which kernels are chosen and memory is found.
    """

    name: ClassVar[str] = "capture"
    after: ClassVar[tuple[str, ...]] = (
        "fuse-conv-chains", "fuse-horizontal", "fuse-vertical", "drop-dead-paths",
        "fold-constants", "fold-permanent-paths",
    )  # fmt: skip

    lowering: ClassVar[tuple[Lowering, ...]] = ("conditional",)

    most_shapes: int = 16
    warm_ups: int = 2

    def __post_init__(self) -> None:
        """Check the options."""
        if self.most_shapes < 1 or self.warm_ups < 1:
            raise PassError(
                "capture: most_shapes and warm_ups must be at least 1, got "
                f"{self.most_shapes} and {self.warm_ups}"
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

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Let one module stand for the whole region."""
        inner = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        inner.output(inner.graph_copy(graph.graph, copied))
        one_cell = None
        if any(_reads_device(node, ctx.scope) is not None for node in graph.graph.nodes):
            one_cell = OneCell(inner, ctx.scope)
        captured = CapturedRegion(ctx.scope, inner, self.most_shapes, self.warm_ups, one_cell)
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
        form = "" if one_cell is None else " of one cell, with a conditional node at each exit"
        ctx.note(
            f"{len(inner.nodes)} nodes are one CUDA graph for each of {self.most_shapes} shapes"
            f"{form}"
        )
        return True


def _checks(graph: fx.GraphModule) -> list[fx.Node]:
    """What compares arguments with those of the trace, before anything runs."""
    from brt.optimized import expect, expect_given  # it imports the passes' records

    return [node for node in graph.graph.nodes if node.target in (expect, expect_given)]


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: Any
    inputs: list[Any]
    output: Any
    pool: Any = None


class CapturedRegion(nn.Module):
    """A region as CUDA graphs: ``forward(*inputs)``.

    It owns no parameters; when one of the region's is replaced, moved or written to, graphs are
    captured anew.
    """

    def __init__(
        self,
        scope: nn.Module,
        graph: fx.Graph,
        most_shapes: int,
        warm_ups: int,
        one_cell: OneCell | None = None,
    ) -> None:
        super().__init__()
        self._one_cell = one_cell
        self.calls = frozenset(str(n.target) for n in graph.nodes if n.op == "call_module")
        self.replays = 0
        """Calls that replayed a graph."""
        self._scope = (scope,)
        self._run: Callable[..., Any] = compiled(graph)
        self._most_shapes, self._warm_ups = most_shapes, warm_ups
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._slots: Slots | None = None
        self._state: tuple[list[int], list[int]] | None = None
        self._weights: list[Tensor] = []
        # What graphs read, also where a weight lies elsewhere by now
        self._memory: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs, which belong to one place in memory."""
        left_out = ("_lock", "_graphs", "_slots", "_state", "_weights", "_memory")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def forward(self, *inputs: Any) -> Any:
        """What the region gives."""
        scope = self._scope[0]
        if not self._can_replay(inputs):
            return self._run(scope, *inputs)
        key = tuple(
            (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x
            for x in inputs
        )
        with self._lock, torch.no_grad(), torch.inference_mode(False):
            captured = self._graphs.get(key)
            if captured is not None:
                self._replay(captured, inputs)
            # Thousands of weights are looked at while the device is at work already
            weights = self._weights_now()
            state = state_of(weights)
            if state is None:  # inference tensors do not tell whether they were written to
                return self._run(scope, *inputs)
            if state != self._state or not all(map(operator.is_, weights, self._weights)):
                self._graphs.clear()
                self._state, self._weights = state, weights
                self._memory = [weight.detach() for weight in weights]
                captured = None
            if key not in self._graphs:
                while len(self._graphs) >= self._most_shapes:
                    self._graphs.popitem(last=False)
                captured = self._graphs[key] = self._capture(inputs)
                if captured is not None:
                    self._replay(captured, inputs)
            self._graphs.move_to_end(key)
            if captured is not None:
                self.replays += 1
                return pytree.tree_map_only(Tensor, torch.clone, captured.output)
        return self._run(scope, *inputs)

    @staticmethod
    def _replay(captured: _Captured, inputs: tuple[Any, ...]) -> None:
        for static, given in zip(captured.inputs, inputs, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)
        captured.graph.replay()

    def _weights_now(self) -> list[Tensor]:
        if self._slots is None:  # not before: while a model is copied, it is not whole yet
            self._slots = Slots.under(self._scope[0])
        return self._slots.read()

    def _can_replay(self, inputs: tuple[Any, ...]) -> bool:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or not tensors or torch.is_autocast_enabled("cuda"):
            return False
        if not all(type(x) is Tensor and x.is_cuda for x in tensors):
            return False
        if not all(isinstance(x, (Tensor, int, float, bool, str, type(None))) for x in inputs):
            return False
        if torch.is_grad_enabled():
            weights = self._weights_now()
            if any([t.requires_grad for t in (*tensors, *weights)]):
                return False
        return not torch.cuda.is_current_stream_capturing()

    def _capture(self, inputs: tuple[Any, ...]) -> _Captured | None:
        """Run on inputs of the graph's own, then record; None where that does not go."""
        if self._one_cell is not None:
            return self._capture_exits(self._one_cell, inputs)
        scope = self._scope[0]
        static = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self._warm_ups):
                self._run(scope, *static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                output = self._run(scope, *static)
        except RuntimeError as error:
            self._warn(error)
            return None
        return _Captured(graph, static, output)

    def _capture_exits(self, one_cell: OneCell, inputs: tuple[Any, ...]) -> _Captured | None:
        """The same with a conditional node at each exit; None for more than one cell."""
        static = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        self._run(self._scope[0], *inputs)  # which loads the packages of kernels
        if not can_capture():
            return None
        around, *streams = different_streams(one_cell.num_levels + 1)
        # What is made in the body of a node is in no pool of the graph
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
        around.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(around):
                for _ in range(self._warm_ups):
                    like = one_cell.straight(static, streams)
            torch.cuda.current_stream().wait_stream(around)
            with torch.cuda.graph(graph, stream=around), torch.cuda.use_mem_pool(pool):
                output = one_cell.captured(static, streams, like)
        except CannotCaptureError:
            return None
        except RuntimeError as error:
            self._warn(error)
            return None
        return _Captured(graph, static, output, pool)

    def _warn(self, error: RuntimeError) -> None:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"capture: {type(self._scope[0]).__name__} runs without a CUDA graph: {reason}",
            PluginWarning,
            stacklevel=5,
        )

    def extra_repr(self) -> str:
        """How many shapes are kept."""
        return f"graphs of {len(self._graphs)} of at most {self._most_shapes} shapes"


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
