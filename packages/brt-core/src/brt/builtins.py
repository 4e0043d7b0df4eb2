"""What brt-core itself offers, through the hooks that everyone uses.

Imports stay inside the hooks: listing passes must not import the operators.
"""

from __future__ import annotations

from collections.abc import Iterator

from brt.hookspecs import hookimpl
from brt.specs import KernelSpec, PassSpec, ProtocolSpec, RouterSpec, WorkloadSpec


@hookimpl
def brt_protocols() -> Iterator[ProtocolSpec]:
    from brt.protocols import BUILTIN

    for protocol in BUILTIN:
        yield ProtocolSpec.of(protocol)


@hookimpl
def brt_routers() -> Iterator[RouterSpec]:
    from brt.routers import EarlyExit, GatherRouter, LoopRouter, ScatterRouter

    yield RouterSpec.of(ScatterRouter, name="scatter")
    yield RouterSpec.of(GatherRouter, name="gather")
    yield RouterSpec.of(EarlyExit, name="early-exit")
    yield RouterSpec.of(LoopRouter, name="loop")


@hookimpl
def brt_passes() -> Iterator[PassSpec]:
    from brt.passes import BUILTIN

    for made in BUILTIN:
        yield PassSpec.of(made)


@hookimpl
def brt_kernels() -> Iterator[KernelSpec]:
    from brt.ops import REFERENCE_KERNELS, TORCH_KERNELS

    yield from REFERENCE_KERNELS
    yield from TORCH_KERNELS


@hookimpl
def brt_workloads() -> Iterator[WorkloadSpec]:
    from brt.bench.workloads import BUILTIN

    yield from BUILTIN
