"""`overlap-exchange`: experts work on some cells while others are on their way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from operator import eq
from typing import ClassVar

import torch
from torch import fx

from brt import PassError
from brt.passes import Context, Pass
from brt_dist.measure import measure_transports
from brt_dist.passes.layers import Layer, first_call, gathered, layers, require_layers
from brt_dist.transport import Transport


@dataclass(frozen=True)
class OverlapExchange(Pass):
    """Cut the cells of expert-parallel layers into parts, as many as measure fastest.

    While the experts of a rank work on one part, the others are on their way. Every rank must
    optimise, with a sample of its own.

    Args:
        degrees: numbers of parts to try.
        repeats: timed runs of each.
        least_gain: how much faster than in one piece the best must be, as a share.
    """

    name: ClassVar[str] = "overlap-exchange"
    after: ClassVar[tuple[str, ...]] = ("place-experts",)

    degrees: tuple[int, ...] = (2, 4, 8)
    repeats: int = 5
    least_gain: float = 0.03

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.degrees or min(self.degrees) < 2 or self.repeats < 1:
            raise PassError(
                "overlap-exchange: degrees must be at least 2 and repeats at least 1, got "
                f"{self.degrees} and {self.repeats}"
            )

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region with experts on several ranks, and a sample."""
        require_layers(graph, ctx)
        if not ctx.sample:
            raise PassError("it measures: brt.optimize(model, passes=[...], sample=batch)")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Replace routers by those of the degree that is fastest."""
        changed = False
        for layer in layers(graph, ctx):
            transport = layer.router.transport
            if transport != Transport():
                ctx.leave(layer.target, f"its cells travel by {transport}, which was chosen")
                continue
            degree = self._degree(layer, graph, ctx)
            if degree > 1:
                overlapped = layer.by(dataclasses.replace(transport, degree=degree))
                layer.replace(ctx.insert(graph, overlapped, "overlapped"))
                changed = True
        return changed

    def _degree(self, layer: Layer, graph: fx.GraphModule, ctx: Context) -> int:
        """The number of parts that is fastest; the same on every rank."""
        group = layer.router.spread.group
        num_ranks = len(layer.router.spread.held_W)
        wheres = {d: f"{layer.target} in {d} parts on {num_ranks} ranks" for d in (*self.degrees,)}
        known = [f"{self.name}:{ctx.path(where)}" in ctx.known for where in wheres.values()]
        best = 0
        if not bool(gathered(torch.tensor(known), group).all()):
            best = self._measured(layer, graph, ctx)
        chosen = [ctx.decide(where, partial(eq, d, best)) for d, where in wheres.items()]
        # What a rank remembers may be another decision than that of the others
        agreed = gathered(torch.tensor(chosen), group)[0].tolist()
        return next((d for d, is_chosen in zip(wheres, agreed, strict=True) if is_chosen), 1)

    def _measured(self, layer: Layer, graph: fx.GraphModule, ctx: Context) -> int:
        call = first_call(layer, graph, ctx)
        assert call is not None  # the sample reaches every node of a region
        args, kwargs = call
        plain = layer.router.transport
        transports = [dataclasses.replace(plain, degree=d) for d in (1, *self.degrees)]
        seconds = measure_transports(
            layer.router, transports, *args, repeats=self.repeats, **kwargs
        )
        best = min(range(1, len(seconds)), key=seconds.__getitem__)
        times = ", ".join(
            f"{t.degree}: {1e3 * s:.2f}" for t, s in zip(transports, seconds, strict=True)
        )
        figures = f"milliseconds by parts: {times}"
        if seconds[0] < seconds[best] * (1 + self.least_gain):
            ctx.leave(layer.target, f"in one piece it is as fast; {figures}")
            return 1
        ctx.note(f"{layer.target}: {figures}")
        return transports[best].degree
