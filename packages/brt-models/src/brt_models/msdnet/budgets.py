"""What a network with exits reaches at a budget: thresholds from one set, accuracy on another.

Shape letters: K exits, N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brt_models.digits import Digits
from brt_models.exits import ExitNetwork
from brt_models.msdnet.thresholds import exits_of, thresholds_for


@dataclass(frozen=True)
class Point:
    """A budget and what came of it.

    Attributes:
        budget: mean multiply-adds of an image that thresholds were searched for, as a share of
            those of the whole network.
        thresholds: of each exit but the last.
        accuracy: share of the test images that are recognised.
        macs: mean multiply-adds of a test image.
        left_K: test images that left at each exit.
    """

    budget: float
    thresholds: tuple[float, ...]
    accuracy: float
    macs: float
    left_K: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Taken:
    """The exit [N] that each image took, and the logits [N, C] that it left with."""

    exit_N: Tensor
    logits_NC: Tensor


def at_budgets(
    model: ExitNetwork, budgets: Sequence[float], validation: Digits, test: Digits
) -> list[Point]:
    """Search thresholds on the validation images for each budget; run the test images by them.

    The model's own thresholds stay.
    """
    cost_K = model.macs_K(test.images)
    logits_KNC = exits_of(model, [validation.images])
    kept = model.thresholds
    points = []
    try:
        for budget in budgets:
            model.set_thresholds(thresholds_for(budget * cost_K[-1], logits_KNC, cost_K))
            taken = run(model, test.images)
            left_K = torch.bincount(taken.exit_N, minlength=len(cost_K)).tolist()
            spent = sum(left * cost for left, cost in zip(left_K, cost_K, strict=True))
            points.append(
                Point(
                    budget=budget,
                    thresholds=model.thresholds,
                    accuracy=accuracy(taken.logits_NC, test.labels),
                    macs=spent / len(test.labels),
                    left_K=tuple(left_K),
                )
            )
    finally:
        model.set_thresholds(kept)
    return points


@torch.inference_mode()
def run(model: ExitNetwork, images_NCHW: Tensor) -> Taken:
    """Let every image leave where the model lets it; which exit that was, and its logits."""
    exit_N = torch.full((len(images_NCHW),), model.num_exits - 1)
    logits_NC, where = model.with_exits(images_NCHW)
    for exit_idx, cells in enumerate(where):
        exit_N[cells.index_R(exit_N.device)] = exit_idx
    return Taken(exit_N, logits_NC)


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """The share of images whose likeliest class is right."""
    return float((logits_NC.argmax(1) == labels_N).double().mean())
