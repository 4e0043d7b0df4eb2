"""Benchmarks of the patch networks: the demo's photo, and LiveSR as Brainstorm measured it.

Shape letters: B photos, N patches, P paths, C colours, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt.errors import BrtError
from brt_models import photos, resampling
from brt_models.patch_sr import PatchSR, centred, livesr, pretrained
from brt_models.patch_sr.network import at_least
from brt_models.quality import loads

# Patches per path of one frame, for 10, 8, 6 and 4 branches: the largest of 100 frames, as LiveSR's
# k-means router sent them (Brainstorm's published artefact, figure 16).
LIVESR_LOADS = {
    10: (6, 7, 12, 27, 8, 8, 8, 12, 12, 4),
    8: (21, 8, 16, 11, 20, 8, 7, 15),
    6: (9, 32, 18, 16, 18, 7),
    4: (19, 25, 18, 36),
}
TOLERANCE = 1e-4  # float32 against float64 branches, through at most 160 convolutions


def demo_photo(device: torch.device, dtype: torch.dtype, *, photo: str = "china") -> Workload:
    """The trained network upscales one held-out photo fourfold, profiled on the others."""
    model = pretrained().to(device, dtype)
    x_BCHW = photos.load(photos.find(photo))[None].to(device, dtype)
    others = photos.split("train") + photos.split("profile")
    batches = [photos.load(p)[None].to(device, dtype) for p in others if p.name != photo]
    return _workload("patch-sr", model, [(x_BCHW,)], batches, {"photo": photo})


def livesr_frame(
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels: int = 8,
    num_paths: int = 10,
    num_blocks: int = 80,
) -> Workload:
    """LiveSR's branches on one frame whose patches go where they went in its evaluation."""
    if num_paths not in LIVESR_LOADS:
        raise BrtError(
            f"livesr: loads are known for {', '.join(map(str, LIVESR_LOADS))} paths, "
            f"not for {num_paths}"
        )
    torch.manual_seed(0)
    model = livesr(channels, num_paths, num_blocks)
    load_P = LIVESR_LOADS[num_paths]
    model.gate = PublishedGate(load_P)
    model = model.to(device, dtype)
    size, stride = model.config.size, model.config.stride
    # One row of patches: any number of them makes a frame
    frames = [
        torch.rand(1, 3, size, size + stride * (sum(load_P) - 1)).to(device, dtype)
        for _ in range(2)
    ]
    options = {"channels": channels, "num_paths": num_paths, "num_blocks": num_blocks}
    return _workload("livesr", model, [(frames[0],)], [frames[1]], options)


class PublishedGate(nn.Module):
    """Scores that send so many patches to each path, whatever the patches are."""

    scores_NP: Tensor

    def __init__(self, load_P: Sequence[int]) -> None:
        super().__init__()
        path_N = torch.repeat_interleave(torch.tensor(load_P))
        path_N = path_N[torch.randperm(len(path_N))]
        scores_NP = nn.functional.one_hot(path_N, len(load_P)).float()
        self.register_buffer("scores_NP", scores_NP, persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]."""
        return self.scores_NP


class IndexLoop(nn.Module):
    """The same network as people write it: a loop over paths with index_select.

    It shares the modules of the network that it is made of.
    """

    def __init__(self, model: PatchSR, branches: nn.ModuleList | None = None) -> None:
        super().__init__()
        self.config = model.config
        self.gate = model.gate
        self.branches = model.branches if branches is None else branches

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, s*H, s*W]."""
        config = self.config
        padded_BCHW = at_least(x_BCHW, config.size)
        cells_NCHW, grid = brt.annotate_patches(padded_BCHW, config.size, config.stride)
        cells_NCHW = centred(cells_NCHW)
        path_N = self.gate(cells_NCHW).argmax(1)
        high = config.scale * config.size
        out_NCHW = cells_NCHW.new_empty(len(cells_NCHW), 3, high, high)
        for path, branch in enumerate(self.branches):
            index = (path_N == path).nonzero()[:, 0]
            if len(index):
                out_NCHW.index_copy_(0, index, branch(cells_NCHW.index_select(0, index)))
        out_BCHW = resampling.enlarge(padded_BCHW, config.scale)
        out_BCHW = out_BCHW + grid.restore(out_NCHW, scale=config.scale)
        height, width = (config.scale * extent for extent in x_BCHW.shape[2:])
        return out_BCHW[:, :, :height, :width]


class _InDouble(nn.Module):
    """A branch of the reference: float64 inside, routed by the gate as it is."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = copy.deepcopy(branch).double()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.branch(x_NCHW.double()).to(x_NCHW.dtype)


def _workload(
    name: str,
    model: PatchSR,
    sets: Sequence[tuple[Tensor]],
    batches: Sequence[Tensor],
    options: Mapping[str, object],
) -> Workload:
    (x_BCHW,) = sets[0]
    load_P = _loads(model, x_BCHW)
    flops = 2.0 * sum(load * macs for load, macs in zip(load_P, model.config.macs_P, strict=True))
    plain = IndexLoop(model)

    def channels_last() -> Callable[[Tensor], Tensor]:
        branches = copy.deepcopy(model.branches)
        nn.utils.convert_conv2d_weight_memory_format(branches, torch.channels_last)
        return IndexLoop(model, branches)

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(model, brt.profile(model, batches), sample=batches[0])

    def compiled(module: nn.Module) -> Callable[[], Callable[[Tensor], Tensor]]:
        return lambda: torch.compile(module)

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    return Workload(
        name=name,
        shapes=f"{list(x_BCHW.shape)} photo, patches per path {'/'.join(map(str, load_P))}",
        device=x_BCHW.device,
        dtype=x_BCHW.dtype,
        sets=sets,
        reference=IndexLoop(model, nn.ModuleList(_InDouble(b) for b in model.branches)),
        tolerance=TOLERANCE if x_BCHW.dtype == torch.float32 else 3e-2,
        options=options,
        variants=[
            row("eager", "torch index loop", lambda: plain),
            row("peer", "torch index loop, channels-last", channels_last),
            row("peer", "torch index loop, torch.compile", compiled(plain)),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt torch.compile", compiled(model)),
            row("brt", "brt optimised", optimised),
            row("limit", "dense product of as many operations", lambda: _product(x_BCHW, flops)),
        ],
    )


def _product(like: Tensor, flops: float) -> Callable[[Tensor], Tensor]:
    width = 1024
    inner = max(1, round(flops / (2 * width**2)))
    a, b = like.new_ones(width, inner), like.new_ones(inner, width)
    return lambda x_BCHW: torch.mm(a, b)


@torch.inference_mode()
def _loads(model: PatchSR, x_BCHW: Tensor) -> list[int]:
    with loads(model.scatter) as load_P:
        model(x_BCHW)
    return load_P
