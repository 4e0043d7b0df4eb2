"""What a protocol returns: the paths each cell takes, and with what weight.

N cells, P paths, K choices of a cell, C cells of a path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brt.errors import ProtocolError


@dataclass(frozen=True, eq=False)
class Decision:
    """The paths each cell takes, in one of three forms, with the weights of those choices.

    Exactly one of ``choice_NK``, ``mask_NP`` and ``cell_PC`` is set. Capacity is only declared: the
    route operator applies it, so a decision holds the choices before any cell is dropped.
    """

    num_paths: int
    choice_NK: Tensor | None = None
    """int64 paths in order of preference, -1 = no path. A cell names a path at most once."""
    mask_NP: Tensor | None = None
    """bool, true where the cell takes the path."""
    cell_PC: Tensor | None = None
    """int64 cells of each path (expert choice), -1 = empty. A path names a cell at most once."""
    weight: Tensor | None = None
    """Floats of the shape of the tensor above; None = 1. Ignored where that names nothing."""
    capacity: int | tuple[int, ...] | None = None
    """Most rows that a path takes from each group: one number, or one a path; None = no limit."""
    priority_N: Tensor | None = None
    """Where capacity binds, cells of higher priority are kept first; None = first come."""
    group_size: int | None = None
    """Capacity is counted in groups of this many consecutive cells; None = all cells are one."""
    num_cells: int = -1
    """N. Read off ``choice_NK`` or ``mask_NP``; ``cell_PC`` does not show it and needs it given."""

    def __post_init__(self) -> None:
        """Check everything but values."""
        given = [x for x in (self.choice_NK, self.mask_NP, self.cell_PC) if x is not None]
        if len(given) != 1:
            raise ProtocolError(
                f"Decision needs exactly one of choice_NK, mask_NP and cell_PC, got {len(given)}"
            )
        # Tree utilities rebuild a Decision around leaves that are not tensors (specs, dims, None).
        if isinstance(given[0], Tensor):
            self._check_choices(given[0])
            self._check_rest(given[0])

    def _check_choices(self, chosen: Tensor) -> None:
        num_paths = self.num_paths
        if self.mask_NP is not None:
            _check_form("mask_NP", chosen, torch.bool, "[N, P]")
            num_paths = chosen.shape[1]
        elif self.cell_PC is not None:
            _check_form("cell_PC", chosen, torch.int64, "[P, C]")
            num_paths = chosen.shape[0]
            if self.num_cells == -1:
                raise ProtocolError("Decision with cell_PC needs num_cells: it does not show N")
        else:
            _check_form("choice_NK", chosen, torch.int64, "[N, K]")
        if _differs(num_paths, self.num_paths):
            raise ProtocolError(
                f"Decision has num_paths={self.num_paths}, "
                f"but its tensor of shape {tuple(chosen.shape)} has {num_paths}"
            )
        if isinstance(self.num_cells, int) and self.cell_PC is None:
            object.__setattr__(self, "num_cells", chosen.shape[0])

    def _check_rest(self, chosen: Tensor) -> None:
        weight, priority_N = self.weight, self.priority_N
        if isinstance(weight, Tensor):
            if weight.shape != chosen.shape or not weight.is_floating_point():
                raise ProtocolError(
                    f"Decision.weight must be floats of shape {tuple(chosen.shape)}, as the "
                    f"choices, got {weight.dtype} of shape {tuple(weight.shape)}"
                )
            _check_device("weight", weight, chosen)
        if isinstance(priority_N, Tensor):
            if priority_N.ndim != 1 or _differs(priority_N.shape[0], self.num_cells):
                raise ProtocolError(
                    f"Decision.priority_N must be one number for each of {self.num_cells} cells, "
                    f"got shape {tuple(priority_N.shape)}"
                )
            _check_device("priority_N", priority_N, chosen)
        if isinstance(self.capacity, tuple) and _differs(len(self.capacity), self.num_paths):
            raise ProtocolError(
                f"Decision.capacity has {len(self.capacity)} entries for {self.num_paths} paths; "
                "give one for all paths, or one for each"
            )
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ProtocolError(f"Decision.group_size must be at least 1, got {self.group_size}")

    def to_mask(self) -> Decision:
        """Return the same decision with ``mask_NP``; weights are zero where the mask is false.

        A mask has no order of preference: among several choices of a cell, capacity no longer keeps
        all first choices before any second one.
        """
        if self.mask_NP is not None:
            return self
        if self.choice_NK is not None:
            # A spare last column takes the choices that name no path.
            dim, num_kept, shape = 1, self.num_paths, (self.num_cells, self.num_paths + 1)
            index, weight = self.choice_NK, self.weight
        else:
            assert self.cell_PC is not None
            dim, num_kept, shape = 0, self.num_cells, (self.num_cells + 1, self.num_paths)
            index, weight = self.cell_PC.t(), None if self.weight is None else self.weight.t()
        index = torch.where(index < 0, num_kept, index)
        mask = torch.zeros(shape, dtype=torch.bool, device=index.device).scatter(dim, index, True)
        if weight is not None:
            weight = weight.new_zeros(shape).scatter(dim, index, weight).narrow(dim, 0, num_kept)
        return Decision(
            self.num_paths,
            mask_NP=mask.narrow(dim, 0, num_kept),
            weight=weight,
            capacity=self.capacity,
            priority_N=self.priority_N,
            group_size=self.group_size,
        )

    def to_choice(self) -> Decision:
        """Return the same decision with ``choice_NK``; a mask gives K = P, in ascending order."""
        if self.choice_NK is not None:
            return self
        masked = self.to_mask()
        assert masked.mask_NP is not None
        path_P = torch.arange(self.num_paths, device=masked.mask_NP.device)
        return Decision(
            self.num_paths,
            choice_NK=torch.where(masked.mask_NP, path_P, -1),
            weight=masked.weight,
            capacity=self.capacity,
            priority_N=self.priority_N,
            group_size=self.group_size,
        )


def _differs(size: int, declared: int) -> bool:
    """Compare with a field; torch.export puts wrappers of its own in place of ints, never equal."""
    return isinstance(declared, int) and size != declared


def _check_form(name: str, chosen: Tensor, dtype: torch.dtype, shape: str) -> None:
    if chosen.ndim != 2 or chosen.dtype != dtype:
        raise ProtocolError(
            f"Decision.{name} must be {dtype} {shape}, "
            f"got {chosen.dtype} of shape {tuple(chosen.shape)}"
        )


def _check_device(name: str, given: Tensor, chosen: Tensor) -> None:
    if given.device != chosen.device:
        raise ProtocolError(
            f"Decision.{name} is on {given.device}, but the choices are on {chosen.device}; "
            "move one of them"
        )


torch.export.register_dataclass(Decision, serialized_type_name="brt.Decision")
