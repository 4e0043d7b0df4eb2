"""LayerSkip: a Llama whose tokens leave at the layer that is sure, or draft words for the others.

One head reads every layer. A word is written by the first layer that is sure of it, by a loop over
the layers (`LayerSkip.generate`); or the first layers draft some words and the others verify them
all at once (`speculate`), which gives the words of the whole model. Weights are those of a Llama.

Elhoushi et al., LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, ACL 2024.
"""

from brt_models.layerskip.config import LayerSkipConfig
from brt_models.layerskip.files import load, save
from brt_models.layerskip.network import LayerSkip, sample, small
from brt_models.layerskip.speculation import Speculated, speculate
from brt_models.layerskip.training import Curriculum, loss

__all__ = [
    "Curriculum",
    "LayerSkip",
    "LayerSkipConfig",
    "Speculated",
    "load",
    "loss",
    "sample",
    "save",
    "small",
    "speculate",
]
