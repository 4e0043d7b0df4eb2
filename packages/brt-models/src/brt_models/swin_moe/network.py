"""The network: patches, stages of blocks, a classifier.

Legend: B images, L tokens of one, C features, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt.errors import BrtError
from brt_models.images import check_images
from brt_models.swin_moe.attention import (
    CosineAttention,
    WindowAttention,
    from_windows,
    shift_mask,
    to_windows,
)
from brt_models.swin_moe.config import SwinMoEConfig
from brt_models.swin_moe.mixture import Mixture

torch.fx.wrap("check_images")  # it reads shapes, which a symbolic trace does not have
torch.fx.wrap("check_size")


class PatchEmbed(nn.Module):
    """Images -> tokens."""

    def __init__(self, config: SwinMoEConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, size, stride=size)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, L, C]."""
        return self.norm(self.proj(x_BCHW).flatten(2).transpose(1, 2))


class Mlp(nn.Module):
    """The MLP of a block without experts."""

    def __init__(self, config: SwinMoEConfig, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * config.mlp_ratio)
        self.fc2 = nn.Linear(dim * config.mlp_ratio, dim, bias=config.mlp_bias)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x_BLC)))


class DropPath(nn.Module):
    """In training, zero for some images; the others make up for it."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape."""
        if not self.training or not self.probability:
            return x_BLC
        kept = 1 - self.probability
        return x_BLC * x_BLC.new_empty(x_BLC.shape[0], 1, 1).bernoulli_(kept) / kept


class Block(nn.Module):
    """Attention in windows, then an MLP or a mixture of them.

    Version 2 normalises what a layer gives, before it is added; version 1 what it takes.
    """

    attn_mask: Tensor | None

    def __init__(self, config: SwinMoEConfig, stage: int, block: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dim(stage)
        self.side, self.window = config.side(stage), config.window(stage)
        is_shifted = block % 2 == 1 and self.side > self.window
        self.shift = config.window_size // 2 if is_shifted else 0
        self.norm_last = config.version == 2
        self.norm1 = nn.LayerNorm(dim)
        kind = CosineAttention if config.version == 2 else WindowAttention
        self.attn = kind(dim, self.window, config.num_heads[stage])
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        is_mixture = block in config.moe_blocks[stage]
        self.mlp: Mixture | Mlp = Mixture(config, dim) if is_mixture else Mlp(config, dim)
        mask = shift_mask(self.side, self.window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask)

    def attend(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape, attention added."""
        place = self.side, self.window, self.shift
        windows_BWMC = to_windows(self._before(self.norm1, x_BLC), *place)
        out_BLC = from_windows(self.attn(windows_BWMC, self.attn_mask), *place)
        return x_BLC + self.drop_path(self._behind(self.norm1, out_BLC))

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> the same shape."""
        x_BLC = self.attend(x_BLC)
        out_BLC = self.mlp(self._before(self.norm2, x_BLC))
        return x_BLC + self.drop_path(self._behind(self.norm2, out_BLC))

    def with_loss(self, x_BLC: Tensor) -> tuple[Tensor, Tensor | None]:
        """([B, L, C], the balance loss of its mixture; None where it has none)."""
        if not isinstance(self.mlp, Mixture):
            return self(x_BLC), None
        x_BLC = self.attend(x_BLC)
        out_BLC, loss = self.mlp.with_loss(self._before(self.norm2, x_BLC))
        return x_BLC + self.drop_path(self._behind(self.norm2, out_BLC)), loss

    def _before(self, norm: nn.LayerNorm, x_BLC: Tensor) -> Tensor:
        return x_BLC if self.norm_last else norm(x_BLC)

    def _behind(self, norm: nn.LayerNorm, x_BLC: Tensor) -> Tensor:
        return norm(x_BLC) if self.norm_last else x_BLC


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the features."""

    def __init__(self, dim: int, side: int, norm_last: bool = False) -> None:
        super().__init__()
        self.side, self.norm_last = side, norm_last
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm((2 if norm_last else 4) * dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> [B, L / 4, 2 * C]."""
        x = x_BLC.unflatten(1, (self.side // 2, 2, self.side // 2, 2))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # column first, as the authors' slices
        x_BLC = x.flatten(1, 2)
        if self.norm_last:
            return self.norm(self.reduction(x_BLC))
        return self.reduction(self.norm(x_BLC))


class Stage(nn.Module):
    """Blocks at one resolution."""

    def __init__(self, config: SwinMoEConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, stage, block, drop) for block, drop in enumerate(drop_path)
        )
        self.downsample: PatchMerging | None = None
        if stage < len(config.depths) - 1:
            place = config.dim(stage), config.side(stage)
            self.downsample = PatchMerging(*place, norm_last=config.version == 2)


class SwinMoE(nn.Module):
    """Images [B, 3, H, W] -> logits [B, V].

    In training mode the result is (logits, the sum of the mixtures' balance losses).
    """

    def __init__(self, config: SwinMoEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SwinMoEConfig()
        self.patch_embed = PatchEmbed(config)
        num_blocks = sum(config.depths)
        drops = [config.drop_path * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.layers.append(Stage(config, stage, drops[:depth]))
            drops = drops[depth:]
        last = config.dim(len(config.depths) - 1)
        self.norm = nn.LayerNorm(last)
        self.head = nn.Linear(last, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Block) and module.norm_last:  # blocks add nothing at first
                nn.init.zeros_(module.norm1.weight)
                nn.init.zeros_(module.norm2.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> [B, V]; with the balance loss in training."""
        check_images("SwinMoE", x_BCHW)
        check_size(self.config.image_size, x_BCHW)
        x_BLC, losses = self.patch_embed(x_BCHW), []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                if self.training:
                    x_BLC, loss = block.with_loss(x_BLC)  # type: ignore[operator]
                    losses.append(loss)
                else:
                    x_BLC = block(x_BLC)
            if stage.downsample is not None:
                x_BLC = stage.downsample(x_BLC)
        logits_BV = self.head(self.norm(x_BLC).mean(1))
        if not self.training:
            return logits_BV
        return logits_BV, sum((x for x in losses if x is not None), logits_BV.new_zeros(()))


def check_size(image_size: int, x_BCHW: Tensor) -> None:
    """Raise unless images have the size that the windows are for."""
    if tuple(x_BCHW.shape[2:]) != (image_size, image_size):
        raise BrtError(
            f"SwinMoE: images must be {image_size}x{image_size} pixels, got "
            f"{list(x_BCHW.shape[2:])}; resize them, or build another SwinMoEConfig"
        )


def small(num_classes: int = 10, version: int = 1) -> SwinMoE:
    """A small network for images of 32x32 pixels, with random weights, in eval mode."""
    config = SwinMoEConfig(
        image_size=32,
        patch_size=2,
        num_classes=num_classes,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        moe_blocks=((1,), (1,)),
        num_experts=4,
        cosine_size=8,
        mlp_bias=version == 2,
        version=version,
    )
    return SwinMoE(config).eval()


def small_v2(num_classes: int = 10) -> SwinMoE:
    """`small`, of Swin V2's blocks."""
    return small(num_classes, version=2)


def sample(seed: int = 0) -> tuple[Tensor]:
    """Made-up images [2, 3, 32, 32]."""
    return (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),)
