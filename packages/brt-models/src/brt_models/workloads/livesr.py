"""Benchmark of LiveSR: one frame, the classifier included, with its published loads.

Shape letters: B frames, N patches, P paths, C colours, H height, W width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brt import annotate_patches
from brt.bench import Workload
from brt.errors import BrtError
from brt_models.livesr import LiveSR, livesr
from brt_models.workloads.patches import workload

# Patches per path of one frame, for 10, 8, 6 and 4 branches: the largest of 100 frames, as LiveSR's
# k-means router sent them (Brainstorm's published artefact, figure 16).
LOADS = {
    10: (6, 7, 12, 27, 8, 8, 8, 12, 12, 4),
    8: (21, 8, 16, 11, 20, 8, 7, 15),
    6: (9, 32, 18, 16, 18, 7),
    4: (19, 25, 18, 36),
}
TOLERANCE = 1e-4  # float32 against float64 branches, through at most 160 convolutions
NOISE = 0.02  # of patches of one class


def frame(
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels: int = 8,
    num_paths: int = 10,
    num_blocks: int = 80,
) -> Workload:
    """LiveSR on one frame whose patches go where they went in its evaluation.

    Published are 8, 12, 16 and 20 channels. Weights are random: the patches of a class look alike,
    and the centres are made of their features.
    """
    if num_paths not in LOADS:
        raise BrtError(
            f"livesr: loads are known for {', '.join(map(str, LOADS))} paths, not for {num_paths}"
        )
    torch.manual_seed(0)
    model, load_P = livesr(channels, num_paths, num_blocks), LOADS[num_paths]
    frames = [_frame(model, load_P) for _ in range(2)]
    _set_centres(model, frames)
    model = model.to(device, dtype)
    given, profiled = (x_BCHW.to(device, dtype) for x_BCHW, _ in frames)
    options = {"channels": channels, "num_paths": num_paths, "num_blocks": num_blocks}
    return workload("livesr", model, [(given,)], [profiled], options, TOLERANCE)


def _frame(model: LiveSR, load_P: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One row of patches, any number of which makes a frame: (the frame, their classes [N])."""
    generator = torch.Generator().manual_seed(0)  # classes look the same in every frame
    size, stride = model.size, model.stride
    look_PCHW = torch.rand(len(load_P), 3, size, size, generator=generator)
    look_PCHW *= torch.linspace(0.2, 1.0, len(load_P))[:, None, None, None]
    class_N = torch.repeat_interleave(torch.tensor(load_P))
    class_N = class_N[torch.randperm(len(class_N))]
    x_BCHW = torch.zeros(1, 3, size, size + stride * (len(class_N) - 1))
    for n, path in enumerate(class_N.tolist()):
        left = n * stride
        x_BCHW[0, :, :, left : left + size] = look_PCHW[path]
    return x_BCHW + NOISE * torch.rand_like(x_BCHW), class_N


@torch.inference_mode()
def _set_centres(model: LiveSR, frames: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The mean features of each class; every patch must be nearest to its own."""
    class_N = torch.cat([classes for _, classes in frames])
    cells_NCHW = torch.cat(
        [annotate_patches(x_BCHW, model.size, model.stride)[0] for x_BCHW, _ in frames]
    )
    x_NF = model.classifier.resnet(cells_NCHW)
    for path in range(model.config.num_paths):
        model.classifier.centres_PF[path] = x_NF[class_N == path].mean(0)
    assert torch.equal(model.classifier(cells_NCHW).argmax(1), class_N)
