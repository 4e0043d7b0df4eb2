"""Dynamic neural networks in PyTorch: say what is routed and how, profile it, specialise it."""

from importlib.metadata import version

from brt import losses, memory, ops, protocols, reference
from brt.adapt import Adapted, adapt
from brt.cellflow import cellflow
from brt.cells import Cells, Grid, PatchGrid, Root, annotate, annotate_patches
from brt.checks import check
from brt.decision import Decision
from brt.drift import Drift, OnDrift
from brt.errors import (
    BrtError,
    CheckpointError,
    KernelError,
    PassError,
    PluginError,
    PluginWarning,
    ProfileError,
    ProtocolError,
    RouteError,
    TraceError,
)
from brt.fuse import fuse
from brt.graph import netlet, regions, trace
from brt.grouped import each, grouped
from brt.hookspecs import hookimpl
from brt.optimize import optimize
from brt.optimized import Optimized
from brt.plan_files import load
from brt.profile import Profile, profile
from brt.route import Route
from brt.routers import (
    EarlyExit,
    ExpertRouter,
    GatherRouter,
    LoopRouter,
    Router,
    ScatterRouter,
)
from brt.specs import (
    AdapterSpec,
    DemoSpec,
    KernelSpec,
    ModelSpec,
    PassSpec,
    ProtocolSpec,
    RouterSpec,
    SolverSpec,
    WorkloadSpec,
)

__version__ = version("brt-core")

__all__ = [
    "Adapted",
    "AdapterSpec",
    "BrtError",
    "Cells",
    "CheckpointError",
    "Decision",
    "DemoSpec",
    "Drift",
    "EarlyExit",
    "ExpertRouter",
    "GatherRouter",
    "Grid",
    "KernelError",
    "KernelSpec",
    "LoopRouter",
    "ModelSpec",
    "OnDrift",
    "Optimized",
    "PassError",
    "PassSpec",
    "PatchGrid",
    "PluginError",
    "PluginWarning",
    "Profile",
    "ProfileError",
    "ProtocolError",
    "ProtocolSpec",
    "Root",
    "Route",
    "RouteError",
    "Router",
    "RouterSpec",
    "ScatterRouter",
    "SolverSpec",
    "TraceError",
    "WorkloadSpec",
    "__version__",
    "adapt",
    "annotate",
    "annotate_patches",
    "cellflow",
    "check",
    "each",
    "fuse",
    "grouped",
    "hookimpl",
    "load",
    "losses",
    "memory",
    "netlet",
    "ops",
    "optimize",
    "profile",
    "protocols",
    "reference",
    "regions",
    "trace",
]
