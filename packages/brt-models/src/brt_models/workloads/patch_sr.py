"""Benchmark of the patch network: the demo's photo."""

from __future__ import annotations

import torch

from brt.bench import Workload
from brt_models import photos
from brt_models.patch_sr import pretrained
from brt_models.workloads.patches import workload

TOLERANCE = 1e-4  # float32 against float64 branches


def demo_photo(device: torch.device, dtype: torch.dtype, *, photo: str = "china") -> Workload:
    """The trained network upscales one held-out photo fourfold, profiled on the others."""
    model = pretrained().to(device, dtype)
    x_BCHW = photos.load(photos.find(photo))[None].to(device, dtype)
    others = photos.split("train") + photos.split("profile")
    batches = [photos.load(p)[None].to(device, dtype) for p in others if p.name != photo]
    return workload("patch-sr", model, [(x_BCHW,)], batches, {"photo": photo}, TOLERANCE)
