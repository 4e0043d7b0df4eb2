"""Benchmark of dynamic routing: one image after another through a lattice of random gates.

Shape letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt.errors import BrtError
from brt_models.dynamic_routing import Cell, DynamicRouting, DynamicRoutingConfig, scatter_gates
from brt_models.dynamic_routing.cell import MIN_GATE, resized
from brt_models.dynamic_routing.network import nothing_at
from brt_models.macs import macs_of
from brt_models.workloads.msdnet import frozen, fused

TOLERANCE = 1e-4  # float32 against float64, through some hundred convolutions
NUM_IMAGES = 4


def segment(
    device: torch.device,
    dtype: torch.dtype,
    *,
    network: str = "A",
    height: int = 256,
    width: int = 512,
    seed: int = 2,
) -> Workload:
    """Noise through a network of the published shape; Brainstorm took 1024x2048 pixels."""
    config = DynamicRoutingConfig.cityscapes(network)
    torch.manual_seed(0)
    model = DynamicRouting(config).eval()
    scatter_gates(model, seed)
    options = {"network": network, "height": height, "width": width, "seed": seed}
    return gate_workload(model.to(device, dtype), (height, width), options)


def gate_workload(
    model: DynamicRouting, size: tuple[int, int], options: dict[str, object]
) -> Workload:
    """The workload of any such network on images of this size."""
    if any(side % model.config.divisor for side in size):
        raise BrtError(
            f"dynamic-routing: height and width must be multiples of {model.config.divisor}, "
            f"got {size[0]} and {size[1]}"
        )
    first = next(model.parameters())

    def images() -> list[Tensor]:
        return [torch.randn(1, 3, *size).to(first.device, first.dtype) for _ in range(NUM_IMAGES)]

    timed, others = images(), images()
    macs = sum(macs_of(model, model, x_NCHW, [[model]])[0] for x_NCHW in timed)
    flops = 2.0 * macs / len(timed)

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(model, brt.profile(model, others), sample=others[0])

    return Workload(
        name="dynamic-routing",
        shapes=f"{[1, 3, *size]} images",
        device=first.device,
        dtype=first.dtype,
        sets=[(x_NCHW,) for x_NCHW in timed],
        reference=_InDouble(model),
        tolerance=TOLERANCE if first.dtype == torch.float32 else 3e-2,
        options=options,
        is_uneven=True,
        variants=[
            row("eager", "python if", lambda: PythonGates(model)),
            row(
                "peer",
                "python if, torch.compile per cell (frozen)",
                lambda: PythonGates(model, True),
            ),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt optimised", optimised),
            row("oracle", "the cells and ways taken, in one line", lambda: Oracle(model, timed)),
            row("limit", "dense product of as many operations", lambda: _product(first, flops)),
        ],
    )


Ways = tuple[Tensor | None, Tensor | None, Tensor | None]
"""What leaves a cell: kept, up, down; None where the gate is shut."""


class PythonGates(nn.Module):
    """The same network as people write it: a Python `if` at every gate, image by image.

    It shares the modules of the network that it is made of.
    """

    def __init__(self, model: DynamicRouting, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.work: dict[Cell, Callable[[Tensor], Tensor]] = {}
        for cell in model.modules():
            if isinstance(cell, Cell):
                self.work[cell] = frozen(cell.cell_ops) if compiled else cell.cell_ops

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, L, H, W]."""
        features = [self._features(x) for x in x_NCHW.split(1)]
        return self.model.sem_seg_head([torch.cat(scale) for scale in zip(*features, strict=True)])

    def _features(self, x: Tensor) -> list[Tensor]:
        backbone = self.model.backbone
        stem = backbone.stem(x)
        before = [self._cell(backbone.init_layer, stem)]
        for layer in backbone.all_cell_list:
            arrived = [_sum(before, scale) for scale in range(len(layer))]  # type: ignore[arg-type]
            cells: Sequence[Cell] = list(layer)  # type: ignore[call-overload]
            before = [self._cell(cell, x) for cell, x in zip(cells, arrived, strict=True)]
        kept = (ways[0] for ways in before)
        return [nothing_at(stem, s) if x is None else x for s, x in enumerate(kept)]

    def _cell(self, cell: Cell, x: Tensor | None) -> Ways:
        if x is None:
            return None, None, None
        gate_G = cell.gates(x)[0]
        if float(gate_G.sum().detach()) < MIN_GATE:
            return x, None, None
        is_open = (gate_G > 0).tolist()
        h, up, down = self.work[cell](x), None, None
        if cell.finer and is_open[1]:
            up = resized(cell.res_up(h), 2.0) * gate_G[1]
        if cell.coarser and is_open[-1]:
            down = cell.res_down(h) * gate_G[-1]
        return h.relu() * gate_G[0] if is_open[0] else None, up, down


def _sum(before: Sequence[Ways], scale: int) -> Tensor | None:
    sources = [(scale - 1, 2), (scale, 0), (scale + 1, 1)]
    found = [before[s][way] for s, way in sources if 0 <= s < len(before)]
    first, *others = chain((x for x in found if x is not None), [None])
    for other in others:
        if first is not None and other is not None:
            first = first + other
    return first


class Oracle(nn.Module):
    """Straight lines of the work that images take whose gates are known: nothing is decided.

    Every gate of a cell that an image reaches is computed, as a real run needs it. Layers are fused
    as `fuse-vertical` does.
    """

    def __init__(self, model: DynamicRouting, images: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: dict[int, Callable[[Tensor], tuple[Tensor, ...]]] = {}
        for x_NCHW in images:
            watched = _Watched(model)
            watched(x_NCHW)
            self.lines[x_NCHW.data_ptr()] = fused(_Line(model, watched.taken))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[1, 3, H, W], one of the images that it knows -> [1, L, H, W]."""
        return self.lines[x_NCHW.data_ptr()](x_NCHW)[0]


Taken = dict[Cell, tuple[bool, bool, bool] | None]
"""The ways out of the cells that an image reaches; None: skipped."""


class _Watched(PythonGates):
    def __init__(self, model: DynamicRouting) -> None:
        super().__init__(model)
        self.taken: Taken = {}

    def _cell(self, cell: Cell, x: Tensor | None) -> Ways:
        ways = keep, up, down = super()._cell(cell, x)
        if x is not None:
            is_skipped = keep is x
            open_ = keep is not None, up is not None, down is not None
            self.taken[cell] = None if is_skipped else open_
        return ways


class _Line(PythonGates):
    """An image by ways that are known: (logits, the gates of the cells on its way)."""

    def __init__(self, model: DynamicRouting, taken: Taken) -> None:
        super().__init__(model)
        self.taken = taken
        self.gates: list[Tensor] = []

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        self.gates.clear()
        features = self._features(x_NCHW)
        return self.model.sem_seg_head(features), *self.gates

    def _cell(self, cell: Cell, x: Tensor | None) -> Ways:
        if x is None:
            return None, None, None
        gate_G, taken = cell.gates(x)[0], self.taken[cell]
        self.gates.append(gate_G)
        if taken is None:
            return x, None, None
        keeps, goes_up, goes_down = taken
        h, up, down = self.work[cell](x).relu(), None, None  # all ways begin with ReLU
        if goes_up:
            up = resized(cell.res_up[1](h), 2.0) * gate_G[1]
        if goes_down:
            down = cell.res_down[1](h) * gate_G[-1]
        return h * gate_G[0] if keeps else None, up, down


class _InDouble(nn.Module):
    """The reference: the hand-written gates in float64."""

    def __init__(self, model: DynamicRouting) -> None:
        super().__init__()
        self.model = PythonGates(copy.deepcopy(model).double())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.model(x_NCHW.double())


def _product(like: Tensor, flops: float) -> Callable[[Tensor], Tensor]:
    width = 1024
    inner = max(1, round(flops / (2 * width**2)))
    a, b = like.new_ones(width, inner), like.new_ones(inner, width)
    return lambda x_NCHW: torch.mm(a, b)
