"""Branches of linear layers as one module: grouped level by level, padded, or by groups.

Legend: P paths, R routed rows, C rows of the fullest path, O I output and input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from brt import ops
from brt.ops.grouped_linear import activate
from brt.passes.derived import DerivedTensors, Slots
from brt.passes.fusion import FusedBranches
from brt.passes.mlp_matching import Level


class GroupedLevels(FusedBranches):
    """Branches of linear layers, level by level: ``[R, I]`` -> ``[R, O]``.

    Where widths differ, narrower layers are filled up with zeros, which change nothing: ReLU, GELU
    and SiLU keep them, and the next layer multiplies them by zero. Stacked weights are a copy of
    the model's, made anew when one of these changes; while gradients are needed, and under a
    compiler, they are stacked in each call, so that gradients reach them.
    """

    label = "grouped_levels"

    def __init__(self, branches: Sequence[tuple[Level, ...]]) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self._levels = tuple(zip(*branches, strict=True))  # levels of all paths
        self._derived = DerivedTensors()
        self._slots = {
            (depth, name): (
                Slots.of((linear, name) for level in level_P for linear in level.linears),
                len(level_P[0].linears),
            )
            for depth, level_P in enumerate(self._levels)
            for name in ("weight", "bias")
            if getattr(level_P[0].linear, name) is not None
        }

    def run(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin."""
        for depth, level_P in enumerate(self._levels):
            activation = level_P[0].activation
            gated = level_P[0].other is not None
            rows_RS = ops.grouped_linear(
                rows_RS,
                offsets_P1,
                self._stacked(depth, "weight"),
                self._stacked(depth, "bias") if level_P[0].linear.bias is not None else None,
                "none" if gated else activation,
            )
            if gated:
                gate_RO, other_RO = rows_RS.chunk(2, 1)
                rows_RS = activate(gate_RO, activation) * other_RO
        return rows_RS

    def _stacked(self, depth: int, name: str) -> Tensor:
        """Weights ``[P, O, I]`` or biases ``[P, O]`` of a level; of a gated one ``2 * O``."""
        slots, num_linears = self._slots[depth, name]

        def made() -> tuple[Tensor, ...]:
            wide = _filled(every)
            rows = range(0, len(wide), num_linears)
            parts_P = [torch.cat(wide[i : i + num_linears]) for i in rows]
            return (torch.stack(parts_P if num_linears > 1 else wide),)

        every = slots.read()
        return self._derived.get((depth, name), every, made)[0]

    def alternatives(self) -> list[FusedBranches]:
        """A padded batch, where the host knows the loads anyway."""
        on_cpu = self._levels[0][0].linear.weight.device.type == "cpu"
        return [self, PaddedLevels(self.branches)] if on_cpu else [self]

    def kernel(self, rows_RS: Tensor, offsets_P1: Tensor) -> str | None:
        """Name of the kernel that would run the first level."""
        weight = self._stacked(0, "weight")
        return ops.explain("grouped_linear", rows_RS, offsets_P1, weight, None, "none").chosen

    def example(self) -> tuple[Tensor, Tensor]:
        """64 rows."""
        weight = self._levels[0][0].linear.weight
        num_paths = len(self._levels[0])
        offsets_P1 = torch.zeros(num_paths + 1, dtype=torch.int64, device=weight.device)
        return weight.new_empty((64, weight.shape[1])), offsets_P1

    def describe(self) -> str:
        """How many branches, and their levels."""
        levels = ", ".join(str(level_P[0]) for level_P in self._levels)
        copied = sum(
            linear.weight.numel() * linear.weight.element_size()
            for level_P in self._levels
            for level in level_P
            for linear in level.linears
        )
        return (
            f"{len(self._levels[0])} branches are one operator a level ({levels}); "
            f"{copied / 2**20:.1f} MiB of weights are held a second time, stacked"
        )

    def extra_repr(self) -> str:
        """Its levels."""
        return ", ".join(str(level_P[0]) for level_P in self._levels)


class PaddedLevels(GroupedLevels):
    """As `GroupedLevels`, by batched products of as many rows a path as the fullest has."""

    label = "padded_levels"

    def run(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin."""
        if torch.compiler.is_compiling():  # loads are numbers here, and would be in the graph
            return super().run(rows_RS, offsets_P1)
        loads = offsets_P1.diff().tolist()
        most, num_rows, num_paths = max(loads), rows_RS.shape[0], len(loads)
        if most == 0:
            return rows_RS.new_zeros(num_rows, self.branches[0][-1].linear.out_features)
        index_PC = offsets_P1[:-1, None] + torch.arange(most, device=offsets_P1.device)
        rows_PCI = rows_RS[index_PC.clamp(max=num_rows - 1)]
        for depth, level_P in enumerate(self._levels):
            gated = level_P[0].other is not None
            weight_POI = self._stacked(depth, "weight")
            if level_P[0].linear.bias is not None:
                bias_PO = self._stacked(depth, "bias")
                rows_PCI = torch.baddbmm(bias_PO[:, None], rows_PCI, weight_POI.transpose(1, 2))
            else:
                rows_PCI = torch.bmm(rows_PCI, weight_POI.transpose(1, 2))
            if gated:
                gate_PCO, other_PCO = rows_PCI.chunk(2, 2)
                rows_PCI = activate(gate_PCO, level_P[0].activation) * other_PCO
            else:
                rows_PCI = activate(rows_PCI, level_P[0].activation)
        paths = range(num_paths)
        out_RO = torch.cat([rows_PCI[p, : loads[p]] for p in paths])
        unused = num_rows - out_RO.shape[0]
        return F.pad(out_RO, (0, 0, 0, unused)) if unused else out_RO

    def alternatives(self) -> list[FusedBranches]:
        """Itself."""
        return [self]

    def kernel(self, rows_RS: Tensor, offsets_P1: Tensor) -> str | None:
        """No kernel of ours: a batched product of torch."""
        return "padded batch"

    def describe(self) -> str:
        """How many branches, and their levels."""
        return super().describe().replace("one operator a level", "one padded batch a level")


class GroupedForms(FusedBranches):
    """Branches of several kinds: those of a kind together, ``(paths, levels)``."""

    label = "grouped_forms"

    def __init__(self, groups: Sequence[tuple[Sequence[int], GroupedLevels]]) -> None:
        super().__init__()
        self._groups = tuple((tuple(paths), levels) for paths, levels in groups)

    def run(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin. Rows of a kind are brought together first."""
        num_rows, device = rows_RS.shape[0], rows_RS.device
        num_paths, load_P = offsets_P1.shape[0] - 1, offsets_P1.diff()
        row_R = torch.arange(num_rows, device=device)
        path_R = torch.searchsorted(offsets_P1[1:], row_R, right=True)  # num_paths: unused rows
        out_RO: Tensor | None = None
        for paths, levels in self._groups:
            of_P1 = torch.ones(num_paths + 1, dtype=torch.bool, device=device)
            index_G = torch.tensor(paths, device=device)
            of_P1[index_G] = False
            order_R = of_P1[path_R].to(torch.uint8).argsort(stable=True)
            offsets_G1 = F.pad(load_P[index_G].cumsum(0), (1, 0))
            part_RO = levels.run(rows_RS[order_R], offsets_G1)  # zero for rows of other groups
            empty_RO = torch.zeros_like(part_RO) if out_RO is None else out_RO
            out_RO = empty_RO.index_add(0, order_R, part_RO)
        assert out_RO is not None
        return out_RO

    def kernel(self, rows_RS: Tensor, offsets_P1: Tensor) -> str | None:
        """Name of the kernel that would run the first group."""
        paths, levels = self._groups[0]
        return levels.kernel(rows_RS, offsets_P1[: len(paths) + 1])

    def example(self) -> tuple[Tensor, Tensor]:
        """64 rows."""
        rows_RS, _ = self._groups[0][1].example()
        num_paths = sum(len(paths) for paths, _ in self._groups)
        return rows_RS, torch.zeros(num_paths + 1, dtype=torch.int64, device=rows_RS.device)

    def describe(self) -> str:
        """What each group is."""
        return "; ".join(f"paths {list(p)}: {levels.describe()}" for p, levels in self._groups)

    def extra_repr(self) -> str:
        """The paths of each group."""
        return ", ".join(str(list(paths)) for paths, _ in self._groups)


def _filled(every: list[Tensor]) -> list[Tensor]:
    """Weights or biases of one size, zeros behind what they have."""
    if len({t.shape for t in every}) == 1:
        return every
    most = [max(sizes) for sizes in zip(*(t.shape for t in every), strict=True)]
    return [
        F.pad(t, [n for at in range(t.ndim - 1, -1, -1) for n in (0, most[at] - t.shape[at])])
        for t in every
    ]
