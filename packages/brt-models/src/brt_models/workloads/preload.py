"""Benchmark of a model larger than the memory given: its experts are loaded when needed, or before.

Shape letters: N sentences (cells), S tokens, D H features, L layers, E experts, B batches.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.bench import Variant, Workload
from brt.errors import BrtError
from brt.passes import PreloadWeights
from brt.passes.preload_weights import Preloaded
from brt.protocols import Label

NUM_SETS = 24
NUM_PROFILED = 200
MODES = ("on-demand", "predicted")


class Chain(nn.Module):
    """Residual layers of feed-forward experts; sentence n takes ``expert_NL[n, l]`` in layer l."""

    def __init__(self, num_layers: int, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.scatters = nn.ModuleList(
            brt.ScatterRouter(Label(), num_experts) for _ in range(num_layers)
        )
        self.experts = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
                for _ in range(num_experts)
            )
            for _ in range(num_layers)
        )
        self.gather = brt.GatherRouter()

    def forward(self, x_NSD: Tensor, expert_NL: Tensor) -> Tensor:
        """[N, S, D] and [N, L] -> [N, S, D]."""
        x_NSD, grid = brt.annotate(x_NSD, 0)
        for i, (scatter, experts) in enumerate(zip(self.scatters, self.experts, strict=True)):
            assert isinstance(experts, nn.ModuleList)
            paths, route = scatter(x_NSD, expert_NL[:, i], grid.cells)
            x_NSD = x_NSD + self.gather(brt.each(experts, paths), route)
        return x_NSD


def chain(
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: int = 8,
    experts: int = 4,
    dim: int = 512,
    hidden: int = 2048,
    tokens: int = 128,
    batch: int = 1,
    predictable: float = 0.9,
    oversize: float = 4.0,
) -> Workload:
    """Weights of ``oversize`` times the budget; the next expert is the usual one this often.

    On the CPU weights are read from a file, past the system's cache, so that each load is a cold
    read; the rows by hand drop the file's pages after each call. On CUDA they lie in memory of the
    host, page-locked but for the rows by hand.
    """
    if not 0 <= predictable <= 1 or oversize < 1 or batch < 1:
        raise BrtError("preload: predictable from 0 to 1, oversize and batch at least 1")
    torch.manual_seed(0)
    model = Chain(layers, experts, dim, hidden).eval().to(dtype)
    num_bytes = sum(p.nbytes for p in model.parameters())

    def draw(num: int) -> Tensor:
        """[num, batch, L]"""
        expert_BNL = torch.randint(experts, (num, batch, layers))
        usual_BNL = torch.rand(num, batch, layers) < (predictable * experts - 1) / (experts - 1)
        for i in range(1, layers):
            following_BN = (expert_BNL[..., i - 1] + 1) % experts
            expert_BNL[..., i] = following_BN.where(usual_BNL[..., i], expert_BNL[..., i])
        return expert_BNL

    sets = [
        (torch.randn(batch, tokens, dim, dtype=dtype, device=device), expert_NL.to(device))
        for expert_NL in draw(NUM_SETS)
    ]
    profile = brt.profile(
        model,
        [(torch.zeros(batch, 1, dim, dtype=dtype), expert_NL) for expert_NL in draw(NUM_PROFILED)],
    )
    budget = int(num_bytes / oversize)
    resident = copy.deepcopy(model)
    brt.memory.pin(model, _new_file(model) if device.type == "cpu" else None)

    def preloading(mode: Any) -> Callable[..., Tensor]:
        one = PreloadWeights(budget_bytes=budget, mode=mode)
        return brt.optimize(model, profile, passes=[one])

    rows = [_Preloading(mode, preloading) for mode in MODES]
    return Workload(
        name="preload",
        shapes=f"N={batch} S={tokens} D={dim} H={hidden} L={layers} E={experts}; "
        f"{num_bytes >> 20} MiB of weights, {budget >> 20} MiB of memory",
        device=device,
        dtype=dtype,
        sets=sets,
        reference=_Reference(resident),
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
        options={
            "layers": layers, "experts": experts, "dim": dim, "hidden": hidden, "tokens": tokens,
            "batch": batch, "predictable": predictable, "oversize": oversize,
        },
        variants=[
            Variant(kind="eager", name="by hand", make=lambda: _ByHand(model, resident, device)),
            *(row.variant for row in rows),
            Variant(
                kind="oracle",
                name="all weights in memory",
                make=lambda: copy.deepcopy(resident).to(device),
            ),
        ],
    )  # fmt: skip


def _new_file(model: nn.Module) -> Path:
    """A file that goes with the model."""
    folder = tempfile.mkdtemp(prefix="brt-preload-")
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "weights.safetensors"


class _Preloading:
    """A mode of the pass as a variant, which tells afterwards what was loaded."""

    def __init__(self, mode: str, make: Callable[[str], Any]) -> None:
        self._mode, self._make = mode, make
        self.variant = Variant(
            kind="brt", name=f"preload-weights, {mode}", make=self.make, detail=self.detail
        )

    def make(self) -> Callable[..., Tensor]:
        self._fast = self._make(self._mode)
        return self._fast

    def detail(self) -> str:
        """After the first runs: what they loaded, and how much memory that is kept in."""
        shelf = next(m.shelf for m in self._fast.inserted.values() if isinstance(m, Preloaded))
        ((_, traffic),) = shelf.traffic.items()
        ((_, held),) = shelf.resident_bytes.items()
        return f"{traffic.loads} loads a first call, {held >> 20} MiB held"


class _ByHand:
    """Experts by an `if`: weights come as they are used, and are forgotten."""

    def __init__(self, mapped: Chain, resident: Chain, device: torch.device) -> None:
        self._is_mapped = device.type == "cpu"
        self._model, self._device = mapped if self._is_mapped else resident, device

    def __call__(self, x_NSD: Tensor, expert_NL: Tensor) -> Tensor:
        """[N, S, D] and [N, L] -> [N, S, D]."""
        taken_LN = expert_NL.t().tolist()
        for experts, taken_N in zip(self._model.experts, taken_LN, strict=True):
            out_NSD = torch.empty_like(x_NSD)
            for e in sorted(set(taken_N)):
                index = [n for n, taken in enumerate(taken_N) if taken == e]
                up, _, down = experts[e]  # type: ignore[index]
                hidden = F.gelu(self._linear(up, x_NSD[index]))
                out_NSD[index] = self._linear(down, hidden)
            x_NSD = x_NSD + out_NSD
        if self._is_mapped:
            brt.memory.drop_pages(self._model)
        return x_NSD

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.to(self._device), layer.bias.to(self._device))


class _Reference:
    """The chain in float64, an expert at a time."""

    def __init__(self, model: Chain) -> None:
        self._model = model

    def __call__(self, x_NSD: Tensor, expert_NL: Tensor) -> Tensor:
        x_NSD = x_NSD.double().cpu()
        for experts, taken_N in zip(self._model.experts, expert_NL.t().tolist(), strict=True):
            outs = [
                copy.deepcopy(experts[e]).double()(x_SD)  # type: ignore[index]
                for e, x_SD in zip(taken_N, x_NSD, strict=True)
            ]
            x_NSD = x_NSD + torch.stack(outs)
        return x_NSD
