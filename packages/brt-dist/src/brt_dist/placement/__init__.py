"""Where experts go: fewer moves between ranks, and an even load."""

from brt_dist.placement.errors import PlacementError
from brt_dist.placement.packing import eplb
from brt_dist.placement.plan import Figures, Plan
from brt_dist.placement.planner import plan
from brt_dist.placement.problem import Problem, Work
from brt_dist.placement.record import record
from brt_dist.placement.solvers import Descent, Packing
from brt_dist.placement.traffic import Traffic

__all__ = [
    "Descent",
    "Figures",
    "Packing",
    "PlacementError",
    "Plan",
    "Problem",
    "Traffic",
    "Work",
    "eplb",
    "plan",
    "record",
]
