"""Every hook that a plugin of brt can implement.

A plugin is a module (or any object) with functions marked ``@brt.hookimpl``, named by an entry
point of the group ``brt``. Offering something does nothing until its name is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

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

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from brt.passes import Record

hookspec = pluggy.HookspecMarker("brt")
hookimpl = pluggy.HookimplMarker("brt")


@hookspec
def brt_protocols() -> Iterable[ProtocolSpec]:  # type: ignore[empty-body]
    """Offer routing protocols.

    Called once, when a protocol is first looked up by name.

        @brt.hookimpl
        def brt_protocols():
            yield brt.ProtocolSpec.of(CoinToss)
    """


@hookspec
def brt_routers() -> Iterable[RouterSpec]:  # type: ignore[empty-body]
    """Offer routers.

    Called once, when a router is first looked up by name.

        @brt.hookimpl
        def brt_routers():
            yield brt.RouterSpec.of(MirrorRouter, name="acme-mirror")
    """


@hookspec
def brt_passes() -> Iterable[PassSpec]:  # type: ignore[empty-body]
    """Offer optimisation passes.

    Called once, when a pass is first looked up by name. Offering a pass does not run it: a pass
    runs when the user lists it in ``optimize(passes=...)``.

        @brt.hookimpl
        def brt_passes():
            yield brt.PassSpec.of(QuantizeExperts)
    """


@hookspec
def brt_kernels() -> Iterable[KernelSpec]:  # type: ignore[empty-body]
    """Offer kernels for the operators of ``brt.ops``.

    Called once, at the first call of any operator.

        @brt.hookimpl
        def brt_kernels():
            yield brt.KernelSpec(
                op="dispatch", device="cuda", name="acme", forward=dispatch, estimate=microseconds
            )
    """


@hookspec
def brt_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Offer models.

    Called once, when a model is first looked up by name.

        @brt.hookimpl
        def brt_models():
            yield brt.ModelSpec(
                name="acme-tiny", summary="two experts", factory=Tiny, sample=tiny_batch
            )
    """


@hookspec
def brt_adapters() -> Iterable[AdapterSpec]:  # type: ignore[empty-body]
    """Offer adapters of other libraries' modules.

    Called once, at the first ``brt.adapt(model)``.

        @brt.hookimpl
        def brt_adapters():
            yield brt.AdapterSpec(
                name="acme-moe", summary="acme's experts", matches=is_acme_moe, adapt=from_acme
            )
    """


@hookspec
def brt_workloads() -> Iterable[WorkloadSpec]:  # type: ignore[empty-body]
    """Offer benchmark workloads.

    Called once, when ``brt bench`` first looks up a workload by name.

        @brt.hookimpl
        def brt_workloads():
            yield brt.WorkloadSpec(name="acme-chat", summary="chat traffic", factory=chat)
    """


@hookspec
def brt_demos() -> Iterable[DemoSpec]:  # type: ignore[empty-body]
    """Offer demos.

    Called once, when ``brt demo`` first looks up a demo by name.

        @brt.hookimpl
        def brt_demos():
            yield brt.DemoSpec(name="acme-chat", summary="chat", run=chat, source="a question")
    """


@hookspec
def brt_solvers() -> Iterable[SolverSpec]:  # type: ignore[empty-body]
    """Offer solvers for the placement of experts.

    Called once, when ``brt_dist.plan`` first looks up a solver by name.

        @brt.hookimpl
        def brt_solvers():
            yield brt.SolverSpec(name="acme-annealing", summary="slow and good", factory=Anneal)
    """


@hookspec
def brt_pass_ran(record: Record, graph: GraphModule) -> None:
    """Observe a pass.

    Called after each pass of an `optimize`, in the order in which they ran. `graph` is the pass's
    result and must not be changed. An exception becomes a `PluginWarning`.

        @brt.hookimpl
        def brt_pass_ran(record):
            print(record)
    """
