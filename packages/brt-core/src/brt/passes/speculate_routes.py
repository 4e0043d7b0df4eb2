"""speculate-routes: the likely way runs as a straight line, and its routers are checked together.

Legend: P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from brt.errors import PassError
from brt.guard import Guard, Guarded, compiled
from brt.passes.base import Context, Lowering, Pass
from brt.passes.likely_way import Likely
from brt.passes.match import draws_random
from brt.passes.segments import Search, Segment
from brt.passes.verify import cloned, training
from brt.race import race

_GAIN = 0.95
_SECONDS = 0.5


@dataclass(frozen=True)
class SpeculateRoutes(Pass):
    """Run what the profile shows to be likely before the routers have answered.

    A segment is a run of nodes with one router or several in succession, of each of which one path
    takes all cells. It is run as a straight line: rows of that path are the input as it is, and
    nothing is scattered or gathered. The decisions are checked together, by one read of the host;
    where any cell takes another path the segment runs again as it was, from the same inputs.

    Args:
        least_probability: in what share of the profile's forwards all cells must have taken the
            likely paths of all routers of a segment.
        measure: leave a segment alone unless it gains on the sample, misses of the profile counted.
    """

    name: ClassVar[str] = "speculate-routes"
    after: ClassVar[tuple[str, ...]] = (
        "fuse-conv-chains", "fuse-horizontal", "defer-operations", "fuse-vertical",
    )  # fmt: skip
    lowering: ClassVar[tuple[Lowering, ...]] = ("check",)
    needs_profile: ClassVar[bool] = True

    least_probability: float = 0.9
    measure: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.least_probability <= 1:
            raise PassError(
                "speculate-routes: least_probability must be above 0 and at most 1, got "
                f"{self.least_probability}"
            )

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """An inference region without random numbers."""
        name = training(ctx.scope)
        if name is not None:
            raise PassError(
                f"{name} is in training mode, where every branch runs, also without rows, so that "
                "its gradients are zeros and not None; call model.eval() first"
            )
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Put a `SpeculativeSegment` in the place of each segment that is likely enough."""
        found = Search(graph, ctx, self.least_probability).segments()
        # All are measured on the graph as it is now
        made = [(segment, _module(segment, ctx)) for segment in found]
        kept = [
            (segment, module)
            for segment, module in made
            if not self.measure
            or ctx.decide(segment.name, partial(_gains, segment, module, graph, ctx))
        ]
        for segment, module in kept:
            segment.replace(graph, ctx.insert(graph, module, "brt_segment"))
            ctx.note(
                f"{segment.name}: in {segment.probability:.1%} of the forwards of the profile "
                f"{segment.words}; {len(segment.nodes)} nodes run as {module.num_likely}"
            )
        return bool(kept)


def _module(segment: Segment, ctx: Context) -> SpeculativeSegment:
    """What runs in the place of a segment."""
    inputs, outputs = segment.inputs, segment.outputs
    given: Any = outputs[0] if len(outputs) == 1 else tuple(outputs)
    original = fx.Graph()
    copied = {node: original.placeholder(node.name) for node in inputs}
    for node in segment.nodes:
        copied[node] = original.node_copy(node, copied.__getitem__)
    original.output(fx.node.map_arg(given, copied.__getitem__))
    reader = Likely.of(ctx.scope, segment.nodes, segment.choices)
    likely = reader.graph(segment.nodes, inputs, given)
    targets = tuple(choice.scatter.target for choice in segment.choices)
    guard = ctx.guard(segment.name, segment.words)
    return SpeculativeSegment(guard, ctx.scope, original, likely, targets)


def _gains(
    segment: Segment, module: SpeculativeSegment, graph: fx.GraphModule, ctx: Context
) -> bool:
    """Whether it is faster on the sample, where misses cost the likely way as well."""
    with torch.no_grad():
        for call in ctx.sample:
            inputs = None if call.kwargs else _Stopped(graph, segment).inputs_of(call.args)
            if inputs is None or module.likely(inputs) is None:
                continue
            tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
            device = tensors[0].device if tensors else torch.device("cpu")
            runs = [partial(module.original, *inputs), partial(module, *inputs)]
            before, hit = race(runs, device, seconds=_SECONDS)
            mean = hit + (1 - segment.probability) * before
            what = (
                f"measured {1e3 * before:.3f} ms as it was, {1e3 * hit:.3f} ms on a hit; with hits "
                f"in {segment.probability:.1%} {1e3 * mean:.3f} ms"
            )
            if mean > _GAIN * before:
                ctx.leave(segment.name, what)
                return False
            ctx.note(f"{segment.name}: {what}")
            return True
    ctx.leave(segment.name, "no call of the sample goes the likely way, to be measured")
    return False


class _Stopped(fx.Interpreter):
    """Runs a region as far as a segment."""

    def __init__(self, graph: fx.GraphModule, segment: Segment) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._segment = segment

    def inputs_of(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What the segment is given, copied."""
        given = iter(cloned(tuple(args)))
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node is self._segment.nodes[0]:
                break
            if node.op == "placeholder":
                default = node.args[0] if node.args else None
                self.env[node] = next(given, default)
            else:
                self.env[node] = self.run_node(node)
        return tuple(cloned(self.env[node]) for node in self._segment.inputs)


class SpeculativeSegment(Guarded):
    """A segment of a graph that first goes the likely way.

    ``forward(*inputs)`` returns what the nodes of the segment give. On a CPU, where that costs
    nothing, each decision is looked at as soon as it is there, and a miss ends the attempt;
    elsewhere all are looked at once, at the end. Not counted, and as it was, it runs while
    gradients are recorded, under a compiler, in a CUDA capture and while its routers are observed.
    """

    def __init__(
        self,
        guard: Guard,
        scope: nn.Module,
        original: fx.Graph,
        likely: fx.Graph,
        router_targets: tuple[str, ...],
    ) -> None:
        super().__init__(guard, scope)
        self._original, self._likely = compiled(original), compiled(likely)
        both = (*original.nodes, *likely.nodes)
        self.calls = frozenset(str(n.target) for n in both if n.op == "call_module")
        self.num_likely = len([n for n in likely.nodes if n.op != "placeholder"]) - 1
        self.router_targets = router_targets
        self.is_early = True
        """Whether decisions on a CPU are looked at one by one."""

    def forward(self, *inputs: Any) -> Any:
        """What the segment gives."""
        if self._speculates():
            found = self.likely(inputs)
            self.guard.count(found is not None)
            if found is not None:
                return found[0]
        return self.original(*inputs)

    def original(self, *inputs: Any) -> Any:
        """The segment as it was."""
        return self._original(self.scope, *inputs)

    def likely(self, inputs: Sequence[Any]) -> tuple[Any] | None:
        """What the likely way gives; None where a cell does not go it."""
        try:
            found, hits = self._likely(self.scope, self.is_early, *inputs)
            if not self.is_early or not all(hit.device.type == "cpu" for hit in hits):
                is_hit = hits[0] if len(hits) == 1 else torch.stack(hits).all()
                if not is_hit:
                    return None
        except Exception:
            return None  # what the original says to this input is right
        return (found,)

    def _speculates(self) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        return not any(attrgetter(t)(self.scope)._observers for t in self.router_targets)

    def extra_repr(self) -> str:
        """The assumption, and how much runs."""
        return f"{super().extra_repr()}; {self.num_likely} nodes on a hit"
