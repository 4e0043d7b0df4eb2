"""The shape of a RANet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brt.errors import BrtError
from brt_models.msdnet.config import Stem

StepMode = Literal["even", "grow"]


@dataclass(frozen=True)
class RANetConfig:
    """Shape of the network: sub-network s works at resolution ``scales[s]`` (1: the lowest).

    It has ``num_blocks + s * block_step`` blocks, of which as many as the one before has take in
    its features, and the others have a classifier each. Features of sub-network s are
    ``channels * factors[s]`` wide, and each layer adds ``growth * factors[s]``; the coarsest comes
    first. A block has ``step`` layers; with ``step_mode="grow"`` each block with a classifier
    ``step`` more than the one before. ``compress`` is the part of a layer's features that comes
    from the sub-network before, ``reduction`` what a transition keeps.

    Source: Yang et al., CVPR 2020, section 3; the authors' configurations.
    """

    num_blocks: int = 1
    block_step: int = 1
    step: int = 2
    step_mode: StepMode = "even"
    num_classes: int = 10
    channels: int = 8
    growth: int = 4
    factors: tuple[int, ...] = (2, 1, 1)
    bottlenecks: tuple[int, ...] = (2, 1, 1)
    scales: tuple[int, ...] = (1, 2, 3)
    reduction: float = 0.5
    compress: float = 0.25
    stem: Stem = "small"
    head_channels: int | None = 32

    def __post_init__(self) -> None:
        if not self.scales or not len(self.scales) == len(self.factors) == len(self.bottlenecks):
            raise BrtError(
                "RANetConfig: scales, factors and bottlenecks need one number a sub-network; got "
                f"{len(self.scales)}, {len(self.factors)} and {len(self.bottlenecks)}"
            )
        numbers = {
            "num_blocks": self.num_blocks,
            "block_step": self.block_step,
            "step": self.step,
            "num_classes": self.num_classes,
            "channels": self.channels,
            "growth": self.growth,
            "factors": min(self.factors),
            "bottlenecks": min(self.bottlenecks),
            "head_channels": 1 if self.head_channels is None else self.head_channels,
        }
        for name, number in numbers.items():
            if number < 1:
                raise BrtError(f"RANetConfig: {name} must be at least 1, got {number}")
        steps = [b - a for a, b in zip((0, *self.scales), self.scales, strict=False)]
        if steps[0] != 1 or not {*steps[1:]} <= {0, 1} or 1 in self.scales[1:]:
            raise BrtError(
                f"RANetConfig: scales start with one 1 and rise by at most 1, got {self.scales}"
            )
        if not 0 < self.reduction <= 1 or not 0 < self.compress < 1:
            raise BrtError(
                "RANetConfig: reduction must be over 0 to 1 and compress between 0 and 1; got "
                f"{self.reduction} and {self.compress}"
            )
        if int(self.compress * self.growth * min(self.factors)) < 1:
            raise BrtError(
                f"RANetConfig: compress={self.compress} leaves no feature of growth={self.growth}"
            )
        if self.step_mode not in ("even", "grow") or self.stem not in ("small", "imagenet"):
            raise BrtError(
                "RANetConfig: step_mode is even or grow, stem small or imagenet; got "
                f"{self.step_mode!r} and {self.stem!r}"
            )

    @classmethod
    def cifar(cls, num_classes: int = 10) -> RANetConfig:
        """The authors' network for CIFAR: four sub-networks at three resolutions, eight exits."""
        return cls(
            num_blocks=2,
            block_step=2,
            step=4,
            num_classes=num_classes,
            channels=16,
            growth=6,
            factors=(4, 2, 1, 1),
            bottlenecks=(4, 2, 1, 1),
            scales=(1, 2, 3, 3),
            head_channels=128,
        )

    @classmethod
    def imagenet(cls) -> RANetConfig:
        """The authors' network for ImageNet: four resolutions, eight exits."""
        return cls(
            num_blocks=2,
            block_step=2,
            step=8,
            num_classes=1000,
            channels=16,
            growth=16,
            factors=(4, 2, 1, 1),
            bottlenecks=(4, 2, 1, 1),
            scales=(1, 2, 3, 4),
            stem="imagenet",
            head_channels=None,
        )

    def blocks_of(self, sub: int) -> int:
        """Blocks of sub-network 0, 1, ...; -1 is none."""
        return self.num_blocks + sub * self.block_step if sub >= 0 else 0

    @property
    def num_exits(self) -> int:
        """Number of blocks with a classifier."""
        return self.blocks_of(len(self.scales) - 1)

    def layers_of(self, block: int) -> int:
        """Layers of block 0, 1, ... of every sub-network."""
        return self.step if self.step_mode == "even" else self.step * (block + 1)

    def is_transition(self, sub: int, block: int) -> bool:
        """Whether channels are reduced behind this block."""
        num_parts, num_blocks = self.scales[sub], self.blocks_of(sub)
        return block + 1 in {part * num_blocks // num_parts for part in range(1, num_parts)}

    def is_down(self, sub: int, block: int) -> bool:
        """Whether the last layer of this block halves the resolution."""
        ends = [self.blocks_of(earlier) for earlier in range(-1, sub)]
        return block + 1 in ends[-(self.scales[sub] - 1) :]
