"""Switch Transformer: a T5 whose every other feed-forward layer is a mixture of experts.

Each token goes to the one expert that its gate likes best, while that has room in the token's
sequence; a token beyond the capacity gets nothing from the layer, and its residual passes.

Fedus et al. 2021, arXiv:2101.03961, on T5 (Raffel et al. 2019, arXiv:1910.10683).
"""

from brt_models.switch.config import BASE_EXPERTS, SwitchConfig
from brt_models.switch.files import load, read_config, save
from brt_models.switch.network import SwitchTransformer, narrow, sample
from brt_models.switch.sparse import SparseMLP
from brt_models.switch.training import SwitchLoss, loss

__all__ = [
    "BASE_EXPERTS",
    "SparseMLP",
    "SwitchConfig",
    "SwitchLoss",
    "SwitchTransformer",
    "load",
    "loss",
    "narrow",
    "read_config",
    "sample",
    "save",
]
