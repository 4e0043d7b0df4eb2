"""Cell flow: which nodes of a graph keep cells apart, permute them, or mix them."""

from brt.cellflow.analysis import cellflow
from brt.cellflow.states import Flow

__all__ = ["Flow", "cellflow"]
