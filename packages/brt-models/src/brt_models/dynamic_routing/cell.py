"""A cell of the lattice: work, and the ways out of it.

Shape letters: N images, C channels, H height, W width, G ways out (keep, up, down).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from brt import Cells, ScatterRouter
from brt.protocols import ResidualThreshold, Threshold
from brt_models.dynamic_routing.config import DynamicRoutingConfig
from brt_models.dynamic_routing.layers import ConvNorm, Gate, Mixed
from brt_models.images import is_over

MIN_GATE = 1e-4
"""A cell whose gates sum to less is skipped: its input stays at its scale."""

Rows = tuple[Tensor, Cells]
"""Features of some images, and which images they are."""


@dataclass
class Ways:
    """What leaves a cell, for each way out."""

    keep: list[Rows] = field(default_factory=list)
    up: list[Rows] = field(default_factory=list)
    down: list[Rows] = field(default_factory=list)


class Cell(nn.Module):
    """One cell: separable convolutions, then on at this scale, the finer or the coarser one.

    ``finer`` and ``coarser`` say whether there is such a way out.
    """

    def __init__(
        self, config: DynamicRoutingConfig, scale: int, finer: bool, coarser: bool
    ) -> None:
        super().__init__()
        channels = config.channels * 2**scale
        self.finer, self.coarser, self.small_gate = finer, coarser, config.small_gate
        self.cell_ops = Mixed(channels)
        if finer:
            self.res_up = nn.Sequential(nn.ReLU(), ConvNorm(channels, channels // 2))
        if coarser:
            self.res_down = nn.Sequential(nn.ReLU(), ConvNorm(channels, 2 * channels, stride=2))
        num_ways = 1 + finer + coarser
        self.gate_conv_beta = Gate(channels, num_ways, config.gate_bias)
        self.skip = ScatterRouter(ResidualThreshold(MIN_GATE), 2)
        self.ways = ScatterRouter(Threshold(0.0), num_ways)

    def gates(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, G]."""
        if self.small_gate:
            x_NCHW = resized(x_NCHW, 0.25)
        return self.gate_conv_beta(x_NCHW)

    def forward(self, x_NCHW: Tensor, cells: Cells) -> Ways:
        """Features of some images -> what leaves, each image by its own gates.

        Rows are not multiplied by their gates yet; the gather that takes them does.
        """
        out = Ways()
        if is_over(x_NCHW):
            return out
        gate_NG = self.gates(x_NCHW)
        ((skipped, _), (x, gate)), route = self.skip((x_NCHW, gate_NG), gate_NG, cells)
        out.keep.append((skipped, route[0]))
        if is_over(x):
            return out
        paths, way = self.ways(self.cell_ops(x), gate, route[1])
        if not is_over(paths[0]):
            out.keep.append((paths[0].relu(), way[0]))
        if self.finer and not is_over(paths[1]):
            out.up.append((resized(self.res_up(paths[1]), 2.0), way[1]))
        last = int(self.finer) + int(self.coarser)
        if self.coarser and not is_over(paths[last]):
            out.down.append((self.res_down(paths[last]), way[last]))
        return out

    def dense(self, x_NCHW: Tensor) -> tuple[list[Tensor | None], Tensor, int]:
        """Features of all images -> ([keep, up, down], expected multiply-adds, and all of them).

        What training computes: every way for every image, multiplied by its gate.
        """
        gate_NG = self.gates(x_NCHW)
        gate_GN = gate_NG.t()[..., None, None, None]
        skipped = (gate_NG.sum(1) < MIN_GATE).to(x_NCHW.dtype)[:, None, None, None]
        h = self.cell_ops(x_NCHW)
        up = down = None
        places = x_NCHW.shape[2] * x_NCHW.shape[3]
        macs_G = [0]
        if self.finer:
            up = resized(self.res_up(h), 2.0) * gate_GN[1]
            macs_G.append(places * _num_weights(self.res_up))
        if self.coarser:
            down = self.res_down(h) * gate_GN[-1]
            macs_G.append(places * _num_weights(self.res_down) // 4)
        own = places * _num_weights(self.cell_ops)
        expected_N = own * gate_NG.amax(1) + gate_NG @ gate_NG.new_tensor(macs_G)
        keep = skipped * x_NCHW + gate_GN[0] * h.relu()
        return [keep, up, down], expected_N.mean(), own + sum(macs_G)


def resized(x_NCHW: Tensor, factor: float) -> Tensor:
    """[N, C, H, W] -> [N, C, factor * H, factor * W]."""
    return nn.functional.interpolate(
        x_NCHW, scale_factor=factor, mode="bilinear", align_corners=False
    )


def _num_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
