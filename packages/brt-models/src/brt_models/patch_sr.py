"""Super-resolution by patches of different difficulty, after LiveSR and ClassSR.

A photo is cut into overlapping patches, a small convolutional gate sends each patch to one of a
few residual networks of different width and depth, and the results are folded back at the higher
resolution. Each branch predicts what bicubic upscaling lacks, so that even the cheapest one
starts from a bicubic photo.

LiveSR: Brainstorm, OSDI 2023, section 5.2, on NAS (OSDI 2018). ClassSR: Kong et al., CVPR 2021.

Shape letters: B photos, N patches (cells), P paths, C colours, H height, W width, F features,
s the scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from brt import Cells, GatherRouter, ScatterRouter, annotate_patches, each
from brt.errors import BrtError
from brt.protocols import TopK
from brt_models.resampling import enlarge

Upsampler = Literal["direct", "progressive"]

WEIGHTS = "weights/patch_sr.safetensors"  # in this package


@dataclass(frozen=True)
class PatchSRConfig:
    """Shape of the network; path p has ``channels[p]`` features and ``blocks[p]`` blocks.

    ``upsampler="direct"`` makes all s*s sub-pixels by one convolution, ``"progressive"`` doubles
    the resolution step by step as MDSR does (s a power of two). ``residual_scale`` multiplies what
    a block adds; deep branches need it below 1. ``gate_channels`` are the features of the gate's
    convolutions, each of stride 2.
    """

    channels: tuple[int, ...] = (8, 16, 16, 32)
    blocks: tuple[int, ...] = (0, 2, 6, 8)
    scale: int = 4
    size: int = 32
    stride: int = 28
    upsampler: Upsampler = "direct"
    residual_scale: float = 1.0
    gate_channels: tuple[int, ...] = (16, 32, 32)

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

    @classmethod
    def livesr(cls, channels: int = 8, num_paths: int = 10, num_blocks: int = 80) -> PatchSRConfig:
        """The shape that Brainstorm measured: equal NAS-MDSR branches, 8 to 20 channels."""
        return cls(
            channels=(channels,) * num_paths,
            blocks=(num_blocks,) * num_paths,
            upsampler="progressive",
            residual_scale=0.1,
        )

    @property
    def num_paths(self) -> int:
        """Number of branches."""
        return len(self.channels)

    @property
    def path_names(self) -> tuple[str, ...]:
        """What to call each path in a legend."""
        shapes = zip(self.channels, self.blocks, strict=True)
        return tuple(f"{channels} channels, {blocks} blocks" for channels, blocks in shapes)


class Block(nn.Module):
    """Two convolutions whose result is added to the input."""

    def __init__(self, channels: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.residual_scale = residual_scale

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return torch.add(x_NFHW, self.conv2(F.relu(self.conv1(x_NFHW))), alpha=self.residual_scale)


class PixelShuffle(nn.Module):
    """`torch.nn.PixelShuffle`, whose backward raises where there are zero rows (torch 2.13)."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F*s*s, H, W] -> [N, F, s*H, s*W]."""
        apart = x_NFHW.unflatten(1, (-1, self.scale, self.scale))  # [N, F, s, s, H, W]
        return apart.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class Branch(nn.Module):
    """One sub-network: centred patches -> what bicubic upscaling of them lacks."""

    def __init__(self, config: PatchSRConfig, path: int) -> None:
        super().__init__()
        channels, scale = config.channels[path], config.scale
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *(Block(channels, config.residual_scale) for _ in range(config.blocks[path]))
        )
        if config.upsampler == "direct":
            self.upscale = nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, 3 * scale**2, 3, padding=1), PixelShuffle(scale)
            )
        else:
            steps: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1)]
            for _ in range(scale.bit_length() - 1):
                steps += [nn.Conv2d(channels, 4 * channels, 3, padding=1), PixelShuffle(2)]
            self.upscale = nn.Sequential(*steps, nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, s*H, s*W]."""
        return self.upscale(self.body(self.head(x_NCHW)))


class Gate(nn.Module):
    """How well each path suits each patch: [N, 3, H, W] -> scores [N, P]."""

    def __init__(self, config: PatchSRConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for wider in config.gate_channels:
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.ReLU()]
            channels = wider
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, config.num_paths)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]."""
        return self.linear(self.features(x_NCHW).mean((2, 3)))


class PatchSR(nn.Module):
    """Photos [B, 3, H, W], values 0 to 1 -> [B, 3, s*H, s*W].

    Values may leave 0 to 1 a little. A photo smaller than a patch is padded for the branches.
    """

    def __init__(self, config: PatchSRConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PatchSRConfig()
        self.gate = Gate(config)
        self.scatter = ScatterRouter(TopK(1), num_paths=config.num_paths)
        self.branches = nn.ModuleList(Branch(config, path) for path in range(config.num_paths))
        # The gate's scores rank the paths; they do not weight the results.
        self.gather = GatherRouter(weighted=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, s*H, s*W]."""
        config = self.config
        padded_BCHW = at_least(x_BCHW, config.size)
        cells_NCHW, grid = annotate_patches(padded_BCHW, config.size, config.stride)
        residual_NCHW = self.residual(centred(cells_NCHW), grid.cells)
        out_BCHW = enlarge(padded_BCHW, config.scale) + grid.restore(
            residual_NCHW, scale=config.scale
        )
        height, width = config.scale * x_BCHW.shape[2], config.scale * x_BCHW.shape[3]
        return out_BCHW[:, :, :height, :width]

    def residual(self, cells_NCHW: Tensor, cells: Cells | None = None) -> Tensor:
        """Centred patches [N, 3, H, W] -> what bicubic lacks [N, 3, s*H, s*W], each by its path."""
        paths, route = self.scatter(cells_NCHW, self.gate(cells_NCHW), cells)
        return self.gather(each(self.branches, paths), route)


def centred(cells_NCHW: Tensor) -> Tensor:
    """Patches without their mean colour: branches and gate see detail, not brightness."""
    return cells_NCHW - cells_NCHW.mean((2, 3), keepdim=True)


@torch.fx.wrap  # its checks read shapes, which a symbolic trace does not have
def at_least(x_BCHW: Tensor, size: int) -> Tensor:
    """Photos continued to the right and below to ``size`` where smaller; checks what they are."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or 0 in x_BCHW.shape[2:]:
        raise BrtError(
            "PatchSR: photos must be [B, 3, H, W] (red, green, blue), got "
            f"{list(x_BCHW.shape)}; brt_models.photos.read makes three channels of any picture"
        )
    if not x_BCHW.is_floating_point():
        raise BrtError(f"PatchSR: photos must be floats from 0 to 1, got {x_BCHW.dtype}")
    below, right = (max(0, size - extent) for extent in x_BCHW.shape[2:])
    if not below and not right:
        return x_BCHW
    return F.pad(x_BCHW, (0, right, 0, below), mode="replicate")


def macs_per_cell(config: PatchSRConfig) -> tuple[int, ...]:
    """Multiply-adds that each path spends on one patch: counted, not computed, on meta tensors."""
    counts = []
    for path in range(config.num_paths):
        with torch.device("meta"):
            branch, cell = Branch(config, path), torch.empty(1, 3, config.size, config.size)
        with _counted_macs(branch) as count:
            branch(cell)
        counts.append(sum(count))
    return tuple(counts)


@contextmanager
def _counted_macs(module: nn.Module) -> Iterator[list[int]]:
    count: list[int] = []

    def add(conv: nn.Module, args: Any, out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        count.append(conv.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3])

    convs = (child for child in module.modules() if isinstance(child, nn.Conv2d))
    handles = [conv.register_forward_hook(add) for conv in convs]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def save(model: PatchSR, path: Path, recipe: dict[str, Any]) -> None:
    """Write weights with the config that they fit and how they were made, at once or not at all."""
    metadata = {"config": json.dumps(asdict(model.config)), "recipe": json.dumps(recipe)}
    part = path.with_name(path.name + ".part")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part, metadata)
    part.replace(path)


def load(path: Path) -> PatchSR:
    """The model of a file that `save` wrote, in eval mode."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BrtError(f"patch_sr.load: cannot read {path}: {error}") from error
    if "config" not in metadata:
        raise BrtError(f"patch_sr.load: {path} names no config; patch_sr.save writes such files")
    try:
        fields = json.loads(metadata["config"])
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        model = PatchSR(PatchSRConfig(**tuples))
    except (AttributeError, TypeError, ValueError) as error:
        raise BrtError(f"patch_sr.load: {path}: its config does not fit: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BrtError(
            f"patch_sr.load: the weights of {path} do not fit its config: {error}"
        ) from error
    return model.eval()


def pretrained() -> PatchSR:
    """The model with the weights that ship with this package, in eval mode."""
    with resources.as_file(resources.files("brt_models") / WEIGHTS) as path:
        return load(path)
