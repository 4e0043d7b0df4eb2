"""Auxiliary losses of routed training, one number each, to be scaled and added by the caller.

N cells, P paths, G groups of S cells (N = G * S). All are computed in float32 or better.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import at_least, in_float32


class Routed(Protocol):
    """What a route is here: it tells the decision that it carried out."""

    def decision(self) -> Decision:
        """Return the decision as carried out, without what capacity dropped."""


def load_balance(
    routed: Decision | Routed,
    probs: Tensor,
    *,
    first_choice_only: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """Return P times the sum over paths of f (share of the choices) times m (mean probability).

    Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, eq. 4 to 6, without the factor alpha;
    Lepikhin et al. 2020, GShard, arXiv:2006.16668, section 2.2, which counts first choices only
    and divides by P squared. It is 1 where load or probabilities are even, for any k, at most P,
    and 0 where nothing is routed. Differentiable in ``probs``; f is a count.

    ``probs`` are probabilities (a softmax over paths) ``[N, P]``. For the mean of a loss of each
    group give ``[G, S, P]`` or ``group_size``. A decision counts choices before capacity drops any,
    as in the papers; a route after.
    """
    decision = routed if isinstance(routed, Decision) else routed.decision()
    probs_GSP = _grouped(probs, group_size)
    num_groups, num_in_group, num_paths = probs_GSP.shape
    mask_NP = _first_choices(decision) if first_choice_only else decision.to_mask().mask_NP
    assert mask_NP is not None
    _check_same(mask_NP, probs_GSP.flatten(0, 1))
    load_GP = mask_NP.view(num_groups, num_in_group, num_paths).sum(dim=1).to(probs_GSP.dtype)
    share_GP = load_GP / load_GP.sum(dim=1, keepdim=True).clamp_min(1)
    mean_GP = probs_GSP.sum(dim=1) / at_least(num_in_group, 1)
    return num_paths * (share_GP * mean_GP).sum() / at_least(num_groups, 1)


def importance(gates: Decision | Tensor) -> Tensor:
    """Return the squared coefficient of variation of the paths' importances.

    The importance of a path is the sum of its weights over all cells: Shazeer et al. 2017,
    arXiv:1701.06538, eq. 6 and 7, without the factor w. Zero where they are even, at most P - 1.
    The variance is that of all P, divided by P. ``gates`` is a decision (None as its weights counts
    choices) or its weights as a dense ``[N, P]``, zero where a cell takes no path. Differentiable
    in the weights.
    """
    if isinstance(gates, Decision):
        masked = gates.to_mask()
        assert masked.mask_NP is not None
        if masked.weight is None:
            gates = masked.mask_NP.float()
        else:
            gates = torch.where(masked.mask_NP, masked.weight, 0)
    if gates.ndim != 2 or not gates.is_floating_point():
        raise ProtocolError(
            f"importance: gates must be a Decision or floats [N, P], "
            f"got {gates.dtype} of shape {tuple(gates.shape)}"
        )
    importance_P = in_float32(gates).sum(dim=0)
    mean = importance_P.mean()
    # No cell, or none routed: even
    square = (mean * mean).clamp_min(torch.finfo(mean.dtype).tiny)
    return importance_P.var(correction=0) / square


def router_z_loss(scores: Tensor) -> Tensor:
    """Return the mean over cells of the squared log-sum-exp of their scores.

    Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5, without the factor c_z. ``scores`` are logits
    ``[..., P]``. Keeps them small; differentiable in them.
    """
    if scores.ndim < 2 or not scores.is_floating_point():
        raise ProtocolError(
            f"router_z_loss: scores must be float logits [N, P], "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    log_sum_N = torch.logsumexp(in_float32(scores).flatten(0, -2), dim=-1)
    return log_sum_N.square().sum() / at_least(log_sum_N.shape[0], 1)


def _grouped(probs: Tensor, group_size: int | None) -> Tensor:
    """Return probabilities as ``[G, S, P]``."""
    if probs.ndim not in (2, 3) or not probs.is_floating_point():
        raise ProtocolError(
            f"load_balance: probs must be floats [N, P] or [G, S, P], "
            f"got {probs.dtype} of shape {tuple(probs.shape)}"
        )
    probs = in_float32(probs)
    if group_size is None:
        return probs if probs.ndim == 3 else probs.unsqueeze(0)
    probs_NP = probs.flatten(0, -2)
    if group_size < 1 or probs_NP.shape[0] % group_size != 0:
        raise ProtocolError(
            f"load_balance: {probs_NP.shape[0]} cells are not groups of group_size={group_size}"
        )
    return probs_NP.view(-1, group_size, probs_NP.shape[1])


def _first_choices(decision: Decision) -> Tensor:
    if decision.choice_NK is None:
        raise ProtocolError(
            "load_balance: first_choice_only needs a decision with choice_NK; a mask, a route and "
            "expert choice have no first choice"
        )
    path_P = torch.arange(decision.num_paths, device=decision.choice_NK.device)
    return decision.choice_NK[:, :1] == path_P


def _check_same(mask_NP: Tensor, probs_NP: Tensor) -> None:
    if mask_NP.shape != probs_NP.shape:
        raise ProtocolError(
            f"load_balance: the decision is about {mask_NP.shape[0]} cells and {mask_NP.shape[1]} "
            f"paths, the probabilities about {probs_NP.shape[0]} and {probs_NP.shape[1]}"
        )
    if mask_NP.device != probs_NP.device:
        raise ProtocolError(
            f"load_balance: the decision is on {mask_NP.device}, the probabilities on "
            f"{probs_NP.device}; move one of them"
        )
