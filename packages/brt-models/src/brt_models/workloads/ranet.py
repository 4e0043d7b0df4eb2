"""Benchmark of RANet: as that of MSDNet, on its own network."""

from __future__ import annotations

from collections.abc import Callable

import torch

from brt.bench import Workload
from brt.errors import BrtError
from brt_models.ranet import RANet, RANetConfig
from brt_models.workloads.msdnet import exit_workload, sharpened

PRESETS: dict[str, tuple[Callable[[], RANetConfig], int]] = {
    "imagenet": (RANetConfig.imagenet, 224),
    "cifar": (RANetConfig.cifar, 32),
}


def early_exit(
    device: torch.device,
    dtype: torch.dtype,
    *,
    preset: str = "cifar",
    mix: str = "20/20/10/10/10/10/10/10",
    batch: int = 1,
) -> Workload:
    """Random images through a network with random weights, whose thresholds give this mix."""
    if preset not in PRESETS:
        raise BrtError(f"ranet: no preset {preset!r}: {', '.join(PRESETS)}")
    make, size = PRESETS[preset]
    torch.manual_seed(0)
    model = sharpened(RANet(make()), size).to(device, dtype)
    return exit_workload("ranet", model, size, mix, batch, {"preset": preset})
