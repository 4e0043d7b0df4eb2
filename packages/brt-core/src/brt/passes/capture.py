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
from brt.passes.base import Context, Pass
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

    Args:
        most_shapes: graphs that are kept; the one used longest ago makes room.
        warm_ups: runs before a capture, in which kernels are chosen and memory is found.
    """

    name: ClassVar[str] = "capture"
    after: ClassVar[tuple[str, ...]] = (
        "fuse-conv-chains", "fuse-horizontal", "fuse-vertical", "drop-dead-paths",
        "fold-permanent-paths",
    )  # fmt: skip

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
                why = "writes to an input"
            if why is not None:
                raise PassError(f"{node.name} {why}; a graph cannot be captured around that")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Let one module stand for the whole region."""
        inner = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        inner.output(inner.graph_copy(graph.graph, copied))
        captured = CapturedRegion(ctx.scope, inner, self.most_shapes, self.warm_ups)
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
        ctx.note(
            f"{len(inner.nodes)} nodes are one CUDA graph for each of {self.most_shapes} shapes"
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


class CapturedRegion(nn.Module):
    """A region as CUDA graphs: ``forward(*inputs)``.

    It owns no parameters; when one of the region's is replaced, moved or written to, graphs are
    captured anew.
    """

    def __init__(self, scope: nn.Module, graph: fx.Graph, most_shapes: int, warm_ups: int) -> None:
        super().__init__()
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

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs, which belong to one place in memory."""
        left_out = ("_lock", "_graphs", "_slots", "_state", "_weights")
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
            weights = self._weights_now()
            state = state_of(weights)
            if state is None:  # inference tensors do not tell whether they were written to
                return self._run(scope, *inputs)
            if state != self._state or not all(map(operator.is_, weights, self._weights)):
                self._graphs.clear()
                self._state, self._weights = state, weights
            if key not in self._graphs:
                while len(self._graphs) >= self._most_shapes:
                    self._graphs.popitem(last=False)
                self._graphs[key] = self._capture(inputs)
            self._graphs.move_to_end(key)
            captured = self._graphs[key]
            if captured is not None:
                for static, given in zip(captured.inputs, inputs, strict=True):
                    if isinstance(static, Tensor):
                        static.copy_(given)
                captured.graph.replay()
                self.replays += 1
                return pytree.tree_map_only(Tensor, torch.clone, captured.output)
        return self._run(scope, *inputs)

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
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"capture: {type(scope).__name__} runs without a CUDA graph: {reason}",
                PluginWarning,
                stacklevel=4,
            )
            return None
        return _Captured(graph, static, output)

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
