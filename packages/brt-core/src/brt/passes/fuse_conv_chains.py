"""fuse-conv-chains: the small convolutional branches of a region become one operator.

Legend: N cells, P paths, R routed rows, C channels, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from brt import ops
from brt.conv_steps import ConvStep
from brt.passes.conv_matching import Matcher, Params
from brt.passes.fusion import FusedBranches, FusePass, Reader


@dataclass(frozen=True)
class FuseConvChains(FusePass):
    """Run all branches between a scatter and its gather as one `brt.ops.conv_chain`.

    The branches may differ in width and depth. Each must be made of 3x3 and 1x1 convolutions that
    keep the size, ReLU, PReLU, additions and pixel shuffles. The rewrite holds for any input, so
    that it needs no guard; with a sample it is measured, and kept only where it is faster.
    """

    name: ClassVar[str] = "fuse-conv-chains"

    most_choices: ClassVar[int] = 2

    def reader(self) -> Reader:
        """One for the branches of a scatter."""
        return ChainReader()


class ConvChains(FusedBranches):
    """Convolutional branches as one operator: ``[R, C, H, W]`` -> ``[R, C', H', W']``."""

    label = "conv_chains"

    def __init__(self, params: Params, branches: list[list[ConvStep]]) -> None:
        super().__init__()
        self._owned = tuple(params.owned)
        self.branches = tuple(tuple(branch) for branch in branches)
        self._program = ops.ConvProgram.of(self.branches)

    def run(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin."""
        params = [owned.get() for owned in self._owned]
        return ops.conv_chain(rows_RS, offsets_P1, params, self._program)

    def kernel(self, rows_RS: Tensor, offsets_P1: Tensor) -> str | None:
        """Name of the kernel that would run these rows."""
        params = [owned.get() for owned in self._owned]
        args = (rows_RS, offsets_P1, params, *self._program.arguments())
        return ops.explain("conv_chain", *args).chosen

    def example(self) -> tuple[Tensor, Tensor]:
        """64 images of 32x32 pixels."""
        weight = self._owned[0].get()
        rows_RCHW = weight.new_empty((64, weight.shape[1], 32, 32))
        return rows_RCHW, torch.zeros(
            len(self.branches) + 1, dtype=torch.int64, device=weight.device
        )

    def describe(self) -> str:
        """How many steps each branch has."""
        steps = [len(branch) for branch in self.branches]
        return f"{len(steps)} branches of {steps} steps are one operator"

    def extra_repr(self) -> str:
        """How many steps each branch has."""
        return f"steps of each path: {[len(branch) for branch in self.branches]}"


class ChainReader(Reader):
    """Reads convolutional branches."""

    def __init__(self) -> None:
        self._params = Params()
        self._branches: list[list[ConvStep]] = []

    def read(
        self, graph: fx.GraphModule, entry: fx.Node, nodes: list[fx.Node], result: fx.Node
    ) -> None:
        """One branch as steps."""
        self._branches.append(Matcher(graph, self._params).match(entry, nodes, result))

    def module(self) -> ConvChains:
        """All of them."""
        return ConvChains(self._params, self._branches)
