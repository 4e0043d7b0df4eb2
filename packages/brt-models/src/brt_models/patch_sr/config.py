"""The shape of a patch network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brt.errors import BrtError

Upsampler = Literal["direct", "progressive"]


@dataclass(frozen=True)
class PatchSRConfig:
    """Shape of the network; path p has ``channels[p]`` features and ``blocks[p]`` blocks.

    Paths go from the cheapest to the most expensive.

    ``upsampler="direct"`` makes all s*s sub-pixels by one convolution, ``"progressive"`` doubles
    the resolution step by step as MDSR does (s a power of two). ``residual_scale`` multiplies what
    a block adds; deep branches need it below 1. ``gate_channels`` are the features of the gate's
    convolutions, each of stride 2. ``price`` is the squared error (values 0 to 1) that the gate
    lets the most expensive path save at least, compared with a path that costs nothing: higher is
    faster and worse.
    """

    channels: tuple[int, ...] = (8, 16, 16, 32)
    blocks: tuple[int, ...] = (0, 2, 6, 8)
    scale: int = 4
    size: int = 32
    stride: int = 28
    upsampler: Upsampler = "direct"
    residual_scale: float = 1.0
    gate_channels: tuple[int, ...] = (16, 32, 32)
    price: float = 3e-4

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.blocks):
            raise BrtError(
                "PatchSRConfig: channels and blocks need one number a path; got "
                f"{len(self.channels)} and {len(self.blocks)}"
            )
        if min(self.channels) < 1 or min(self.blocks) < 0:
            raise BrtError(
                "PatchSRConfig: a path needs channels >= 1 and blocks >= 0; got "
                f"channels={self.channels}, blocks={self.blocks}"
            )
        if self.scale < 1 or not 1 <= self.stride <= self.size:
            raise BrtError(
                "PatchSRConfig: scale must be >= 1 and stride from 1 to size; got "
                f"scale={self.scale}, size={self.size}, stride={self.stride}"
            )
        if self.upsampler not in ("direct", "progressive"):
            raise BrtError(f"PatchSRConfig: no upsampler {self.upsampler!r}: direct, progressive")
        if self.upsampler == "progressive" and self.scale & (self.scale - 1):
            raise BrtError(f"PatchSRConfig: progressive needs a power of two, got {self.scale}")
        if not self.gate_channels or min(self.gate_channels) < 1:
            raise BrtError(f"PatchSRConfig: no gate of gate_channels={self.gate_channels}")
        if list(self.macs_P) != sorted(self.macs_P):
            raise BrtError(
                "PatchSRConfig: paths must go from cheap to expensive; multiply-adds a patch are "
                f"{self.macs_P}"
            )
        if self.price <= 0:
            raise BrtError(f"PatchSRConfig: price must be over 0, got {self.price}")

    @property
    def num_paths(self) -> int:
        """Number of branches."""
        return len(self.channels)

    @property
    def path_names(self) -> tuple[str, ...]:
        """What to call each path in a legend."""
        shapes = zip(self.channels, self.blocks, strict=True)
        return tuple(f"{channels} channels, {blocks} blocks" for channels, blocks in shapes)

    @property
    def macs_P(self) -> tuple[int, ...]:
        """Multiply-adds that each path spends on one patch."""
        scale, doublings = self.scale, self.scale.bit_length() - 1
        macs = []
        for channels, blocks in zip(self.channels, self.blocks, strict=True):
            if self.upsampler == "direct":
                tail = 3 * scale**2 * channels
            else:
                grown = sum(4 * channels**2 * 4**step for step in range(doublings))
                tail = channels**2 + grown + 3 * channels * scale**2
            weights = 3 * channels + 2 * blocks * channels**2 + tail
            macs.append(9 * weights * self.size**2)
        return tuple(macs)
