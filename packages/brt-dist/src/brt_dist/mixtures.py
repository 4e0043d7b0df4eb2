"""The mixtures of a model: how each is spread over ranks, or why it cannot be.

Legend: P paths (experts).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from brt import ExpertRouter, GatherRouter, ScatterRouter
from brt_dist.errors import ParallelError
from brt_dist.experts import ParallelExpertRouter
from brt_dist.groups import Group
from brt_dist.routers import Elsewhere, ParallelGatherRouter, ParallelScatterRouter
from brt_dist.spread import Placement, Spread
from brt_dist.stacked import share_of
from brt_dist.transport import Transport


@dataclass(frozen=True, eq=False)
class Change:
    """A mixture that can be spread: found first, carried out when all are."""

    path: str
    spread: Spread
    # Names in the model of what belongs to experts: to one, or (None) to all, stacked
    owners: dict[str, int | None]
    carry_out: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Settings:
    """What the changes are made by."""

    group: Group
    placement: Mapping[str, Placement]
    transport: Transport

    def spread(self, path: str, num_experts: int) -> Spread:
        """Where the experts of a mixture are to be."""
        try:
            return Spread.of(num_experts, self.group, self.placement.get(path))
        except ParallelError as error:
            raise ParallelError(f"{_named(path)}: {error}") from error


def find_changes(model: nn.Module, settings: Settings, leave: Collection[str]) -> Iterator[Change]:
    """The changes that spread every mixture outside ``leave``; `ParallelError` where one cannot."""
    modules = list(model.named_modules(remove_duplicate=False))
    places: dict[int, int] = {}
    for _, module in modules:
        places[id(module)] = places.get(id(module), 0) + 1
    by_path = dict(modules)
    for path, module in modules:
        if any(path == left or path.startswith(f"{left}.") for left in leave):
            continue
        if isinstance(module, ParallelExpertRouter | ParallelScatterRouter):
            raise ParallelError(f"{_named(path)} is spread over ranks already")
        if type(module) not in (ExpertRouter, ScatterRouter):
            continue
        parent, _, name = path.rpartition(".")
        if not path:
            raise ParallelError(f"the model is itself a {type(module).__name__}")
        holder = by_path[parent]
        if places[id(module)] > 1 or places[id(holder)] > 1:
            raise ParallelError(f"{_named(path)} stands in several places of the model")
        if isinstance(module, ExpertRouter):
            yield _stacked(holder, parent, name, module, settings)
        elif isinstance(module, ScatterRouter):
            find = _packed if module.result == "packed" else _branches
            yield find(holder, parent, name, module, settings)


def _stacked(
    holder: nn.Module, path: str, name: str, router: ExpertRouter, settings: Settings
) -> Change:
    """The change of a module with an ExpertRouter and stacked weights."""
    num_experts = router.num_paths
    routers = [child for child in holder.children() if isinstance(child, ExpertRouter)]
    stacked = _stacked_weights(holder, num_experts)
    if len(routers) > 1:
        raise refused(path, f"it holds {len(routers)} ExpertRouters")
    if sum(parameter.ndim == 3 for parameter in stacked.values()) < 2:
        raise refused(
            path,
            f"its ExpertRouter has {num_experts} experts, but the module that holds it does not "
            f"hold their two stacked weights [{num_experts}, out, in] as parameters",
        )
    spread = settings.spread(path, num_experts)

    def carry_out() -> None:
        parallel = ParallelExpertRouter(spread, settings.transport)
        setattr(holder, name, parallel.train(router.training))
        for key, parameter in stacked.items():
            setattr(holder, key, share_of(parameter, spread))

    return Change(path, spread, {_join(path, key): None for key in stacked}, carry_out)


def _branches(
    holder: nn.Module, path: str, name: str, scatter: ScatterRouter, settings: Settings
) -> Change:
    """The change of a module with a ScatterRouter, branches and a GatherRouter."""
    gather_name, gather = _gather_of(holder, path, settings)
    children = dict(holder.named_children())
    lists = {
        k: c
        for k, c in children.items()
        if isinstance(c, nn.ModuleList) and len(c) == scatter.num_paths
    }
    list_name = _one(list(lists), path, f"ModuleList of {scatter.num_paths} branches")
    branches = lists[list_name]
    if len({id(branch) for branch in branches}) < len(branches):
        raise refused(path, "two of its branches are one module")
    spread = _without_idle_ranks(path, scatter, settings)

    def carry_out() -> None:
        _replace(holder, {name: scatter, gather_name: gather}, spread, settings.transport)
        for branch in range(scatter.num_paths):
            if branch not in spread.held:
                branches[branch] = Elsewhere()

    # The keys of a ModuleList begin with the number of the branch
    owners: dict[str, int | None] = {
        _join(path, f"{list_name}.{key}"): int(key.partition(".")[0])
        for key in branches.state_dict()
    }
    return Change(path, spread, owners, carry_out)


def _packed(
    holder: nn.Module, path: str, name: str, scatter: ScatterRouter, settings: Settings
) -> Change:
    """The change of a module with packed rows, and another in it that holds stacked weights."""
    gather_name, gather = _gather_of(holder, path, settings)
    stacked_of = {
        key: _stacked_weights(child, scatter.num_paths) for key, child in holder.named_children()
    }
    enough = [k for k, found in stacked_of.items() if sum(p.ndim == 3 for p in found.values()) > 1]
    child_name = _one(enough, path, f"module with stacked weights [{scatter.num_paths}, ...]")
    child, stacked = holder.get_submodule(child_name), stacked_of[child_name]
    spread = _without_idle_ranks(path, scatter, settings)

    def carry_out() -> None:
        _replace(holder, {name: scatter, gather_name: gather}, spread, settings.transport)
        for key, parameter in stacked.items():
            setattr(child, key, share_of(parameter, spread))

    owners: dict[str, int | None] = {_join(path, f"{child_name}.{key}"): None for key in stacked}
    return Change(path, spread, owners, carry_out)


def _stacked_weights(module: nn.Module, num_experts: int) -> dict[str, nn.Parameter]:
    """The parameters of a module that hold something for each expert."""
    return {
        key: parameter
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.shape[:1] == (num_experts,)
        and (parameter.ndim == 3 or (parameter.ndim == 2 and key.endswith("bias")))
    }


def _gather_of(holder: nn.Module, path: str, settings: Settings) -> tuple[str, GatherRouter]:
    """The one gather beside the one scatter."""
    if settings.transport != Transport(hosts=settings.transport.hosts):
        raise refused(path, f"{settings.transport} is for ExpertRouter only")
    children = dict(holder.named_children())
    _one(
        [key for key, c in children.items() if isinstance(c, ScatterRouter)], path, "ScatterRouter"
    )
    name = _one([k for k, c in children.items() if type(c) is GatherRouter], path, "GatherRouter")
    gather = children[name]
    assert isinstance(gather, GatherRouter)
    return name, gather


def _without_idle_ranks(path: str, scatter: ScatterRouter, settings: Settings) -> Spread:
    spread = settings.spread(path, scatter.num_paths)
    idle = [rank for rank, held in enumerate(spread.held_W) if not held]
    if idle:
        raise refused(path, f"its {scatter.num_paths} branches leave none for rank {idle[0]}")
    return spread


def _replace(
    holder: nn.Module,
    routers: Mapping[str, ScatterRouter | GatherRouter],
    spread: Spread,
    transport: Transport,
) -> None:
    for name, router in routers.items():
        parallel = (
            ParallelScatterRouter(router, spread, transport)
            if isinstance(router, ScatterRouter)
            else ParallelGatherRouter(router)
        )
        setattr(holder, name, parallel.train(router.training))


def _one(found: list[str], path: str, what: str) -> str:
    """The one there must be."""
    if len(found) != 1:
        raise refused(path, f"it must hold one {what}, and holds {len(found)}")
    return found[0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named(path: str) -> str:
    return f"'{path}'" if path else "the model"


def refused(path: str, reason: str) -> ParallelError:
    """The error that says why a mixture cannot be spread."""
    hint = f"; leave=['{path}'] leaves it as it is" if path else ""
    return ParallelError(f"{_named(path)} cannot be spread: {reason}{hint}")
