"""Mixtures of experts of other libraries, run by brt's routers and operators on their own weights.

`brt.adapt(model)` finds them by structure. Nothing here imports the other library, except
`brt_models.adapters.transformers_interface`, which is imported for that.
"""

from brt_models.adapters.offers import ADAPTERS

__all__ = ["ADAPTERS"]
