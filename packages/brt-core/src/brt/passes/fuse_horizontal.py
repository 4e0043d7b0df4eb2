"""fuse-horizontal: branches of alike linear layers become one grouped operator a level.

Legend: P paths, R routed rows, O I output and input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from brt import ops
from brt.ops.grouped_linear import activate
from brt.passes.derived import DerivedTensors, Slots
from brt.passes.fusion import FusedBranches, FusePass, NotFusableError, Reader
from brt.passes.mlp_matching import Level, LevelMatcher


@dataclass(frozen=True)
class FuseHorizontal(FusePass):
    """Run all branches between a scatter and its gather level by level, each level as one operator.

    The branches are alike: linear layers of the same sizes, with ReLU, GELU or SiLU between, gated
    or not. Their weights are stacked once; in place of a call for each branch there is one a level,
    which nothing on the host needs to know the loads of. The rewrite holds for any input, so that
    it needs no guard; with a sample it is measured, and kept only where it is faster.
    """

    name: ClassVar[str] = "fuse-horizontal"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains",)

    most_choices: ClassVar[int] = 8

    def reader(self) -> Reader:
        """One for the branches of a scatter."""
        return _LevelReader()


class GroupedLevels(FusedBranches):
    """Branches of linear layers, level by level: ``[R, I]`` -> ``[R, O]``.

    Stacked weights are a copy of the model's, made anew when one of these changes; while gradients
    are needed, and under a compiler, they are stacked in each call, so that gradients reach them.
    """

    label = "grouped_levels"

    def __init__(self, branches: Sequence[tuple[Level, ...]]) -> None:
        super().__init__()
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
            rows = range(0, len(every), num_linears)
            parts_P = [torch.cat(every[i : i + num_linears]) for i in rows]
            return (torch.stack(parts_P if num_linears > 1 else every),)

        every = slots.read()
        return self._derived.get((depth, name), every, made)[0]

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


class _LevelReader(Reader):
    def __init__(self) -> None:
        self._branches: list[tuple[Level, ...]] = []

    def read(
        self, graph: fx.GraphModule, entry: fx.Node, nodes: list[fx.Node], result: fx.Node
    ) -> None:
        """One branch as levels."""
        levels = LevelMatcher(graph).match(entry, nodes, result)
        self._branches.append(levels)
        first = [level.form() for level in self._branches[0]]
        if [level.form() for level in levels] != first:
            raise NotFusableError("it is not like branch 0")

    def module(self) -> GroupedLevels:
        """All of them."""
        return GroupedLevels(self._branches)
