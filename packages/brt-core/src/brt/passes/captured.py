"""A region as CUDA graphs: one for each shape of its inputs, or for each of a few sizes."""

from __future__ import annotations

import operator
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from brt.errors import PluginWarning
from brt.guard import compiled
from brt.passes import buckets
from brt.passes.conditional import OneCell, can_capture, different_streams
from brt.passes.derived import Slots, state_of
from brt.passes.exit_batches import Batches
from brt.passes.exit_region import CannotCaptureError
from brt.routers import Router


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph, the memory that it reads its inputs from, and that in which it leaves its result.

    ``kept`` is what else it reads and writes.
    """

    graph: Any
    inputs: list[Any]
    output: Any
    kept: Any = None


class CapturedRegion(nn.Module):
    """A region as CUDA graphs: ``forward(*inputs)``.

    It owns no parameters; when one of the region's is replaced, moved or written to, graphs are
    captured anew.

    Args:
        one_cell: for a region with exits, how it is captured for a call of one cell.
        batches: and for several; None where these run as they are.
        padding: numbers of rows that calls are padded to.
    """

    def __init__(
        self,
        scope: nn.Module,
        graph: fx.Graph,
        most_shapes: int,
        warm_ups: int,
        one_cell: OneCell | None = None,
        batches: Batches | None = None,
        padding: buckets.Padding = buckets.Padding(),  # noqa: B008 - it is frozen
    ) -> None:
        super().__init__()
        self._one_cell, self._batches = one_cell, batches
        self.padding = padding
        self.calls = frozenset(str(n.target) for n in graph.nodes if n.op == "call_module")
        self.replays = 0
        """Calls that replayed a graph."""
        self._scope = (scope,)
        self._run: Callable[..., Any] = compiled(graph)
        self._most_shapes, self._warm_ups = most_shapes, warm_ups
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Any, Captured | None] = OrderedDict()
        self._slots: Slots | None = None
        self._state: tuple[list[int], list[int]] | None = None
        self._weights: list[Tensor] = []
        # What graphs read, also where a weight lies elsewhere by now
        self._memory: list[Tensor] = []
        self._routers: tuple[Router, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs, which belong to one place in memory."""
        left_out = ("_lock", "_graphs", "_slots", "_state", "_weights", "_memory", "_routers")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def forward(self, *inputs: Any) -> Any:
        """What the region gives."""
        scope = self._scope[0]
        num_rows = buckets.rows_of(inputs)
        if num_rows == 0 or not self._can_replay(inputs):
            return self._run(scope, *inputs)
        size = self.padding.size_for(inputs)
        key = buckets.signature(inputs, size)
        with self._lock, torch.no_grad(), torch.inference_mode(False):
            captured = self._graphs.get(key)
            if captured is not None:
                _replay(captured, inputs)
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
                captured = self._graphs[key] = self._capture(inputs, size)
                if captured is not None:
                    _replay(captured, inputs)
            self._graphs.move_to_end(key)
            if captured is not None:
                self.replays += 1
                return buckets.cut(captured.output, None if size is None else num_rows)
        return self._run(scope, *inputs)

    def _weights_now(self) -> list[Tensor]:
        if self._slots is None:  # not before: while a model is copied, it is not whole yet
            self._slots = Slots.under(self._scope[0])
        return self._slots.read()

    def _can_replay(self, inputs: tuple[Any, ...]) -> bool:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or not tensors or torch.is_autocast_enabled("cuda"):
            return False
        if not all(type(x) is Tensor for x in tensors) or not can_record(tensors):
            return False
        if not all(isinstance(x, (Tensor, int, float, bool, str, type(None))) for x in inputs):
            return False
        if torch.is_grad_enabled():
            weights = self._weights_now()
            if any([t.requires_grad for t in (*tensors, *weights)]):
                return False
        return not self._is_observed()

    def _is_observed(self) -> bool:
        """Whether somebody counts decisions: a graph tells nobody, and its padding is not to be."""
        if self._routers is None:
            called = (self._scope[0].get_submodule(name) for name in self.calls)
            inner = {m: None for module in (self._scope[0], *called) for m in module.modules()}
            self._routers = tuple(m for m in inner if isinstance(m, Router))
        return any([router._observers for router in self._routers])

    def _capture(self, inputs: tuple[Any, ...], size: int | None) -> Captured | None:
        """Run on inputs of the graph's own, then record; None where that does not go."""
        rooms = buckets.room_for(inputs, size)
        buckets.fill(rooms, inputs)
        try:
            if self._one_cell is not None:
                several = buckets.rows_of(rooms) != 1 and self.padding.is_right(inputs)
                batches = self._batches if several else None
                return self._capture_exits(batches or self._one_cell, rooms)
            return record(lambda *given: self._run(self._scope[0], *given), rooms, self._warm_ups)
        except CannotRecordError as error:
            reason = str(error.__cause__).strip().partition("\n")[0]
            warnings.warn(
                f"capture: {type(self._scope[0]).__name__} runs without a CUDA graph: {reason}",
                PluginWarning,
                stacklevel=4,
            )
            return None

    def _capture_exits(self, exits: OneCell | Batches, rooms: list[Any]) -> Captured | None:
        """The same with conditional nodes at each exit; None for numbers of cells without."""
        self._run(self._scope[0], *rooms)  # which loads the packages of kernels
        if not can_capture():
            return None
        around, *streams = different_streams(exits.num_levels + 1)
        # What is made in the body of a node is in no pool of the graph
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
        around.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(around):
                for _ in range(self._warm_ups):
                    like: Any = exits.straight(rooms, streams)
            torch.cuda.current_stream().wait_stream(around)
            with torch.cuda.graph(graph, stream=around), torch.cuda.use_mem_pool(pool):
                output = exits.captured(rooms, streams, like)
        except CannotCaptureError:
            return None
        except RuntimeError as error:
            raise CannotRecordError from error
        # Not what a straight run of one cell computed: only batches hand over in its memory
        return Captured(
            graph, rooms, output, (pool, like.memory if exits is self._batches else None)
        )

    def extra_repr(self) -> str:
        """How many graphs are kept, and the sizes that calls are padded to."""
        sizes = self.padding.sizes
        padded = f", padded to {sizes} rows" if sizes else ""
        return f"graphs of {len(self._graphs)} of at most {self._most_shapes} shapes{padded}"


class CannotRecordError(Exception):
    """What runs does something that a CUDA graph cannot have; its cause says what."""


def can_record(tensors: Sequence[Tensor]) -> bool:
    """Whether graphs can be recorded and replayed for these, here and now."""
    return all(t.is_cuda for t in tensors) and not torch.cuda.is_current_stream_capturing()


def record(run: Callable[..., Any], rooms: list[Any], warm_ups: int) -> Captured:
    """A CUDA graph of ``run(*rooms)``, recorded after some runs of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            run(*rooms)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = run(*rooms)
    except RuntimeError as error:
        raise CannotRecordError from error
    return Captured(graph, rooms, output)


def _replay(captured: Captured, inputs: tuple[Any, ...]) -> None:
    buckets.fill(captured.inputs, inputs)
    captured.graph.replay()
