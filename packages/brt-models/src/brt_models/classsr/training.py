"""The published losses of ClassSR (section 3.3), as the authors' code scales them.

Shape letters: N patches, P paths (classes).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from torch import Tensor
from torch.nn import functional as F

from brt.errors import BrtError
from brt_models.classsr.network import ClassSR

CLASS_WEIGHT = 0.5
AVERAGE_WEIGHT = 3.0
PIXEL_WEIGHT = 1000.0
"""For pixels of 0 to 1."""


@dataclass(frozen=True)
class Losses:
    """What training minimises: ``total``, and its three parts before they are weighted."""

    total: Tensor
    pixel: Tensor
    classes: Tensor
    average: Tensor


def class_loss(probs_NP: Tensor) -> Tensor:
    """How far the probabilities of patches are from saying one class: 0 where all are sure."""
    num_paths = probs_NP.shape[1]
    apart = [(probs_NP[:, i] - probs_NP[:, j]).abs() for i, j in combinations(range(num_paths), 2)]
    return num_paths - 1 - sum(apart, probs_NP.new_zeros(())).mean()


def average_loss(probs_NP: Tensor) -> Tensor:
    """How unevenly classes share the patches: 0 where evenly, 1 where one has them all."""
    num_patches, num_paths = probs_NP.shape
    even = num_patches / num_paths
    return (probs_NP.sum(0) - even).abs().sum() / (even * 2 * (num_paths - 1))


def loss(model: ClassSR, x_BCHW: Tensor, wanted_BCHW: Tensor) -> Losses:
    """The losses of a model in training mode: photos [B, 3, H, W], wanted [B, 3, 4*H, 4*W].

    The authors weight errors of bytes, as RCAN's are, by 4 (near 1000 / 255).
    """
    if not model.training:
        raise BrtError("classsr.loss: the model must be in training mode: model.train()")
    out_BCHW, probs_NP = model(x_BCHW)
    if out_BCHW.shape != wanted_BCHW.shape:
        raise BrtError(
            f"classsr.loss: for photos {list(x_BCHW.shape)} the wanted ones must be "
            f"{list(out_BCHW.shape)}, got {list(wanted_BCHW.shape)}"
        )
    pixel, classes = F.l1_loss(out_BCHW, wanted_BCHW), class_loss(probs_NP)
    average = average_loss(probs_NP)
    total = PIXEL_WEIGHT * pixel + CLASS_WEIGHT * classes + AVERAGE_WEIGHT * average
    return Losses(total, pixel, classes, average)
