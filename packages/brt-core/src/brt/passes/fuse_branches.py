"""fuse-branches: convolutional branches of any kind become programs of oneDNN's operators.

Legend: P paths, R routed rows, S trailing dims of a cell, G those of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from brt import ops
from brt.errors import PassError
from brt.passes.base import Context
from brt.passes.branch_program import BranchProgram
from brt.passes.fusion import FusedBranches, FusePass, NotFusableError, Reader
from brt.passes.verify import training


@dataclass(frozen=True)
class FuseBranches(FusePass):
    """Run the convolutional branches between a scatter and its gather by oneDNN's operators.

    For a CPU: weights are kept in the layout in which it computes, images stay channels last;
    batch norm, ReLU, PReLU and additions are part of the convolution before them, and transposed
    convolutions that give few channels become plain ones. Branches may hold any other layers too.
    The rewrite holds for any input, so that it needs no guard; with a sample it is measured, and
    kept only where it is faster.
    """

    name: ClassVar[str] = "fuse-branches"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains", "fuse-horizontal")

    most_choices: ClassVar[int] = 8

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """An inference region without random numbers."""
        super().requires(graph, ctx)
        name = training(ctx.scope)
        if name is not None:
            raise PassError(
                f"{name} is in training mode, and gradients need the layers as they are; call "
                "model.eval() first"
            )

    def reader(self) -> Reader:
        """One for the branches of a scatter."""
        return ProgramReader()

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Folding rounds a product of scale and weight: ten times a pass that reorders sums."""
        relative, absolute = super().tolerance(dtype)
        return 10 * relative, absolute


class ProgramReader(Reader):
    """Reads branches of any layers."""

    def __init__(self) -> None:
        self._programs: list[BranchProgram] = []

    def read(
        self, graph: fx.GraphModule, entry: fx.Node, nodes: list[fx.Node], result: fx.Node
    ) -> None:
        """One branch as a program."""
        self._programs.append(BranchProgram(self.scope, entry, nodes, result))

    def module(self) -> FusedBranches:
        """All of them; raises where none has a layer that oneDNN does."""
        if not any(program.layers for program in self._programs):
            raise NotFusableError("no branch has a convolution in float32 on a CPU")
        return LayeredBranches(self._programs)


class LayeredBranches(FusedBranches):
    """Branches as programs of layers: ``[R, *S]`` -> ``[R, *G]``.

    While gradients are needed, under autocast and a compiler, and for anything but float32 on a
    CPU, branches run as they were.
    """

    label = "layered_branches"

    def __init__(self, programs: Sequence[BranchProgram]) -> None:
        super().__init__()
        self._programs = tuple(programs)

    def run(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        """`forward`, given only where paths begin."""
        if torch.compiler.is_compiling() or not self._is_plain(rows_RS):
            return self._plain(rows_RS, offsets_P1)
        ends = offsets_P1.tolist()
        out_RG: Tensor | None = None
        for program, first, end in zip(self._programs, ends, ends[1:], strict=False):
            if first == end:
                continue
            part = program(rows_RS[first:end])
            if out_RG is None:
                out_RG = part.new_empty((rows_RS.shape[0], *part.shape[1:]))
            out_RG[first:end] = part
        if out_RG is None:
            return self._plain(rows_RS, offsets_P1)
        out_RG[ends[-1] :] = 0
        return out_RG

    def _is_plain(self, rows_RS: Tensor) -> bool:
        return (
            type(rows_RS) is Tensor
            and rows_RS.is_cpu
            and rows_RS.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not (torch.is_grad_enabled() and rows_RS.requires_grad)
            and bool(torch.backends.mkldnn.enabled)
            and all(program.is_plain() for program in self._programs)
        )

    def _plain(self, rows_RS: Tensor, offsets_P1: Tensor) -> Tensor:
        sizes = ops.path_sizes(offsets_P1)
        if torch.compiler.is_compiling():
            for size in sizes:
                torch._check(size >= 0)
        total = sum(sizes)
        paths = torch.split(rows_RS.narrow(0, 0, total), list(sizes))
        parts = [run.plain(p) for run, p in zip(self._programs, paths, strict=True)]
        out_RG = torch.cat(parts)
        zeros_RG = out_RG.new_zeros((rows_RS.shape[0], *out_RG.shape[1:]))
        return zeros_RG.index_copy(0, torch.arange(total, device=out_RG.device), out_RG)

    def kernel(self, rows_RS: Tensor, offsets_P1: Tensor) -> str | None:
        """No kernel of ours: layers of oneDNN."""
        return "oneDNN"

    def example(self) -> tuple[Tensor, Tensor]:
        """64 rows, of which nothing depends."""
        return torch.empty(64, 1), torch.zeros(len(self._programs) + 1, dtype=torch.int64)

    def describe(self) -> str:
        """How many layers of each branch."""
        num_layers = [len(program.layers) for program in self._programs]
        return f"{num_layers} layers of {len(num_layers)} branches are oneDNN's"

    def extra_repr(self) -> str:
        """How many layers of each branch."""
        return f"layers of each path: {[len(program.layers) for program in self._programs]}"
