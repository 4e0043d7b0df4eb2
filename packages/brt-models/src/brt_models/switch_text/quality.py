"""How well a byte model predicts a text.

Legend: S bytes of the text, B windows, T bytes of one, V byte values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.errors import BrtError
from brt_models.switch_text.network import SwitchText


@torch.inference_mode()
def bits_per_byte(model: SwitchText, ids_S: Tensor, window: int = 256, batch: int = 16) -> float:
    """Mean bits that the model takes for a byte of a text, in eval mode; the first is given.

    Windows overlap by half, and count their second half: a byte has half a window before it, but
    at the start of the text.
    """
    if len(ids_S) < 2 or window < 2:
        raise BrtError(
            f"bits_per_byte: a text and a window need two bytes; got {len(ids_S)} and {window}"
        )
    half = window // 2
    starts = range(0, max(1, len(ids_S) - 1 - window + half), half)
    was_training = model.training
    model.eval()
    bits = 0.0
    try:
        for first in range(0, len(starts), batch):
            some = starts[first : first + batch]
            # The last window may be shorter than the others
            groups = [[s for s in some if s + window < len(ids_S)]]
            groups += [[s] for s in some if s + window >= len(ids_S)]
            for group in filter(None, groups):
                given_BT = torch.stack([ids_S[s : s + window + 1] for s in group])
                logits_BTV = model(given_BT[:, :-1])
                nats_BT = F.cross_entropy(
                    logits_BTV.transpose(1, 2), given_BT[:, 1:], reduction="none"
                ).double()
                bits += sum(
                    float(nats_T[half if start else 0 :].sum())
                    for start, nats_T in zip(group, nats_BT, strict=True)
                )
    finally:
        model.train(was_training)
    return bits / (len(ids_S) - 1) / math.log(2)
