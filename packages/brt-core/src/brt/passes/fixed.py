"""Protocols that leave no choice, and the route of a decision that is known beforehand.

Legend: N cells, P paths, K choices of a cell, R routed rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from brt import protocols
from brt.cells import Cells
from brt.decision import Decision
from brt.passes.match import module_of
from brt.passes.memory import known_name, may_share
from brt.protocols import Protocol
from brt.route import Route

Bounds = tuple[float, float]
"""The least and the greatest value that scores can have."""

ANY: Bounds = (-math.inf, math.inf)

_SLACK = 0.01
"""How far a threshold must lie beyond a bound that rounding may cross: that of bfloat16."""

_RANGES: dict[str, Bounds] = {
    "softmax": (0.0, 1.0), "sigmoid": (0.0, 1.0), "relu": (0.0, math.inf), "tanh": (-1.0, 1.0),
}  # fmt: skip
_MODULES = {
    nn.Softmax: "softmax", nn.Sigmoid: "sigmoid", nn.ReLU: "relu", nn.Tanh: "tanh",
}  # fmt: skip


def bounds_of(scores: fx.Node, scope: nn.Module) -> Bounds:
    """What is known of the values of scores, by the function that gives them."""
    name = _MODULES.get(type(module_of(scores, scope)), known_name(scores))
    if name not in _RANGES or may_share(scores, scope) is not None:
        return ANY  # who has them too may write to them
    return _RANGES[name]


def fixed_paths(protocol: Protocol, num_paths: int, bounds: Bounds) -> tuple[bool, ...] | None:
    """Which paths take every cell, where the others take none; None where scores decide."""
    if isinstance(protocol, protocols.TopK | protocols.CapacityTopK | protocols.Switch):
        return (True,) * num_paths if _takes_all(protocol, num_paths) else None
    if type(protocol) is protocols.Threshold:
        above = _above(bounds, protocol.threshold)
        if above is None:
            return None
        return tuple(above or p == protocol.residual_path for p in range(num_paths))
    if type(protocol) is protocols.BinaryThreshold and num_paths == 2:
        confident = _confident(protocol, bounds)
        if confident is None:
            return None
        taken = protocol.selected_path if confident else 1 - protocol.selected_path
        return taken == 0, taken == 1
    return None


def _takes_all(
    protocol: protocols.TopK | protocols.CapacityTopK | protocols.Switch, num_paths: int
) -> bool:
    if type(protocol) is protocols.TopK:
        return protocol.k == num_paths
    if type(protocol) is protocols.CapacityTopK:
        return protocol.k == num_paths and protocol.capacity_factor is None
    if type(protocol) is protocols.Switch:
        return num_paths == 1 and protocol.capacity is None and protocol.capacity_factor is None
    return False


def _above(bounds: Bounds, threshold: float) -> bool | None:
    """Whether all scores are above a threshold (or at it: the slack decides), or none is."""
    least, greatest = bounds
    if threshold < least - (_SLACK if least else 0.0):  # no rounding makes a negative zero
        return True
    return False if threshold > greatest + _SLACK else None


def _confident(protocol: protocols.BinaryThreshold, bounds: Bounds) -> bool | None:
    if protocol.confidence == "entropy":
        return False if protocol.threshold < -_SLACK else None
    if protocol.confidence == "max-softmax":
        bounds = (0.0, 1.0)
    return _above(bounds, protocol.threshold)


@dataclass(frozen=True, eq=False)
class FixedRoutes:
    """The routes of decisions that give every cell the same paths, laid out without an operator.

    It keeps the places of the paths on each device: copying them there waits for the device.
    """

    _places: dict[tuple[tuple[bool, ...], torch.device], tuple[Tensor, ...]] = field(
        default_factory=dict
    )

    def route(self, decision: Decision, always_P: tuple[bool, ...], cells: Cells) -> Route:
        """What `brt.route.make_route` gives, with sizes; rows of a path are in cell order."""
        decided = decision.choice_NK if decision.mask_NP is None else decision.mask_NP
        assert decided is not None
        num_paths, num_cells, device = len(always_P), decision.num_cells, decided.device
        place_P1, taken_P, path_A = self._placed(always_P, device)
        offsets_P1 = place_P1 * num_cells
        cell_N = torch.arange(num_cells, device=device)
        if decision.mask_NP is not None:
            row_NK = torch.where(taken_P, offsets_P1[:-1] + cell_N[:, None], -1)
        else:
            row_NK = offsets_P1.index_select(0, decided.reshape(-1)).view_as(decided)
            row_NK = row_NK + cell_N[:, None]
        weight = decision.weight
        if weight is not None and weight.shape[1] > 1:
            weight = decision.to_mask().weight
            assert weight is not None
            weight = weight.index_select(1, path_A).t()
        elif weight is not None and not any(always_P):
            weight = weight[:0]
        return Route(
            num_paths,
            num_cells,
            cells,
            cell_N.repeat(sum(always_P)),
            row_NK,
            offsets_P1,
            None if weight is None else weight.reshape(-1),
            tuple(num_cells if always else 0 for always in always_P),
        )

    def _placed(
        self, always_P: tuple[bool, ...], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(paths taken before each, whether each is taken, those taken)."""
        found = self._places.get((always_P, device))
        if found is None:
            taken_P = torch.tensor(always_P)
            place_P1 = torch.cat([taken_P.new_zeros(1), taken_P]).cumsum(0)
            made = (place_P1, taken_P, taken_P.nonzero().squeeze(1))
            found = self._places[always_P, device] = tuple(t.to(device) for t in made)
        place_P1, taken_P, path_A = found
        return place_P1, taken_P, path_A
