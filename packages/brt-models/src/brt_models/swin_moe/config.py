"""The shape of a Swin-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from brt.errors import BrtError

Size = Literal["tiny", "small", "base"]

_SMALL_HEADS, _BASE_HEADS = (3, 6, 12, 24), (4, 8, 16, 32)


@dataclass(frozen=True)
class SwinMoEConfig:
    """Shape of the network; the defaults are those of Swin-MoE-S, ImageNet-22k, 192x192 pixels.

    Stage s has ``depths[s]`` blocks, of which ``moe_blocks[s]`` have ``num_experts`` experts. A
    token takes ``top_k`` of them. An expert has room for ``top_k`` times
    ``int(capacity_factor * N / num_experts)`` of a batch's N tokens, the surest first with
    ``batch_prioritized``; a token without room gets nothing from the layer. With ``cosine_router``
    the gate compares directions in ``cosine_size`` dimensions. ``gate_noise`` over the number of
    experts is the deviation of what training adds to the scores. ``mlp_bias`` says whether the
    second layer of an MLP has a bias. ``version`` is that of the Swin blocks: 2 has attention by
    cosines, and normalises what a layer gives instead of what it takes.
    """

    image_size: int = 192
    patch_size: int = 4
    num_classes: int = 21841
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 12
    mlp_ratio: int = 4
    mlp_bias: bool = False
    moe_blocks: tuple[tuple[int, ...], ...] = ((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1,))
    num_experts: int = 16
    top_k: int = 1
    capacity_factor: float | None = 1.25
    batch_prioritized: bool = True
    normalise_gate: bool = False
    cosine_router: bool = False
    cosine_size: int = 256
    gate_noise: float = 1.0
    moe_dropout: float = 0.1
    drop_path: float = 0.2
    version: int = 1

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.num_heads) == len(self.moe_blocks) > 0:
            raise BrtError(
                "SwinMoEConfig: depths, num_heads and moe_blocks need one entry a stage; got "
                f"{len(self.depths)}, {len(self.num_heads)} and {len(self.moe_blocks)}"
            )
        for stage, blocks in enumerate(self.moe_blocks):
            if any(not 0 <= block < self.depths[stage] for block in blocks):
                raise BrtError(
                    f"SwinMoEConfig: stage {stage} has {self.depths[stage]} blocks; moe_blocks "
                    f"names {blocks}"
                )
            if self.dim(stage) % self.num_heads[stage]:
                raise BrtError(
                    f"SwinMoEConfig: {self.num_heads[stage]} heads do not share the "
                    f"{self.dim(stage)} features of stage {stage} evenly"
                )
            side, window = self.side(stage), self.window(stage)
            if side < 1 or side % window:
                raise BrtError(
                    f"SwinMoEConfig: windows of {window} do not tile the {side}x{side} tokens of "
                    f"stage {stage}"
                )
        if self.image_size % (self.patch_size * 2 ** (len(self.depths) - 1)):
            raise BrtError(
                f"SwinMoEConfig: image_size={self.image_size} does not divide into patches of "
                f"{self.patch_size} and {len(self.depths) - 1} halvings"
            )
        if self.version not in (1, 2):
            raise BrtError(f"SwinMoEConfig: no version {self.version} of Swin blocks: 1, 2")
        if not 1 <= self.top_k <= self.num_experts:
            raise BrtError(f"SwinMoEConfig: top_k={self.top_k} of {self.num_experts} experts")

    @classmethod
    def published(
        cls, size: Size = "small", num_experts: int = 16, cosine_router: bool = False
    ) -> SwinMoEConfig:
        """Swin-MoE of the authors' repository, for ImageNet-22k: "small" or "base"."""
        if size not in ("small", "base"):
            raise BrtError(f"SwinMoEConfig.published: no size {size!r}: small, base")
        is_base = size == "base"
        return cls(
            embed_dim=128 if is_base else 96,
            num_heads=_BASE_HEADS if is_base else _SMALL_HEADS,
            num_experts=num_experts,
            cosine_router=cosine_router,
            drop_path=0.3 if is_base else 0.2,
        )

    @classmethod
    def v2(cls, size: Size = "small", num_experts: int = 16) -> SwinMoEConfig:
        """SwinV2-MoE: widths and depths of the repository's Swin V2, for 192x192 pixels.

        Every other block of the last two stages is a mixture, as Tutel and Brainstorm measured it.
        """
        if size not in get_args(Size):
            raise BrtError(f"SwinMoEConfig.v2: no size {size!r}: {', '.join(get_args(Size))}")
        depth = 6 if size == "tiny" else 18
        return cls(
            embed_dim=128 if size == "base" else 96,
            depths=(2, 2, depth, 2),
            num_heads=_BASE_HEADS if size == "base" else _SMALL_HEADS,
            moe_blocks=((), (), tuple(range(1, depth, 2)), (1,)),
            num_experts=num_experts,
            mlp_bias=True,
            drop_path=0.3 if size == "small" else 0.2,
            version=2,
        )

    def dim(self, stage: int) -> int:
        """Features of a token."""
        return self.embed_dim * 2**stage

    def side(self, stage: int) -> int:
        """Tokens along one side of the image."""
        return self.image_size // self.patch_size // 2**stage

    def window(self, stage: int) -> int:
        """Tokens along one side of a window."""
        return min(self.window_size, self.side(stage))
