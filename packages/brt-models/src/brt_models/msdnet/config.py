"""The shape of an MSDNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brt.errors import BrtError

Stem = Literal["small", "imagenet"]
Prune = Literal["max", "min"]


@dataclass(frozen=True)
class MSDNetConfig:
    """Shape of the network: block k has ``steps[k]`` layers and a classifier behind them.

    Scale s has ``factors[s]`` times as many channels as the finest: it starts from ``channels``,
    and each layer adds ``growth``. The 1x1 convolution of a layer narrows to at most
    ``bottlenecks[s]`` times what the layer adds. ``prune="max"`` gives up the finest scale after
    each of as many equal parts of the depth as there are scales; "min" keeps a scale for as long as
    some later layer needs it. Where scales go, a 1x1 convolution keeps ``reduction`` of the
    channels (0: none is inserted).

    ``stem="small"`` is for images of 32x32 pixels or so, "imagenet" for 224x224: it divides the
    resolution by four. Classifiers have ``head_channels`` channels, or as many as they are given
    where that is None.

    Source: Huang et al., ICLR 2018, section 4 and appendix A.
    """

    steps: tuple[int, ...] = (2, 2, 2)
    num_classes: int = 10
    channels: int = 8
    growth: int = 4
    factors: tuple[int, ...] = (1, 2, 4)
    bottlenecks: tuple[int, ...] = (1, 2, 4)
    reduction: float = 0.5
    prune: Prune = "max"
    stem: Stem = "small"
    head_channels: int | None = 32

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise BrtError(f"MSDNetConfig: steps needs layers for each block, got {self.steps}")
        if not self.factors or len(self.factors) != len(self.bottlenecks):
            raise BrtError(
                "MSDNetConfig: factors and bottlenecks need one number a scale; got "
                f"{len(self.factors)} and {len(self.bottlenecks)}"
            )
        numbers = {
            "num_classes": self.num_classes,
            "channels": self.channels,
            "growth": self.growth,
            "factors": min(self.factors),
            "bottlenecks": min(self.bottlenecks),
            "head_channels": 1 if self.head_channels is None else self.head_channels,
        }
        for name, number in numbers.items():
            if number < 1:
                raise BrtError(f"MSDNetConfig: {name} must be at least 1, got {number}")
        if any((self.growth * factor) % 2 for factor in self.factors[1:]):
            raise BrtError(
                "MSDNetConfig: half of what a coarser scale adds comes from the scale above, so "
                f"growth times factors must be even; got {self.growth} times {self.factors}"
            )
        if not 0 <= self.reduction < 1:
            raise BrtError(f"MSDNetConfig: reduction must be from 0 to below 1: {self.reduction}")
        if self.prune not in ("max", "min"):
            raise BrtError(f"MSDNetConfig: no prune {self.prune!r}: max, min")
        if self.stem not in ("small", "imagenet"):
            raise BrtError(f"MSDNetConfig: no stem {self.stem!r}: small, imagenet")
        if self.prune == "max" and self.scales_of(self.num_layers)[1] < 1:
            raise BrtError(
                f"MSDNetConfig: {self.num_layers} layers do not part among {self.num_scales} scales"
            )

    @classmethod
    def imagenet(cls, step: int = 4) -> MSDNetConfig:
        """The published ImageNet networks: five blocks of 4, 6 or 7 layers, four scales.

        Brainstorm measured the one of 4 layers a block.
        """
        return cls(
            steps=(step,) * 5,
            num_classes=1000,
            channels=32,
            growth=16,
            factors=(1, 2, 4, 4),
            bottlenecks=(1, 2, 4, 4),
            stem="imagenet",
            head_channels=None,
        )

    @classmethod
    def cifar(cls, num_classes: int = 100) -> MSDNetConfig:
        """The published network for batches of CIFAR images: blocks of 1 to 5 layers."""
        return cls(
            steps=(1, 2, 3, 4, 5),
            num_classes=num_classes,
            channels=16,
            growth=6,
            head_channels=128,
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks, and of exits."""
        return len(self.steps)

    @property
    def num_scales(self) -> int:
        """Number of scales that the first layer has."""
        return len(self.factors)

    @property
    def num_layers(self) -> int:
        """Number of layers in all blocks."""
        return sum(self.steps)

    def scales_of(self, layer: int) -> tuple[int, int]:
        """How many scales layer 1, 2, ... takes and gives; the coarsest ones stay."""
        if self.prune == "min":
            left = self.num_layers - layer + 1
            return min(self.num_scales, left + 1), min(self.num_scales, left)
        part = -(-self.num_layers // self.num_scales)
        return (
            self.num_scales - max(0, layer - 2) // part,
            self.num_scales - (layer - 1) // part,
        )

    def is_transition(self, layer: int) -> bool:
        """Whether channels are reduced behind this layer."""
        if not self.reduction:
            return False
        if self.prune == "min":
            return layer in (self.num_layers // 3, 2 * self.num_layers // 3)
        taken, given = self.scales_of(layer)
        return taken > given
