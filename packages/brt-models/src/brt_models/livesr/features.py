"""ResNet-18 without its classifier, and the nearest of the centres that k-means found.

Shape letters: N patches, P paths (centres), F features, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_FEATURES = 512
_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way past them."""

    def __init__(self, taken: int, given: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(taken, given, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(given)
        self.conv2 = nn.Conv2d(given, given, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(given)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or taken != given:
            self.downsample = nn.Sequential(
                nn.Conv2d(taken, given, 1, stride, bias=False), nn.BatchNorm2d(given)
            )

    def forward(self, x_NFHW: Tensor) -> Tensor:
        """[N, F, H, W] -> [N, F', H / stride, W / stride]."""
        out = self.bn1(self.conv1(x_NFHW)).relu()
        return (self.bn2(self.conv2(out)) + self.downsample(x_NFHW)).relu()


class ResNet18(nn.Module):
    """What torchvision's ``resnet18`` gives behind ``avgpool``, layers named as there.

    Source: He et al., CVPR 2016, table 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        taken = _WIDTHS[0]
        for stage, given in enumerate(_WIDTHS, 1):
            first = BasicBlock(taken, given, 1 if stage == 1 else 2)
            self.add_module(f"layer{stage}", nn.Sequential(first, BasicBlock(given, given, 1)))
            taken = given
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 512]."""
        x_NFHW = self.maxpool(self.bn1(self.conv1(x_NCHW)).relu())
        for stage in range(1, len(_WIDTHS) + 1):
            x_NFHW = self.get_submodule(f"layer{stage}")(x_NFHW)
        return x_NFHW.mean((2, 3))


class Classifier(nn.Module):
    """How near each centre is: [N, 3, H, W] -> scores [N, P]. Nothing in it is trained.

    A score is the squared distance, negated: it ranks centres as one over the distance does, and
    is finite where a patch is a centre itself.
    """

    centres_PF: Tensor

    def __init__(self, num_paths: int) -> None:
        super().__init__()
        self.resnet = ResNet18().requires_grad_(False)
        self.register_buffer("centres_PF", torch.rand(num_paths, NUM_FEATURES))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]."""
        x_NF = self.resnet(x_NCHW)
        return -(x_NF[:, None] - self.centres_PF).square().sum(2)

    def train(self, mode: bool = True) -> Classifier:
        """It stays in eval mode: its features must not move away from the centres."""
        return super().train(False)
