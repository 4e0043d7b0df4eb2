"""The shape of LiveSR."""

from __future__ import annotations

from dataclasses import dataclass

from brt.errors import BrtError
from brt_models.patches import check_patches

PUBLISHED = ((10, 8), (8, 8), (6, 8), (4, 8), (10, 12), (10, 16), (10, 20))
"""Branches and their features, as Brainstorm measured them (figure 16 of its artefact)."""


@dataclass(frozen=True)
class LiveSRConfig:
    """Shape of the network: ``num_paths`` equal branches of ``num_blocks`` residual blocks.

    The defaults are the published ones. ``scale`` is a power of two.

    Source: LiveSR in Brainstorm, OSDI 2023, section 5.2; branches of NAS, Yeo et al., OSDI 2018.
    """

    num_paths: int = 10
    channels: int = 8
    num_blocks: int = 80
    scale: int = 4
    size: int = 32
    stride: int = 28

    def __post_init__(self) -> None:
        for name in ("num_paths", "channels", "num_blocks"):
            if getattr(self, name) < 1:
                raise BrtError(f"LiveSRConfig: {name} must be at least 1: {getattr(self, name)}")
        if self.scale < 2 or self.scale & (self.scale - 1):
            raise BrtError(f"LiveSRConfig: scale must be a power of two, got {self.scale}")
        check_patches("LiveSRConfig", self.size, self.stride)

    @classmethod
    def published(cls, num_paths: int = 10, channels: int = 8) -> LiveSRConfig:
        """One of the seven networks that Brainstorm measured."""
        if (num_paths, channels) not in PUBLISHED:
            known = ", ".join(f"{paths} of {width}" for paths, width in PUBLISHED)
            raise BrtError(
                f"LiveSRConfig.published: {num_paths} branches of {channels} features were not "
                f"measured; there are {known}"
            )
        return cls(num_paths, channels)
