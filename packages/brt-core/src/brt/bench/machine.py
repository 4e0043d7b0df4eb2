"""Which machine and which versions a number comes from."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from brt import plugins
from brt.bench.probe import CopyProbe, cache_bytes, device_name, num_cores
from brt.bench.result import Machine


def describe(device: torch.device, gemm_rate: float, keeps_memory: bool) -> Machine:
    """The machine, with what its copy does right now and what its products did at best."""
    return Machine(
        name=device_name(device),
        cores=num_cores(),
        gemm_gflops=gemm_rate / 1e9,
        copy_gbps=CopyProbe(device)() / 1e9,
        cache_bytes=cache_bytes(device),
        load_average=_load_average(),
        keeps_memory=keeps_memory,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of Python, torch, brt-core and every installed plugin that is in."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "brt-core": metadata.version("brt-core"),
    }
    for plugin in plugins.current().plugins:
        name, _, version = plugin.owner.partition(" ")
        if plugin.installed and plugin.skipped is None and version:
            found[name] = version
    return found


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
