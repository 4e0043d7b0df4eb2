"""fuse-horizontal: branches of linear layers become one grouped operator a level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from brt.passes.fusion import FusedBranches, FusePass, NotFusableError, Reader
from brt.passes.levels import GroupedForms, GroupedLevels
from brt.passes.mlp_matching import Level, LevelMatcher


@dataclass(frozen=True)
class FuseHorizontal(FusePass):
    """Run all branches between a scatter and its gather level by level, each level as one operator.

    The branches are linear layers, with ReLU, GELU or SiLU between, gated or not. Their weights are
    stacked once, narrower ones filled up with zeros; in place of a call for each branch there is
    one a level, which nothing on the host needs to know the loads of, or on the CPU a padded batch
    where that is faster. Branches of other depths or activations are groups of their own. The
    rewrite holds for any input, so that it needs no guard; with a sample it is measured, and kept
    only where it is faster.
    """

    name: ClassVar[str] = "fuse-horizontal"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains",)

    most_choices: ClassVar[int] = 8

    def reader(self) -> Reader:
        """One for the branches of a scatter."""
        return LevelReader()


class LevelReader(Reader):
    """Reads branches of linear layers."""

    def __init__(self) -> None:
        self._branches: list[tuple[Level, ...]] = []

    def read(
        self, graph: fx.GraphModule, entry: fx.Node, nodes: list[fx.Node], result: fx.Node
    ) -> None:
        """One branch as levels."""
        self._branches.append(LevelMatcher(graph).match(entry, nodes, result))

    def module(self) -> FusedBranches:
        """All of them: level by level where they have the same levels, or by groups that have."""
        ends = {(b[0].linear.in_features, b[-1].linear.out_features) for b in self._branches}
        if len(ends) > 1:
            raise NotFusableError(f"branches take and give different sizes: {sorted(ends)}")
        groups: dict[object, list[int]] = {}
        for path, levels in enumerate(self._branches):
            groups.setdefault(tuple(level.kind() for level in levels), []).append(path)
        if len(groups) == 1:
            return GroupedLevels(self._branches)
        if len(groups) * 2 > len(self._branches):
            raise NotFusableError(
                f"{len(self._branches)} branches are of {len(groups)} kinds: too many to group"
            )
        made = [
            (paths, GroupedLevels([self._branches[p] for p in paths])) for paths in groups.values()
        ]
        return GroupedForms(made)
