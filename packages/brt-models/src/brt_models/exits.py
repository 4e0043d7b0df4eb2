"""Networks with exits: an image that is sure enough leaves, and the others go on.

Shape letters: N images (cells), C classes, H height, W width, K exits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from brt import Cells, GatherRouter, Route, ScatterRouter, annotate
from brt.errors import BrtError
from brt.protocols import BinaryThreshold
from brt_models.images import check_images, is_eager, is_over
from brt_models.macs import macs_of

torch.fx.wrap("check_images")  # it reads shapes, which a symbolic trace does not have


class ExitNetwork(nn.Module):
    """Images [N, 3, H, W] -> the logits [N, C] of the exit that each image took.

    After every stage but the last, an image leaves where its largest softmax probability is at
    least that exit's threshold; in eager inference, stages that no image reaches do not run. In
    training mode every image goes through every stage, and the logits of all exits are returned:
    their losses are summed.

    A subclass has `stage`, and calls `add_exits` once its layers are there.
    """

    exits: nn.ModuleList
    num_exits: int

    def add_exits(self, num_exits: int, thresholds: float | Sequence[float]) -> None:
        """Make the routers; they have no parameters, and add nothing to a checkpoint."""
        self.num_exits = num_exits
        self.exits = nn.ModuleList(
            ScatterRouter(BinaryThreshold(0.9), 2) for _ in range(num_exits - 1)
        )
        self.gather = GatherRouter(weighted=False)
        self.set_thresholds(thresholds)

    @abstractmethod
    def stage(self, exit_idx: int, state: Any) -> tuple[Any, Tensor]:
        """What lies between two exits: the state before -> (the state after, logits [N, C]).

        The state before the first exit is the images; later it is nested lists of features, all of
        which the next stages read.
        """

    def set_thresholds(self, thresholds: float | Sequence[float]) -> None:
        """Leave each exit but the last where the softmax is at least so sure."""
        num_exits = len(self.exits)
        if isinstance(thresholds, (int, float)):
            thresholds = (float(thresholds),) * num_exits
        if len(thresholds) != num_exits:
            raise BrtError(
                f"{type(self).__name__}: {len(thresholds)} thresholds for {num_exits} exits before "
                "the last"
            )
        for scatter, threshold in zip(self.exits, thresholds, strict=True):
            assert isinstance(scatter, ScatterRouter)
            scatter.protocol = BinaryThreshold(float(threshold))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of each exit but the last."""
        return tuple(scatter.protocol.threshold for scatter in self.exits)  # type: ignore

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[N, 3, H, W] -> [N, C]; in training mode the [N, C] of each exit."""
        if self.training:
            return self.all_exits(x_NCHW)
        return self.with_exits(x_NCHW)[0]

    def all_exits(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] -> the logits [N, C] that each exit would give every image."""
        check_images(type(self).__name__, x_NCHW)
        logits: list[Tensor] = []
        state: Any = x_NCHW
        for k in range(self.num_exits):
            state, logits_NC = self.stage(k, state)
            logits.append(logits_NC)
        return tuple(logits)

    def with_exits(self, x_NCHW: Tensor) -> tuple[Tensor, tuple[Cells, ...]]:
        """(logits [N, C], the images that left at each exit)."""
        check_images(type(self).__name__, x_NCHW)
        x_NCHW, grid = annotate(x_NCHW, 0)
        state: Any = x_NCHW
        cells, left, where = grid.cells, [], []
        for k, scatter in enumerate(self.exits):
            state, logits_NC = self.stage(k, state)
            left_NC, state, route = _leave(scatter, state, logits_NC, cells)
            left.append(left_NC)
            where.append(route[0])
            cells = route[1]
            if is_over(pytree.tree_leaves(state)[0]):
                return self.gather(left, where), tuple(where)
        left.append(self.stage(self.num_exits - 1, state)[1])
        where.append(cells)
        return self.gather(left, where), tuple(where)

    def macs_K(self, x_NCHW: Tensor) -> tuple[int, ...]:
        """Multiply-adds of an image of that size that leaves at each exit, all before included."""
        state: Any = x_NCHW[:1]
        macs: list[int] = []
        was_training = self.training
        self.eval()  # an image of its own says nothing to batch norms
        try:
            for k in range(self.num_exits):
                (spent,) = macs_of(self, partial(self.stage, k), state, [[self]])
                macs.append(spent)
                with torch.no_grad():
                    state, _ = self.stage(k, state)
        finally:
            self.train(was_training)
        return tuple(accumulate(macs))


def _leave(
    scatter: nn.Module, state: Any, logits_NC: Tensor, cells: Cells
) -> tuple[Tensor, Any, Route]:
    """(logits of those that leave, the state of those that stay, the route)."""
    if is_eager(logits_NC):
        # Nothing moves where all stay, and nothing of those that leave but their logits
        place_N = torch.arange(len(logits_NC), device=logits_NC.device)
        ((left_NC, _), (_, stay_R)), route = scatter((logits_NC, place_N), logits_NC, cells)
        if len(stay_R) < len(logits_NC):
            state = pytree.tree_map(lambda x: x.index_select(0, stay_R), state)
        return left_NC, state, route
    flows, spec = pytree.tree_flatten(state)
    (out, stay), route = scatter((*flows, logits_NC), logits_NC, cells)
    state = pytree.tree_unflatten([stay[i] for i in range(len(flows))], spec)
    return out[len(flows)], state, route
