"""Benchmark of ClassSR: a photo whose patches are as easy and hard as those of published frames.

Shape letters: B photos, N patches, C colours, H height, W width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.bench import Workload
from brt.errors import BrtError
from brt_models.classsr import ClassSR, ClassSRConfig
from brt_models.workloads.patches import PatchLoop, workload

# Shares of easy, middling and hard patches: of 100 frames of a camera, with FSRCNN branches
# (Brainstorm's published artefact)
SHARES = (30.0, 33.7, 24.3)
TOLERANCE = 1e-4  # float32 against float64 branches


def enlarge(
    device: torch.device,
    dtype: torch.dtype,
    *,
    kind: str = "fsrcnn",
    height: int = 228,
    width: int = 312,
) -> Workload:
    """A made-up photo through the published branches with random weights.

    The classifier is random too, but for its last biases: they share the patches as published.
    """
    presets = {
        "fsrcnn": ClassSRConfig.fsrcnn,
        "carn": ClassSRConfig.carn,
        "srresnet": ClassSRConfig.srresnet,
        "rcan": ClassSRConfig.rcan,
    }
    if kind not in presets:
        raise BrtError(f"classsr: no kind {kind!r}: {', '.join(presets)}")
    torch.manual_seed(0)
    model = ClassSR(presets[kind]()).eval()
    photos = []
    for _ in range(2):
        rough = F.interpolate(torch.rand(1, 3, 8, 11), size=(height, width), mode="bicubic")
        fine = torch.rand(1, 3, height, width) * torch.linspace(0, 1, width)
        photos.append((rough + fine).clamp(0, 2) / 2)
    _share_out(model, photos)
    model = model.to(device, dtype)
    given, profiled = (x_BCHW.to(device, dtype) for x_BCHW in photos)
    return workload(
        "classsr",
        model,
        [(given,)],
        [profiled],
        {"kind": kind, "height": height, "width": width},
        TOLERANCE,
        [("loop over patches, as published", lambda: PatchLoop(model))],
    )


@torch.inference_mode()
def _share_out(model: ClassSR, photos: Sequence[Tensor]) -> None:
    """A last layer that cuts the range of the feature that differs most at two places."""
    classifier, white = model.classifier, model.config.white
    cells_NCHW = torch.cat([model.cut(x_BCHW)[0] for x_BCHW in photos]) / white
    x_NF = classifier.CondNet(cells_NCHW).mean((2, 3))
    feature = int(x_NF.std(0).argmax())
    x_N = x_NF[:, feature]
    shares = torch.tensor(SHARES) / sum(SHARES)
    low, high = torch.quantile(x_N, shares.cumsum(0)[:2]).tolist()
    steep = 1 / float(x_N.std())
    classifier.lastOut.weight.zero_()
    # Logits 0, x - low and 2 x - low - high: each is the highest of them in its part of the range
    classifier.lastOut.weight[:, feature] = steep * torch.tensor([0.0, 1.0, 2.0])
    classifier.lastOut.bias.copy_(steep * torch.tensor([0.0, -low, -low - high]))
