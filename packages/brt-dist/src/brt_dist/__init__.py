"""Experts on several ranks: sparse exchange, expert parallelism and placement."""

from brt_dist import reference
from brt_dist.checkpoint import Checkpoint
from brt_dist.errors import ExchangeError, ParallelError
from brt_dist.exchange import Exchange, Handle, reverse_all_to_all, sparse_all_to_all
from brt_dist.experts import ExpertParallel, ParallelExpertRouter
from brt_dist.gradients import sum_gradients
from brt_dist.hierarchical import (
    Hosts,
    TwoHops,
    hierarchical_all_to_all,
    reverse_hierarchical_all_to_all,
)
from brt_dist.locality import Assignment, assign_sources, return_to_assigned
from brt_dist.measure import measure_transports
from brt_dist.nearest import nearest
from brt_dist.parallelize import Parallelized, parallelize
from brt_dist.placement import PlacementError, Plan, plan
from brt_dist.routers import ParallelGatherRouter, ParallelScatterRouter, SpreadRoute
from brt_dist.spread import Spread
from brt_dist.topology import Link, Topology
from brt_dist.transport import Transport

__all__ = [
    "Assignment",
    "Checkpoint",
    "Exchange",
    "ExchangeError",
    "ExpertParallel",
    "Handle",
    "Hosts",
    "Link",
    "ParallelError",
    "ParallelExpertRouter",
    "ParallelGatherRouter",
    "ParallelScatterRouter",
    "Parallelized",
    "PlacementError",
    "Plan",
    "Spread",
    "SpreadRoute",
    "Topology",
    "Transport",
    "TwoHops",
    "assign_sources",
    "hierarchical_all_to_all",
    "measure_transports",
    "nearest",
    "parallelize",
    "plan",
    "reference",
    "return_to_assigned",
    "reverse_all_to_all",
    "reverse_hierarchical_all_to_all",
    "sparse_all_to_all",
    "sum_gradients",
]
