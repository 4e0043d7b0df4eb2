"""What a Switch Transformer is trained with.

Legend: B sequences, S tokens of the input, T tokens of the output, V words, P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import brt
from brt.protocols import TopK
from brt_models.switch.config import SwitchConfig
from brt_models.switch.network import SwitchTransformer

IGNORED = -100
"""A label that counts for nothing."""


@dataclass(frozen=True, eq=False)
class SwitchLoss:
    """The loss and its parts, one number each.

    Attributes:
        total: what to minimise: words, and the others by the coefficients of the config.
        words: cross-entropy of the words.
        router_z: of all sparse layers together (ST-MoE, arXiv:2202.08906, eq. 5).
        load_balance: of all sparse layers together (arXiv:2101.03961, eq. 4 to 6).
    """

    total: Tensor
    words: Tensor
    router_z: Tensor
    load_balance: Tensor


def loss(
    model: SwitchTransformer, ids_BS: Tensor, labels_BT: Tensor, mask_BS: Tensor | None = None
) -> SwitchLoss:
    """How far the model is from ``labels_BT``, which may hold -100 for words that do not count.

    The decoder is given the labels one place later, behind the start token. Load is counted in
    each sequence, before capacity drops any token.
    """
    config = model.config
    before_BT = labels_BT.roll(1, 1)
    before_BT[:, 0] = config.decoder_start_token_id
    before_BT = before_BT.masked_fill(before_BT == IGNORED, config.pad_token_id)
    logits_BTV, scores = model.with_scores(ids_BS, before_BT, mask_BS)
    words = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
    return with_routers(words, scores, config)


def with_routers(words: Tensor, scores: Sequence[Tensor], config: SwitchConfig) -> SwitchLoss:
    """The loss of words and of the scores [B, S, P] of each sparse layer."""
    router_z = torch.stack([brt.losses.router_z_loss(s_BSP) for s_BSP in scores]).sum()
    load_balance = torch.stack([_load_balance(s_BSP) for s_BSP in scores]).sum()
    total = words + config.router_z_loss_coef * router_z
    total = total + config.router_aux_loss_coef * load_balance
    return SwitchLoss(total, words, router_z, load_balance)


def _load_balance(scores_BSP: Tensor) -> Tensor:
    wished = TopK(1)(scores_BSP.flatten(0, 1), scores_BSP.shape[-1])
    return brt.losses.load_balance(wished, scores_BSP.softmax(-1))
