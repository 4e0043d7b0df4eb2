"""Thresholds that keep to a budget, found on validation data.

Shape letters: K exits, N images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models.exits import ExitNetwork

NEVER = 2.0
"""A threshold that no softmax reaches."""
ALWAYS = 0.0
RATIOS = tuple(step / 20 for step in range(1, 41))
"""Of the share of images that leave at an exit to the share at the one before, as published."""


@torch.inference_mode()
def exits_of(model: ExitNetwork, batches: Iterable[Tensor]) -> Tensor:
    """The logits [K, N, C] that every exit gives every image of some batches, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([torch.stack(model.all_exits(x_NCHW)) for x_NCHW in batches], 1)
    finally:
        model.train(was_training)


def thresholds_for_shares(share_K: Sequence[float], logits_KNC: Tensor) -> tuple[float, ...]:
    """Thresholds, one for each exit but the last, that let these shares of the images leave there.

    From the first exit on, the surest of the images that are still there leave, rounded down to
    whole images. A threshold lies halfway between the last that leaves and the first that stays,
    so that rounding moves nobody. Images of equal confidence leave together.

    Raises `BrtError` where shares are negative or do not fit the exits.
    """
    _check(logits_KNC)
    num_exits, num_images, _ = logits_KNC.shape
    if len(share_K) != num_exits or min(share_K) < 0 or sum(share_K) <= 0:
        raise BrtError(
            f"thresholds_for_shares: shares must be {num_exits} numbers from 0, got {share_K}"
        )
    sure_KN = logits_KNC.double().softmax(2).amax(2)
    is_left_N = torch.ones(num_images, dtype=torch.bool, device=logits_KNC.device)
    thresholds = []
    for share, sure_N in zip(share_K[:-1], sure_KN, strict=False):
        sorted_N = sure_N[is_left_N].sort(descending=True).values
        # A little more, or 0.3 * 10 images would be 2
        num_out = min(int(num_images * share / sum(share_K) + 1e-6), len(sorted_N))
        threshold = _between(sorted_N.tolist(), num_out)
        thresholds.append(threshold)
        is_left_N &= sure_N < threshold
    return tuple(thresholds)


def thresholds_for(
    budget: float, logits_KNC: Tensor, cost_K: Sequence[float], num_halvings: int = 20
) -> tuple[float, ...]:
    """Thresholds, one for each exit but the last, with which images cost ``budget`` on average.

    The share of images that leaves at exit k is proportional to the k-th power of a ratio; the
    largest ratio is taken whose cost on these images is within the budget: the published ones are
    tried, and the gap above the best of them is halved.

    Args:
        budget: mean cost of an image, in the unit of ``cost_K``.
        logits_KNC: of validation images at every exit, from `exits_of`.
        cost_K: of an image that leaves at each exit, with all that it went through before:
            ``model.macs_K(images)``.
        num_halvings: steps of the search behind the published ratios.

    Raises `BrtError` where the budget is less than the first exit's cost.

    Source: Huang et al., ICLR 2018, section 3 (budgeted batch classification).
    """
    _check(logits_KNC)
    cost_K = [float(cost) for cost in cost_K]
    if len(cost_K) != len(logits_KNC) or any(a >= b for a, b in pairwise(cost_K)):
        raise BrtError(f"thresholds_for: {len(logits_KNC)} rising costs are needed, got {cost_K}")
    if budget < cost_K[0]:
        raise BrtError(
            f"thresholds_for: a budget of {budget:g} is less than the first exit costs, "
            f"{cost_K[0]:g}"
        )
    if budget >= cost_K[-1]:
        return (NEVER,) * (len(cost_K) - 1)

    def within(ratio: float) -> tuple[float, ...] | None:
        share_K = [ratio**k for k in range(len(cost_K))]
        found = thresholds_for_shares(share_K, logits_KNC)
        return found if mean_cost(found, logits_KNC, cost_K) <= budget else None

    best, low, high = (ALWAYS,) * (len(cost_K) - 1), 0.0, 100.0
    for ratio in RATIOS:
        found = within(ratio)
        if found is None:
            high = ratio
            break
        best, low = found, ratio
    for _ in range(num_halvings):
        middle = (low + high) / 2
        found = within(middle)
        best, low, high = (best, low, middle) if found is None else (found, middle, high)
    return best


def mean_cost(thresholds: Sequence[float], logits_KNC: Tensor, cost_K: Sequence[float]) -> float:
    """What an image costs on average that leaves by these thresholds."""
    exit_N = taken_exits(thresholds, logits_KNC)
    return float(torch.tensor(cost_K, dtype=torch.float64)[exit_N.cpu()].mean())


def taken_exits(thresholds: Sequence[float], logits_KNC: Tensor) -> Tensor:
    """The exit [N] at which each image leaves by these thresholds."""
    sure_KN = logits_KNC.double().softmax(2).amax(2)
    wanted_K1 = sure_KN.new_tensor([*thresholds, ALWAYS])[:, None]
    return (sure_KN >= wanted_K1).int().argmax(0)


def _between(sorted_M: Sequence[float], num_out: int) -> float:
    """Between the num_out-th of descending numbers and the next one that is less."""
    if not sorted_M or num_out == 0:
        return NEVER
    last = sorted_M[num_out - 1]
    return (last + next((s for s in sorted_M[num_out:] if s < last), ALWAYS)) / 2


def _check(logits_KNC: Tensor) -> None:
    if logits_KNC.ndim != 3 or 0 in logits_KNC.shape:
        raise BrtError(
            "thresholds need the logits [K, N, C] of every exit for at least one image "
            f"(msdnet.exits_of), got {list(logits_KNC.shape)}"
        )
