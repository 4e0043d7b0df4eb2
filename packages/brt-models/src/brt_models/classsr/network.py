"""The network: a classifier of patches, a branch for each class, and the routers between them.

Shape letters: B photos, N patches (cells), P paths, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from brt import PatchGrid
from brt_models.classsr.branches import SLOPE, branch, init_weights
from brt_models.classsr.config import SCALE, ClassSRConfig
from brt_models.patches import PatchNetwork, photo


class Classifier(nn.Module):
    """How hard a patch is: [N, 3, H, W], values 0 to 1 -> logits [N, P]."""

    def __init__(self, num_paths: int) -> None:
        super().__init__()
        self.lastOut = nn.Linear(32, num_paths)
        layers: list[nn.Module] = [nn.Conv2d(3, 128, 4, stride=4), nn.LeakyReLU(SLOPE)]
        for _ in range(3):
            layers += [nn.Conv2d(128, 128, 1), nn.LeakyReLU(SLOPE)]
        self.CondNet = nn.Sequential(*layers, nn.Conv2d(128, 32, 1))
        init_weights(self.CondNet)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, P]."""
        return self.lastOut(self.CondNet(x_NCHW).mean((2, 3)))


class ClassSR(PatchNetwork):
    """Photos [B, 3, H, W], values 0 to 1 -> [B, 3, 4*H, 4*W].

    In training mode every patch takes all branches, weighted by the probabilities of its classes,
    and the result is (photos, probabilities [N, P]); `classsr.loss` takes both. Branches without
    a parameter to train stay in eval mode: the published recipe trains them first, each on its
    own patches, and then the classifier alone (`freeze_branches`).
    """

    def __init__(self, config: ClassSRConfig | None = None) -> None:
        config = config or ClassSRConfig()
        super().__init__(config.num_paths, config.size, config.stride, SCALE)
        self.config = config
        self.classifier = Classifier(config.num_paths)
        for path in range(config.num_paths):
            self.add_module(f"net{path + 1}", branch(config, path))

    @property
    def paths(self) -> Sequence[nn.Module]:
        """The branches ``net1``, ``net2``, ..."""
        return [self.get_submodule(f"net{path + 1}") for path in range(self.config.num_paths)]

    def scores(self, cells_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] in the branches' range -> logits of the classes [N, P]."""
        return self.classifier(cells_NCHW / self.config.white)

    def cut(self, x_BCHW: Tensor) -> tuple[Tensor, PatchGrid]:
        """Patches [N, 3, H, W] in the branches' range, and how to put them back."""
        cells_NCHW, grid = super().cut(x_BCHW)
        return cells_NCHW * self.config.white, grid

    def join(self, rows_NCHW: Tensor, grid: PatchGrid, x_BCHW: Tensor) -> Tensor:
        """What branches gave -> [B, 3, 4*H, 4*W], values 0 to 1; overlaps are averaged."""
        return super().join(rows_NCHW / self.config.white, grid, x_BCHW)

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> [B, 3, 4*H, 4*W]; with the probabilities [N, P] in training."""
        if not self.training:
            return super().forward(x_BCHW)
        cells_NCHW, grid = self.cut(x_BCHW)
        probs_NP = self.scores(cells_NCHW).softmax(1)
        first, *others = (
            probs_NP[:, path, None, None, None] * net(cells_NCHW)
            for path, net in enumerate(self.paths)
        )
        return self.join(sum(others, first), grid, x_BCHW), probs_NP

    def freeze_branches(self) -> None:
        """Train nothing but the classifier from here on."""
        for net in self.paths:
            net.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ClassSR:
        """As always, but for frozen branches, whose batch normalisation stays as it is."""
        super().train(mode)
        for net in self.paths:
            if not any(p.requires_grad for p in net.parameters()):
                net.eval()
        return self


def small() -> ClassSR:
    """The published network of FSRCNN branches, with random weights, in eval mode."""
    return ClassSR().eval()


def sample(seed: int = 0) -> tuple[Tensor]:
    """A made-up photo [1, 3, 96, 128]."""
    return photo(seed)
