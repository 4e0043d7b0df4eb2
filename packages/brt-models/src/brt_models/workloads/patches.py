"""What the benchmarks of networks on patches of photos share.

Shape letters: B photos, N patches, P paths, C colours, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt_models.macs import macs_of
from brt_models.patches import PatchNetwork
from brt_models.quality import loads

Call = Callable[[Tensor], Any]


class IndexLoop(nn.Module):
    """A network on patches as people write it: a loop over paths with index_select.

    It shares the modules of the network that it is made of; ``paths`` and ``scores`` may be other
    forms of them.
    """

    def __init__(
        self,
        model: PatchNetwork,
        paths: Sequence[nn.Module] | None = None,
        scores: Call | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.branches = nn.ModuleList(model.paths if paths is None else paths)
        self.scores = scores or model.scores

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, s*H, s*W]."""
        model = self.model
        cells_NCHW, grid = model.cut(x_BCHW)
        path_N = self.scores(cells_NCHW).argmax(1)
        high = model.scale * model.size
        out_NCHW = cells_NCHW.new_empty(len(cells_NCHW), 3, high, high)
        for path, branch in enumerate(self.branches):
            index = (path_N == path).nonzero()[:, 0]
            if len(index):
                out_NCHW.index_copy_(0, index, branch(cells_NCHW.index_select(0, index)))
        return model.join(out_NCHW, grid, x_BCHW)


class PatchLoop(IndexLoop):
    """The loop over patches that published code runs."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, s*H, s*W]."""
        cells_NCHW, grid = self.model.cut(x_BCHW)
        rows = []
        for cell_CHW in cells_NCHW:
            one_1CHW = cell_CHW[None]
            rows.append(self.branches[int(self.scores(one_1CHW).argmax())](one_1CHW))
        return self.model.join(torch.cat(rows), grid, x_BCHW)


class _InDouble(nn.Module):
    """A branch of the reference: float64 inside, routed by the scores as they are."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = copy.deepcopy(branch).double()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.branch(x_NCHW.double()).to(x_NCHW.dtype)


def workload(
    name: str,
    model: PatchNetwork,
    sets: Sequence[tuple[Tensor]],
    batches: Sequence[Tensor],
    options: Mapping[str, object],
    tolerance: float,
    extra: Sequence[tuple[str, Callable[[], Call]]] = (),
) -> Workload:
    """A network on patches and peers; ours is profiled on ``batches``, ``extra`` are peers too."""
    (x_BCHW,) = sets[0]
    load_P = _loads(model, x_BCHW)
    flops = 2.0 * sum(load * macs for load, macs in zip(load_P, _macs(model), strict=True))

    def optimised() -> Call:
        return brt.optimize(model, brt.profile(model, batches), sample=batches[0])

    def row(kind: Kind, name: str, make: Callable[[], Call]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    return Workload(
        name=name,
        shapes=f"{list(x_BCHW.shape)} photo, patches per path {'/'.join(map(str, load_P))}",
        device=x_BCHW.device,
        dtype=x_BCHW.dtype,
        sets=sets,
        reference=IndexLoop(model, [_InDouble(path) for path in model.paths]),
        tolerance=tolerance if x_BCHW.dtype == torch.float32 else 3e-2,
        options=options,
        variants=[
            row("eager", "torch index loop", lambda: IndexLoop(model)),
            *(row("peer", name, make) for name, make in extra),
            row("peer", "torch index loop, channels-last", lambda: _channels_last(model)),
            row("peer", "torch index loop, torch.compile", lambda: _compiled(model, False)),
            row(
                "peer", "torch index loop, torch.compile, freezing", lambda: _compiled(model, True)
            ),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt torch.compile", lambda: torch.compile(model)),
            row("brt", "brt optimised", optimised),
            row("limit", "dense product of as many operations", lambda: _product(x_BCHW, flops)),
        ],
    )


def _channels_last(model: PatchNetwork) -> Call:
    branches = copy.deepcopy(list(model.paths))
    for branch in branches:
        nn.utils.convert_conv2d_weight_memory_format(branch, torch.channels_last)
    return IndexLoop(model, branches)


def _compiled(model: PatchNetwork, freezing: bool) -> Call:
    """Scores and branches compiled.

    Branches of one class share a graph for any number of patches, weights being its inputs. Frozen
    weights are not: a graph module has code of its own, and a graph for the patches that it gets.
    """
    options: dict[str, Any] = {"freezing": freezing}
    scores = torch.compile(model.scores, options=options)
    if freezing:
        graphs: list[nn.Module] = [fx.symbolic_trace(path) for path in model.paths]
    else:
        graphs = [copy.copy(path) for path in model.paths]
    for graph in graphs:
        graph.compile(options=options, dynamic=None if freezing else True)
    return IndexLoop(model, graphs, scores)


def _product(like: Tensor, flops: float) -> Call:
    width = 1024
    inner = max(1, round(flops / (2 * width**2)))
    a, b = like.new_ones(width, inner), like.new_ones(inner, width)
    return lambda x_BCHW: torch.mm(a, b)


def _macs(model: PatchNetwork) -> list[int]:
    """Multiply-adds that a patch takes on each path."""
    like = next(model.parameters())
    cell_NCHW = like.new_zeros(1, 3, model.size, model.size)
    return [macs_of(path, path, cell_NCHW, [[path]])[0] for path in model.paths]


@torch.inference_mode()
def _loads(model: PatchNetwork, x_BCHW: Tensor) -> list[int]:
    with loads(model.scatter) as load_P:
        model(x_BCHW)
    return load_P
