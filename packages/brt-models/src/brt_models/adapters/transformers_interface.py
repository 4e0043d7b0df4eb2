"""brt as an experts implementation of transformers; importing this registers it.

``from_pretrained(..., experts_implementation="brt")`` and
``model.set_experts_implementation("brt")`` then run every mixture that transformers lets choose.

Legend: N tokens, K choices per token, D features.
"""

from __future__ import annotations

from torch import Tensor, nn

import brt
from brt_models.adapters.stacked import layout_of, run_experts

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise brt.BrtError(
        "brt_models.adapters.transformers_interface needs transformers 5 or newer: "
        f"pip install 'brt-models[transformers]' ({error})"
    ) from error

NAME = "brt"


def brt_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Tokens ``[N, D]``, their experts ``[N, K]`` and weights of these -> ``[N, D]``."""
    router = self.__dict__.get("_brt_interface_router")
    if router is None:
        # Not a child: `brt.adapt` makes those, and profiles look for them
        router = brt.ExpertRouter(layout_of(self).num_paths)
        self.__dict__["_brt_interface_router"] = router
    return run_experts(self, router, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, brt_experts_forward)
