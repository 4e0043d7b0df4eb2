"""The branches: small networks that enlarge patches fourfold, layers named as the authors do.

Shape letters: N patches, F features, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt_models.classsr.config import CARN_GROUPS, RCAN_REDUCTION, SCALE, ClassSRConfig
from brt_models.patches import PixelShuffle

FSRCNN_INNER = 12
SLOPE = 0.1
_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


def branch(config: ClassSRConfig, path: int) -> nn.Module:
    """The sub-network of a path: [N, 3, H, W] -> [N, 3, 4*H, 4*W]."""
    channels = config.channels[path]
    make: dict[str, Callable[[], nn.Module]] = {
        "fsrcnn": lambda: FSRCNN(channels, config.depth),
        "carn": lambda: CARN(channels),
        "srresnet": lambda: SRResNet(channels, config.depth),
        "rcan": lambda: RCAN(channels, config.groups, config.depth),
    }
    return make[config.kind]()


def init_weights(module: nn.Module) -> None:
    """He's initialisation, a tenth of it, and no bias: as the authors start all but CARN."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, MeanShift):
            nn.init.kaiming_normal_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def conv(taken: int, given: int, size: int = 3, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(taken, given, size, padding=size // 2, groups=groups)


class MeanShift(nn.Conv2d):
    """Takes the mean colour of DIV2K away, or adds it again; it is not trained."""

    def __init__(self, sign: int) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            assert self.bias is not None
            self.bias.copy_(sign * torch.tensor(_DIV2K_MEAN))
        self.requires_grad_(False)


class FSRCNN(nn.Module):
    """Dong et al., ECCV 2016: features narrowed, mapped, widened, and one deconvolution."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        inner = FSRCNN_INNER
        self.head_conv = nn.Sequential(conv(3, channels, 5), nn.PReLU())
        self.body_conv = nn.Sequential(
            nn.Sequential(conv(channels, inner, 1), nn.PReLU()),
            *(conv(inner, inner) for _ in range(depth)),
            nn.PReLU(),
            nn.Sequential(conv(inner, channels, 1), nn.PReLU()),
        )
        self.tail_conv = nn.ConvTranspose2d(channels, 3, 9, SCALE, padding=3, output_padding=1)
        init_weights(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, 4*H, 4*W]."""
        return self.tail_conv(self.body_conv(self.head_conv(x_NCHW)))


class ResidualBlock(nn.Module):
    """Two convolutions whose result is added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return x_NFHW + self.conv2(F.relu(self.conv1(x_NFHW)))


class SRResNet(nn.Module):
    """Ledig et al., CVPR 2017, without normalisation: what bilinear enlarging lacks."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.conv_first = conv(3, channels)
        self.recon_trunk = nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))
        self.upconv1, self.upconv2 = conv(channels, 4 * channels), conv(channels, 4 * channels)
        self.pixel_shuffle = PixelShuffle(2)
        self.HRconv, self.conv_last = conv(channels, channels), conv(channels, 3)
        init_weights(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, 4*H, 4*W]."""
        x_NFHW = self.recon_trunk(F.leaky_relu(self.conv_first(x_NCHW), SLOPE))
        x_NFHW = F.leaky_relu(self.pixel_shuffle(self.upconv1(x_NFHW)), SLOPE)
        x_NFHW = F.leaky_relu(self.pixel_shuffle(self.upconv2(x_NFHW)), SLOPE)
        out_NCHW = self.conv_last(F.leaky_relu(self.HRconv(x_NFHW), SLOPE))
        return out_NCHW + F.interpolate(
            x_NCHW, scale_factor=SCALE, mode="bilinear", align_corners=False
        )


class Cascade(nn.Module):
    """Three steps, each fed by a 1x1 convolution of the input and all steps before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (_joined(n * channels, channels) for n in (2, 3, 4))

    def cascade(self, x_NFHW: Tensor, steps: tuple[nn.Module, ...]) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        last = seen = x_NFHW
        for step, join in zip(steps, (self.c1, self.c2, self.c3), strict=True):
            seen = torch.cat([seen, step(last)], 1)
            last = join(seen)
        return last


def _joined(taken: int, given: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(taken, given, 1, bias=False), nn.BatchNorm2d(given), nn.ReLU())


class EfficientBlock(nn.Module):
    """Two grouped convolutions and a 1x1 one, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(channels, channels, groups=CARN_GROUPS),
            nn.ReLU(),
            conv(channels, channels, groups=CARN_GROUPS),
            nn.ReLU(),
            conv(channels, channels, 1),
        )

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return F.relu(self.body(x_NFHW) + x_NFHW)


class CascadeBlock(Cascade):
    """A cascade of one block, used three times."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.b1 = EfficientBlock(channels)

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return self.cascade(x_NFHW, (self.b1, self.b1, self.b1))


class Grower(nn.Module):
    """Grouped convolutions and shuffles, each of which doubles the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(SCALE.bit_length() - 1):
            layers += [conv(channels, 4 * channels, groups=CARN_GROUPS), nn.ReLU(), PixelShuffle(2)]
        self.up = nn.ModuleDict({"body": nn.Sequential(*layers)})

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> [N, F, 4*H, 4*W]."""
        return self.up["body"](x_NFHW)


class CARN(Cascade):
    """Ahn et al., ECCV 2018, the mobile one: a cascade of cascades."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.entry = conv(3, channels)
        self.b1, self.b2, self.b3 = (CascadeBlock(channels) for _ in range(3))
        self.upsample = Grower(channels)
        self.exit = conv(channels, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, 4*H, 4*W]."""
        x_NFHW = self.entry(self.sub_mean(x_NCHW))
        x_NFHW = self.cascade(x_NFHW, (self.b1, self.b2, self.b3))
        return self.add_mean(self.exit(self.upsample(x_NFHW)))


class ChannelAttention(nn.Module):
    """Features weighted by what their means over the patch say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        fewer = channels // RCAN_REDUCTION
        self.conv_du = nn.Sequential(
            conv(channels, fewer, 1), nn.ReLU(), conv(fewer, channels, 1), nn.Sigmoid()
        )

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return x_NFHW * self.conv_du(x_NFHW.mean((2, 3), keepdim=True))


class Residual(nn.Module):
    """A chain of layers whose result is added to the input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> the same shape."""
        return self.body(x_NFHW) + x_NFHW


def _attending(channels: int) -> Residual:
    same = channels, channels
    return Residual(conv(*same), nn.ReLU(), conv(*same), ChannelAttention(channels))


class RCAN(nn.Module):
    """Zhang et al., ECCV 2018: groups of residual blocks with channel attention."""

    def __init__(self, channels: int, groups: int, depth: int) -> None:
        super().__init__()
        same, grown = (channels, channels), (channels, 4 * channels)
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.head = nn.Sequential(conv(3, channels))
        self.body = nn.Sequential(
            *(
                Residual(*(_attending(channels) for _ in range(depth)), conv(*same))
                for _ in range(groups)
            ),
            conv(*same),
        )
        up = [conv(*grown), PixelShuffle(2), conv(*grown), PixelShuffle(2)]
        self.tail = nn.Sequential(nn.Sequential(*up), conv(channels, 3))
        init_weights(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, 4*H, 4*W]."""
        x_NFHW = self.head(self.sub_mean(x_NCHW))
        return self.add_mean(self.tail(self.body(x_NFHW) + x_NFHW))
