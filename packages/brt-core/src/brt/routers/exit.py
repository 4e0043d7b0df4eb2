"""EarlyExit: stages with an exit after each, where cells that are sure leave.

Legend: N cells, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from brt.cells import Cells
from brt.errors import RouteError
from brt.protocols.base import Protocol
from brt.protocols.threshold import BinaryThreshold
from brt.routers.base import Router
from brt.routers.gather import GatherRouter
from brt.routers.scatter import ScatterRouter


class EarlyExit(Router):
    """Runs stages in turn; after each but the last, cells whose head is sure enough leave.

    ``forward(x)`` takes rows ``[N, *S]`` or a tuple of flows, and returns the logits ``[N, C]`` of
    the exit that each cell took, in cell order. A stage takes and returns what the next one takes
    (one tensor, or as many positional arguments as there are flows); head i takes what stage i
    returned. Only the cells that stay go through the stages behind an exit.

    Args:
        stages: the parts of the backbone, in order.
        heads: a classifier for each stage; the last one's answer is taken by all that are left.
        protocol: one protocol of two paths for all exits, or one for each but the last; path 0
            leaves. Usually `BinaryThreshold`: leave where the softmax is confident.

    Sources: BranchyNet (2016); MSDNet (ICLR 2018), section 4.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        protocol: Protocol | Sequence[Protocol] | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        num_exits = len(self.stages) - 1
        if num_exits < 0 or len(self.heads) != len(self.stages):
            raise RouteError(
                f"EarlyExit: a head for each of at least one stage, got {len(self.stages)} stages "
                f"and {len(self.heads)} heads"
            )
        if protocol is None:
            protocol = BinaryThreshold(0.9)
        protocols = [protocol] * num_exits if isinstance(protocol, Protocol) else list(protocol)
        if len(protocols) != num_exits:
            raise RouteError(
                f"EarlyExit: {len(protocols)} protocols for {num_exits} exits before the last"
            )
        self.scatters = nn.ModuleList(ScatterRouter(p, 2) for p in protocols)
        self.gather = GatherRouter(weighted=False)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Rows -> logits of the exit that each cell took."""
        if len(self.stages) == 1:
            return self._stage(0, x)[1]
        left, where = self._exits(x)
        return self.gather(left, where)

    def with_exits(self, x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, tuple[Cells, ...]]:
        """(logits, cells that left at each exit): `forward`, and who left where."""
        if len(self.stages) == 1:
            logits = self._stage(0, x)[1]
            cells = Cells.of(logits.shape[0])
            return logits, (Cells(cells.root, cells.index_R(logits.device)),)
        left, where = self._exits(x)
        return self.gather(left, where), tuple(where)

    def _exits(self, x: Tensor | tuple[Tensor, ...]) -> tuple[list[Tensor], list[Cells]]:
        """Logits of those that left at each exit, and which cells these are; it can be traced."""
        cells: Cells | None = None
        left: list[Tensor] = []
        where: list[Cells] = []
        for i, scatter in enumerate(self.scatters):
            x, logits = self._stage(i, x)
            flows = tuple(x) if isinstance(x, (tuple, list)) else (x,)
            paths, route = scatter((*flows, logits), logits, cells)
            left.append(paths[0][-1])
            where.append(route[0])
            x = paths[1][:-1] if isinstance(x, (tuple, list)) else paths[1][0]
            cells = route[1]
        left.append(self._stage(len(self.scatters), x)[1])
        assert cells is not None
        return left, [*where, cells]

    def _stage(self, exit_idx: int, x: Any) -> tuple[Any, Tensor]:
        """(what stage i makes of its rows, the logits of its head)."""
        x = _call(self.stages[exit_idx], x)
        return x, _call(self.heads[exit_idx], x)


def _call(module: Callable[..., Any], x: Any) -> Any:
    return module(*x) if isinstance(x, (tuple, list)) else module(x)
