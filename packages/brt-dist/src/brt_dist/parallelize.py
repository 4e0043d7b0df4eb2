"""`parallelize`: a model's experts move to the ranks of a group, in place.

Legend: P paths (experts).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from brt import ExpertRouter, GatherRouter, ScatterRouter
from brt_dist.agree import agree, telling
from brt_dist.errors import ParallelError
from brt_dist.experts import ParallelExpertRouter, share_of
from brt_dist.groups import Group, resolve
from brt_dist.routers import Elsewhere, ParallelGatherRouter, ParallelScatterRouter
from brt_dist.spread import Spread
from brt_dist.transport import Transport

_DEFAULT = Transport()
_WHAT = "parallelize"


@dataclass(frozen=True)
class Parallelized:
    """What `parallelize` did to a model.

    Attributes:
        changed: (module path, its experts and their ranks) of each mixture that is spread now.
        experts: names of the parameters that only their rank holds.
    """

    changed: tuple[tuple[str, str], ...]
    experts: frozenset[str]

    def __str__(self) -> str:
        width = max(len(path) for path, _ in self.changed)
        return "\n".join(f"{path:<{width}}  {what}" for path, what in self.changed)


@dataclass(frozen=True, eq=False)
class _Change:
    """A mixture that can be spread: found first, carried out when all are."""

    path: str
    spread: Spread
    # Names in the model of the parameters of all experts
    experts: tuple[str, ...]
    carry_out: Callable[[], None]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the changes are made by."""

    group: Group
    placement: Mapping[str, Sequence[int]]
    transport: Transport

    def spread(self, path: str, num_experts: int) -> Spread:
        try:
            return Spread.of(num_experts, self.group, self.placement.get(path))
        except ParallelError as error:
            raise ParallelError(f"{_named(path)}: {error}") from error


def parallelize(
    model: nn.Module,
    ranks: Group | DeviceMesh | None = None,
    *,
    placement: Mapping[str, Sequence[int]] | None = None,
    transport: Transport = _DEFAULT,
    leave: Collection[str] = (),
) -> Parallelized:
    """Spread every mixture of a model over ranks, in place: each rank keeps its experts only.

    Every rank must call it, with the same model and weights, and from then on call the model, each
    with its own cells. A mixture is either a module that holds a `brt.ExpertRouter` and the stacked
    weights that it calls it with (3-D parameters of P experts, and 2-D ones called ``...bias``), or
    one that holds a `brt.ScatterRouter`, an ``nn.ModuleList`` of P branches and a
    `brt.GatherRouter`, used as in ``gather([branch(path) ...], route)``.

    Args:
        model: changed in place. Names of the parameters stay; those of other ranks' branches go.
        ranks: a group, or a mesh of one dimension; None = all ranks.
        placement: for the path of a mixture, the rank of each expert; others in equal blocks.
        transport: how cells travel.
        leave: paths of modules in which nothing is changed.

    Raises:
        ParallelError: before anything is changed, where a mixture cannot be spread or none is
            there, with its path and the reason.
        ExchangeError: on every rank, where the ranks disagree, or one of them found an error.
    """
    group = resolve(_group_of(ranks))
    with telling(_WHAT, group):
        plan = _Plan(group, placement or {}, transport)
        changes = list(_changes(model, plan, leave))
        _check(model, changes, plan)
    changed = tuple((change.path or type(model).__name__, str(change.spread)) for change in changes)
    words = "a model with " + "; ".join(f"{path}: {what}" for path, what in changed)
    agree(_WHAT, words, torch.zeros(dist.get_world_size(group), 1, dtype=torch.int64), group)
    for change in changes:
        change.carry_out()
    there = {name for name, _ in model.named_parameters()}
    experts = {name for change in changes for name in change.experts}
    return Parallelized(changed, frozenset(experts & there))


def _group_of(ranks: Group | DeviceMesh | None) -> Group | None:
    if not isinstance(ranks, DeviceMesh):
        return ranks
    if ranks.ndim != 1:
        raise ParallelError(
            f"{_WHAT}: experts are spread over one dimension of a mesh, got {ranks}; pass "
            "mesh['its name']"
        )
    return ranks.get_group()


def _changes(model: nn.Module, plan: _Plan, leave: Collection[str]) -> Iterator[_Change]:
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
            yield _stacked(holder, parent, name, module, plan)
        elif isinstance(module, ScatterRouter):
            yield _branches(holder, parent, name, module, plan)


def _stacked(holder: nn.Module, path: str, name: str, router: ExpertRouter, plan: _Plan) -> _Change:
    """The change of a module with an ExpertRouter and stacked weights."""
    num_experts = router.num_paths
    routers = [child for child in holder.children() if isinstance(child, ExpertRouter)]
    stacked = {
        key: parameter
        for key, parameter in holder.named_parameters(recurse=False)
        if parameter.shape[:1] == (num_experts,)
        and (parameter.ndim == 3 or (parameter.ndim == 2 and key.endswith("bias")))
    }
    if len(routers) > 1:
        raise _refused(path, f"it holds {len(routers)} ExpertRouters")
    if sum(parameter.ndim == 3 for parameter in stacked.values()) < 2:
        raise _refused(
            path,
            f"its ExpertRouter has {num_experts} experts, but the module that holds it does not "
            f"hold their two stacked weights [{num_experts}, out, in] as parameters",
        )
    spread = plan.spread(path, num_experts)

    def carry_out() -> None:
        setattr(holder, name, ParallelExpertRouter(spread, plan.transport))
        for key, parameter in stacked.items():
            setattr(holder, key, share_of(parameter, spread))

    return _Change(path, spread, tuple(_join(path, key) for key in stacked), carry_out)


def _branches(
    holder: nn.Module, path: str, name: str, scatter: ScatterRouter, plan: _Plan
) -> _Change:
    """The change of a module with a ScatterRouter, branches and a GatherRouter."""
    if plan.transport.degree > 1 or plan.transport.replicated:
        raise _refused(path, "degree and replicated are for ExpertRouter only")
    if scatter.result != "paths":
        raise _refused(path, f"its ScatterRouter has result={scatter.result!r}, not 'paths'")
    children = dict(holder.named_children())
    _one(
        [key for key, c in children.items() if isinstance(c, ScatterRouter)], path, "ScatterRouter"
    )
    gather_name = _one(
        [k for k, c in children.items() if type(c) is GatherRouter], path, "GatherRouter"
    )
    lists = {
        k: c
        for k, c in children.items()
        if isinstance(c, nn.ModuleList) and len(c) == scatter.num_paths
    }
    list_name = _one(list(lists), path, f"ModuleList of {scatter.num_paths} branches")
    branches, gather = lists[list_name], holder.get_submodule(gather_name)
    assert isinstance(gather, GatherRouter)
    if len({id(branch) for branch in branches}) < len(branches):
        raise _refused(path, "two of its branches are one module")
    spread = plan.spread(path, scatter.num_paths)
    idle = [rank for rank, held in enumerate(spread.held_W) if not held]
    if idle:
        raise _refused(path, f"its {scatter.num_paths} branches leave none for rank {idle[0]}")

    def carry_out() -> None:
        setattr(holder, name, ParallelScatterRouter(scatter, spread, plan.transport))
        setattr(holder, gather_name, ParallelGatherRouter(gather))
        for branch in range(scatter.num_paths):
            if branch not in spread.held:
                branches[branch] = Elsewhere()

    experts = [_join(path, f"{list_name}.{key}") for key, _ in branches.named_parameters()]
    return _Change(path, spread, tuple(experts), carry_out)


def _one(found: list[str], path: str, what: str) -> str:
    """The one there must be."""
    if len(found) != 1:
        raise _refused(path, f"it must hold one {what}, and holds {len(found)}")
    return found[0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check(model: nn.Module, changes: Sequence[_Change], plan: _Plan) -> None:
    """What concerns the model as a whole."""
    if not changes:
        raise ParallelError(
            f"{type(model).__name__} has no brt.ExpertRouter and no brt.ScatterRouter; "
            "brt.adapt(model) may make some of its mixtures"
        )
    unknown = set(plan.placement) - {change.path for change in changes}
    if unknown:
        raise ParallelError(
            f"the placement names {sorted(unknown)}, the mixtures are "
            f"{[change.path for change in changes]}"
        )
    if plan.transport.hosts is not None and plan.transport.hosts.group is not plan.group:
        raise ParallelError("transport.hosts is of another group")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for change in changes:
        for name in change.experts:
            shared = names[id(model.get_parameter(name))]
            if len(shared) > 1:
                raise _refused(change.path, f"its parameter is shared: {' and '.join(shared)}")


def _named(path: str) -> str:
    return f"'{path}'" if path else "the model"


def _refused(path: str, reason: str) -> ParallelError:
    hint = f"; leave=['{path}'] leaves it as it is" if path else ""
    return ParallelError(f"{_named(path)} cannot be spread: {reason}{hint}")
