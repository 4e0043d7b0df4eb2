"""Dynamic neural networks in PyTorch: say what is routed and how, profile it, specialise it."""

from importlib.metadata import version

from brt import losses, ops, protocols, reference
from brt.adapt import Adapted, adapt
from brt.cells import Cells, Grid, PatchGrid, Root, annotate, annotate_patches
from brt.checks import check
from brt.decision import Decision
from brt.errors import (
    BrtError,
    KernelError,
    PassError,
    PluginError,
    PluginWarning,
    ProfileError,
    ProtocolError,
    RouteError,
    TraceError,
)
from brt.grouped import each, grouped
from brt.hookspecs import hookimpl
from brt.route import Route
from brt.routers import EarlyExit, GatherRouter, LoopRouter, Router, ScatterRouter
from brt.specs import (
    AdapterSpec,
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
    "Decision",
    "EarlyExit",
    "GatherRouter",
    "Grid",
    "KernelError",
    "KernelSpec",
    "LoopRouter",
    "ModelSpec",
    "PassError",
    "PassSpec",
    "PatchGrid",
    "PluginError",
    "PluginWarning",
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
    "check",
    "each",
    "grouped",
    "hookimpl",

    "ops",
    "protocols",
    "reference",
]
