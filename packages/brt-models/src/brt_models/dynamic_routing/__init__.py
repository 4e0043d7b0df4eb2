"""Dynamic routing for semantic segmentation: each image finds its own way through the scales.

Cells of 16 layers stand on a lattice of layers and scales. A cell's gate decides, for each image,
whether the result stays at its scale, goes to the finer or the coarser one, to several, or whether
the cell is skipped.

Li et al., CVPR 2020. Layers are named as in the authors' code, so that its checkpoints load.
"""

from brt_models.dynamic_routing.cell import Cell
from brt_models.dynamic_routing.checkpoint import load_checkpoint, save_checkpoint
from brt_models.dynamic_routing.config import DynamicRoutingConfig
from brt_models.dynamic_routing.network import (
    Backbone,
    DynamicRouting,
    Head,
    budget_loss,
    sample,
    scatter_gates,
    small,
)

__all__ = [
    "Backbone",
    "Cell",
    "DynamicRouting",
    "DynamicRoutingConfig",
    "Head",
    "budget_loss",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
    "scatter_gates",
    "small",
]
