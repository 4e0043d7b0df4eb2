"""What `place-experts` puts in the place of a router.

Legend: G experts on a rank at most, N cells, K choices per cell, P experts, D model and H hidden
features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brt_dist.exchange import sparse_all_to_all
from brt_dist.experts import ParallelExpertRouter
from brt_dist.spread import Spread
from brt_dist.transport import Transport

_WEIGHTS = ("up_PHD", "down_PDH", "up_bias_PH", "down_bias_PD")


class PlacedExperts(nn.Module):
    """A `ParallelExpertRouter` of another spread than the weights that it is called with.

    It moves copies of them, at its first call and when they were changed since. Where gradients are
    recorded the weights' own spread is used. Every rank must call it alike.
    """

    def __init__(self, router: ParallelExpertRouter, spread: Spread, transport: Transport) -> None:
        super().__init__()
        self.router = router
        self.placed = ParallelExpertRouter(spread, transport)
        self._moved_from: list[tuple[int, int]] | None = None
        self._moved: dict[str, Tensor] = {}

    def forward(
        self,
        x_ND: Tensor,
        choice_NK: Tensor,
        weight_NK: Tensor | None,
        up_PHD: Tensor,
        down_PDH: Tensor,
        *,
        up_bias_PH: Tensor | None = None,
        down_bias_PD: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``[N, D]`` -> ``[N, D]``, as the router."""
        given = dict(zip(_WEIGHTS, (up_PHD, down_PDH, up_bias_PH, down_bias_PD), strict=True))
        if torch.is_grad_enabled():
            out: Tensor = self.router(x_ND, choice_NK, weight_NK, **given, **options)
            return out
        self._move({name: tensor for name, tensor in given.items() if tensor is not None})
        out = self.placed(x_ND, choice_NK, weight_NK, **self._moved, **options)
        return out

    @torch.compiler.disable
    def _move(self, given: Mapping[str, Tensor]) -> None:
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in given.values()]
        if state != self._moved_from:
            self._moved = {name: self._moved_one(share) for name, share in given.items()}
            self._moved_from = state

    def _moved_one(self, share: Tensor) -> Tensor:
        """This rank's experts of the new spread; each comes from the first rank that has it."""
        old, new = self.router.spread, self.placed.spread
        rank = dist.get_rank(old.group)
        own = self.router._own("weights", share)
        counts_WG = torch.zeros(len(new.held_W), new.num_slots, dtype=torch.int64)
        wanted = []
        for to, held in enumerate(new.held_W):
            for slot, expert in enumerate(held):
                if old.rank_P[expert] == rank:
                    counts_WG[to, slot] = 1
                    wanted.append(old.held.index(expert))
        rows = own.detach()[wanted]
        moved, _ = sparse_all_to_all(rows, counts_WG, old.group)
        return moved

    def extra_repr(self) -> str:
        """Where the experts are now."""
        return f"{self.placed.spread}"
