"""Benchmark of drift: loads that are no longer those for which a model was planned.

Brainstorm tuned kernels of LiveSR's branches for 4 and 27 patches, and sent 8 to some branches
(published figure 24: the gain of its fusion over branch by branch falls from 4.65 to 2.11).

Shape letters: N patches, P paths, C colours, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt.errors import BrtError
from brt.protocols import Label
from brt_models.livesr import livesr

PLANNED = (4, 27)
"""Patches of a branch, turn by turn, for which the model is planned."""
DRIFTED = 8
TOLERANCE = 1e-4  # float32 against float64
PATCH = 32


class Branches(nn.Module):
    """LiveSR's branches, each on the patches of its label: ``forward(patches, label_N)``."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.scatter = brt.ScatterRouter(Label(), len(branches))
        self.branches = nn.ModuleList(branches)
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x_NCHW: Tensor, label_N: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> the patches enlarged."""
        paths, route = self.scatter(x_NCHW, label_N)
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, route)


def drift(
    device: torch.device,
    dtype: torch.dtype,
    *,
    drifted: float = 1.0,
    channels: int = 8,
    num_paths: int = 10,
    num_blocks: int = 16,
) -> Workload:
    """``drifted`` is the share of the branches that get 8 patches instead of 4 or 27.

    The last two rows run the loads of the plan: the gain there, and the gain of "planned for 4 and
    27" on the drifted loads, are what the paper compares.
    """
    if not 0 <= drifted <= 1:
        raise BrtError(f"drift: drifted must be from 0 to 1, got {drifted}")
    torch.manual_seed(0)
    model = Branches(list(livesr(channels, num_paths, num_blocks).paths)).eval().to(device, dtype)
    planned_P = [PLANNED[p % len(PLANNED)] for p in range(num_paths)]
    num_drifted = round(drifted * num_paths)
    load_P = [DRIFTED if p < num_drifted else planned_P[p] for p in range(num_paths)]
    then, now = (_patches(loads, device, dtype) for loads in (planned_P, load_P))

    def planned(batch: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
        return brt.optimize(model, brt.profile(model, [batch]), sample=batch)

    def on_plan(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *_: run(*then)

    def row(kind: Kind, name: str, make: Callable[[], Callable[..., Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make)

    options = {
        "drifted": drifted, "channels": channels, "num_paths": num_paths, "num_blocks": num_blocks,
    }  # fmt: skip
    return Workload(
        name="drift",
        shapes=f"N={sum(load_P)} P={num_paths} C={channels} H=W={PATCH}",
        device=device,
        dtype=dtype,
        sets=[now],
        reference=_in_double(model),
        tolerance=TOLERANCE if dtype == torch.float32 else 3e-2,
        options=options,
        variants=[
            row("eager", "branch by branch", lambda: model),
            row("brt", "planned for 4 and 27", lambda: planned(then)),
            row("brt", "planned for these loads", lambda: planned(now)),
            row("part", "loads of the plan, branch by branch", lambda: on_plan(model)),
            row("part", "loads of the plan, planned for them", lambda: on_plan(planned(then))),
        ],
    )


def _patches(
    load_P: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    label_N = torch.arange(len(load_P)).repeat_interleave(torch.tensor(load_P))
    label_N = label_N[torch.randperm(len(label_N))]
    x_NCHW = torch.rand(len(label_N), 3, PATCH, PATCH)
    return x_NCHW.to(device, dtype), label_N.to(device)


def _in_double(model: Branches) -> Callable[..., Tensor]:
    wide = copy.deepcopy(model).double()
    return lambda x_NCHW, label_N: wide(x_NCHW.double(), label_N)
