"""Self-speculative decoding: the first layers draft, the others verify.

Legend: B sequences, S tokens of one, N drafted words, D features, T places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models.layerskip.layers import Cache
from brt_models.layerskip.network import LayerSkip


@dataclass(frozen=True)
class Speculated:
    """What `speculate` wrote.

    Attributes:
        ids_BS: the tokens given and the new ones.
        num_rounds: times that the first layers drafted and the others verified.
        num_drafted, num_accepted: words of all sequences, those past the end included.
    """

    ids_BS: Tensor
    num_rounds: int
    num_drafted: int
    num_accepted: int


@torch.no_grad()
def speculate(
    model: LayerSkip,
    ids_BS: Tensor,
    max_new_tokens: int = 20,
    *,
    exit_layer: int,
    num_drafts: int = 4,
) -> Speculated:
    """The likeliest words of the whole model, as greedy decoding writes them, in fewer runs of it.

    The first ``exit_layer`` layers draft ``num_drafts`` words after one another. The other layers
    then take all of them at once, from the features that the draft left; drafts are kept up to the
    first that the whole model would not have written, in whose place its own word comes. Both share
    one cache. Sequences go on at their own pace.

    Source: LayerSkip (ACL 2024), section 4.3.
    """
    num_layers = model.config.num_hidden_layers
    if not 0 < exit_layer < num_layers or num_drafts < 1:
        raise BrtError(
            f"speculate: exit_layer must be from 1 to below {num_layers} and num_drafts at least "
            f"1, got {exit_layer} and {num_drafts}"
        )
    cache = model.read_prompt(ids_BS, max_new_tokens, num_drafts)
    num_given = ids_BS.shape[1]
    end = num_given + max_new_tokens
    room_BT = ids_BS.new_zeros(len(ids_BS), max_new_tokens + num_drafts)
    ids_BT = torch.cat([ids_BS, room_BT], 1)
    last_B = torch.full((len(ids_BS),), num_given - 1, device=ids_BS.device)  # not yet read
    num_rounds = num_drafted = num_accepted = 0
    while len(ids_BS) and int(last_B.min()) + 1 < end:
        going_B = last_B + 1 < end
        # Sequences at the end go along; what they write is dropped
        last_B = last_B.clamp(max=end - 1)
        drafts_BN, wanted_BN = _round(model, cache, ids_BT, last_B, exit_layer, num_drafts)
        same_BN = (drafts_BN == wanted_BN).long().cumprod(1)
        accepted_B = same_BN.sum(1)
        place_BN = last_B[:, None] + 1 + torch.arange(num_drafts, device=ids_BS.device)
        # Up to the first that differs, the whole model's words are the drafts; behind, they are
        # written over before anything reads them
        written_BT = ids_BT.scatter(1, place_BN, wanted_BN)
        ids_BT = torch.where(going_B[:, None], written_BT, ids_BT)
        last_B = torch.where(going_B, last_B + (accepted_B + 1).clamp(max=num_drafts), last_B)
        num_rounds += 1
        num_drafted += num_drafts * int(going_B.sum())
        num_accepted += int(accepted_B[going_B].sum())
    return Speculated(ids_BT[:, :end], num_rounds, num_drafted, num_accepted)


def _round(
    model: LayerSkip, cache: Cache, ids_BT: Tensor, last_B: Tensor, exit_layer: int, num_drafts: int
) -> tuple[Tensor, Tensor]:
    """(the words that the first layers draft, those that the whole model writes there), [B, N]."""
    word_B1 = ids_BT.gather(1, last_B[:, None])
    drafts, features = [], []
    for step in range(num_drafts):
        x_B1D = model.model.embed_tokens(word_B1)
        x_B1D = model.run(x_B1D, 0, exit_layer, (last_B + step)[:, None], cache)
        word_B1 = model.head(x_B1D).argmax(-1)
        drafts.append(word_B1)
        features.append(x_B1D)
    position_BN = last_B[:, None] + torch.arange(num_drafts, device=last_B.device)
    x_BND = model.run(torch.cat(features, 1), exit_layer, None, position_BN, cache)
    return torch.cat(drafts, 1), model.head(x_BND).argmax(-1)
