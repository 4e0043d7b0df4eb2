"""The shape of a ClassSR network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from brt.errors import BrtError
from brt_models.patches import check_patches

Kind = Literal["fsrcnn", "carn", "srresnet", "rcan"]

SCALE = 4
"""What all published branches enlarge by."""
CARN_GROUPS = 4
RCAN_REDUCTION = 16


@dataclass(frozen=True)
class ClassSRConfig:
    """Shape of the network: branch p is a ``kind`` of ``channels[p]`` features, cheapest first.

    ``depth`` counts what repeats in a branch: FSRCNN's 3x3 convolutions between the 1x1 ones,
    SRResNet's residual blocks, the blocks in each of RCAN's ``groups`` groups; CARN has always
    three of three. ``white`` is the value of a white pixel in what branches take and give.

    Source: Kong et al., ClassSR, CVPR 2021 (arXiv:2103.04039), section 4.1.
    """

    kind: Kind = "fsrcnn"
    channels: tuple[int, ...] = (16, 36, 56)
    depth: int = 4
    groups: int = 1
    white: float = 1.0
    size: int = 32
    stride: int = 28

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BrtError(f"ClassSRConfig: no kind {self.kind!r}: {', '.join(get_args(Kind))}")
        if len(self.channels) < 2 or list(self.channels) != sorted(self.channels):
            raise BrtError(
                "ClassSRConfig: channels needs two branches or more, cheapest first; got "
                f"{self.channels}"
            )
        least = {"carn": CARN_GROUPS, "rcan": RCAN_REDUCTION}.get(self.kind, 1)
        if self.channels[0] < least:
            raise BrtError(
                f"ClassSRConfig: {self.kind} needs {least} channels, got {self.channels}"
            )
        if self.kind == "carn" and any(width % CARN_GROUPS for width in self.channels):
            raise BrtError(
                f"ClassSRConfig: carn has convolutions of {CARN_GROUPS} groups, which do not share "
                f"channels={self.channels} evenly"
            )
        if self.depth < 1 or self.groups < 1 or self.white <= 0:
            raise BrtError(
                "ClassSRConfig: depth and groups must be at least 1, white over 0; got "
                f"{self.depth}, {self.groups} and {self.white}"
            )
        if self.kind == "carn" and self.depth != 3:
            raise BrtError(f"ClassSRConfig: carn has a depth of 3, got {self.depth}")
        if self.kind != "rcan" and self.groups != 1:
            raise BrtError(f"ClassSRConfig: {self.kind} has no groups of blocks; got {self.groups}")
        check_patches("ClassSRConfig", self.size, self.stride)
        if self.size < 4:
            raise BrtError(f"ClassSRConfig: the classifier reads 4x4 pixels; size is {self.size}")

    @classmethod
    def fsrcnn(cls) -> ClassSRConfig:
        """The published FSRCNN branches of 16, 36 and 56 features."""
        return cls()

    @classmethod
    def carn(cls) -> ClassSRConfig:
        """The published CARN-M branches of 36, 52 and 64 features."""
        return cls(kind="carn", channels=(36, 52, 64), depth=3)

    @classmethod
    def srresnet(cls) -> ClassSRConfig:
        """The published SRResNet branches of 36, 52 and 64 features, 16 blocks each."""
        return cls(kind="srresnet", channels=(36, 52, 64), depth=16)

    @classmethod
    def rcan(cls) -> ClassSRConfig:
        """The published RCAN branches of 36, 50 and 64 features, 10 groups of 20 blocks each.

        Their pixels are bytes, from 0 to 255; photos are 0 to 1 here as everywhere.
        """
        return cls(kind="rcan", channels=(36, 50, 64), depth=20, groups=10, white=255.0)

    @property
    def num_paths(self) -> int:
        """Number of branches."""
        return len(self.channels)
