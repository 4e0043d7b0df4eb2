"""Passes: rewrites of traced graphs, driven by a profile and kept right by guards."""

from brt.passes.base import Call, Context, Left, Lowering, Pass, Record
from brt.passes.capture import Capture
from brt.passes.drop_dead_paths import DropDeadPaths
from brt.passes.fold_permanent_paths import FoldPermanentPaths
from brt.passes.fuse_conv_chains import FuseConvChains
from brt.passes.fuse_horizontal import FuseHorizontal
from brt.passes.fuse_vertical import FuseVertical
from brt.passes.match import Scatter, scatters

BUILTIN: tuple[type[Pass], ...] = (
    Capture,
    DropDeadPaths,
    FoldPermanentPaths,
    FuseConvChains,
    FuseHorizontal,
    FuseVertical,
)
"""What brt-core offers through the hook `brt_passes`."""

DEFAULT: tuple[str, ...] = (
    "fuse-conv-chains",
    "fuse-horizontal",
    "fuse-vertical",
    "drop-dead-paths",
    "fold-permanent-paths",
)
"""What `brt.optimize` runs where no passes are named."""

__all__ = [
    "BUILTIN",
    "DEFAULT",
    "Call",
    "Capture",
    "Context",
    "DropDeadPaths",
    "FoldPermanentPaths",
    "FuseConvChains",
    "FuseHorizontal",
    "FuseVertical",
    "Left",
    "Lowering",
    "Pass",
    "Record",
    "Scatter",
    "scatters",
]
