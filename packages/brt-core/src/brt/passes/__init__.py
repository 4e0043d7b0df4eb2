"""Passes: rewrites of traced graphs, driven by a profile and kept right by guards."""

from brt.passes.base import Call, Context, Left, Lowering, Pass, Record
from brt.passes.batch_exits import BatchExits
from brt.passes.capture import Capture
from brt.passes.defer_operations import DeferOperations
from brt.passes.drop_dead_paths import DropDeadPaths
from brt.passes.fold_constants import FoldConstants
from brt.passes.fold_permanent_paths import FoldPermanentPaths
from brt.passes.fuse_branches import FuseBranches
from brt.passes.fuse_conv_chains import FuseConvChains
from brt.passes.fuse_horizontal import FuseHorizontal
from brt.passes.fuse_vertical import FuseVertical
from brt.passes.match import Scatter, scatters
from brt.passes.pin_capacities import PinCapacities
from brt.passes.preload_weights import PreloadWeights
from brt.passes.speculate_routes import SpeculateRoutes

BUILTIN: tuple[type[Pass], ...] = (
    BatchExits,
    Capture,
    DeferOperations,
    DropDeadPaths,
    FoldConstants,
    FoldPermanentPaths,
    FuseBranches,
    FuseConvChains,
    FuseHorizontal,
    FuseVertical,
    PinCapacities,
    PreloadWeights,
    SpeculateRoutes,
)
"""What brt-core offers through the hook `brt_passes`."""

DEFAULT: tuple[str, ...] = (
    "fuse-conv-chains",
    "fuse-horizontal",
    "fuse-branches",
    "defer-operations",
    "fuse-vertical",
    "batch-exits",
    "drop-dead-paths",
    "fold-permanent-paths",
)
"""What `brt.optimize` runs where no passes are named."""

__all__ = [
    "BUILTIN",
    "DEFAULT",
    "BatchExits",
    "Call",
    "Capture",
    "Context",
    "DeferOperations",
    "DropDeadPaths",
    "FoldConstants",
    "FoldPermanentPaths",
    "FuseBranches",
    "FuseConvChains",
    "FuseHorizontal",
    "FuseVertical",
    "Left",
    "Lowering",
    "Pass",
    "PinCapacities",
    "PreloadWeights",
    "Record",
    "Scatter",
    "SpeculateRoutes",
    "scatters",
]
