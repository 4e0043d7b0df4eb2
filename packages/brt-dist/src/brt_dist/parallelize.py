"""`parallelize`: a model's experts move to the ranks of a group, in place.

Legend: P paths (experts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from brt.profile import signature
from brt_dist.agree import agree, telling
from brt_dist.errors import ParallelError
from brt_dist.gradients import sum_replicas
from brt_dist.groups import Group, resolve
from brt_dist.mixtures import Change, Settings, find_changes, refused
from brt_dist.placement import Plan
from brt_dist.spread import Placement, Spread
from brt_dist.transport import Transport
from brt_dist.whole_state import Entry, gather_state

_DEFAULT = Transport()
_WHAT = "parallelize"


@dataclass(frozen=True)
class Parallelized:
    """What `parallelize` did to a model.

    Attributes:
        changed: (module path, its experts and their ranks) of each mixture that is spread now.
        spreads: which ranks hold which expert, by the path of the mixture.
        experts: names of the parameters that only their rank holds.
        entries: the state dict as it was, and where its tensors are now.
        group: the ranks.
    """

    changed: tuple[tuple[str, str], ...]
    spreads: Mapping[str, Spread]
    experts: frozenset[str]
    entries: tuple[Entry, ...]
    group: Group

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state of the model, as one process has it; every rank must call it.

        It loads into the model before `parallelize`, on any number of ranks.
        """
        return gather_state(model, self.entries, self.group)

    def parameters(self, model: nn.Module) -> set[nn.Parameter]:
        """The experts' parameters: ``fully_shard(model, ignored_params=...)`` leaves them alone."""
        return {p for name, p in model.named_parameters() if name in self.experts}

    def sum_replicas(self, model: nn.Module) -> None:
        """Add up the gradients of experts that several ranks hold; every rank must call it.

        Each of them then has the gradient of all the expert's rows, and they stay equal.
        """
        sum_replicas(model, self.entries, self.group)

    def keep_from_ddp(self, model: nn.Module) -> None:
        """Let `torch.nn.parallel.DistributedDataParallel` leave the experts alone."""
        names = [entry.name for entry in self.entries if entry.spread is not None]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    def __str__(self) -> str:
        width = max(len(path) for path, _ in self.changed)
        return "\n".join(f"{path:<{width}}  {what}" for path, what in self.changed)


def parallelize(
    model: nn.Module,
    ranks: Group | DeviceMesh | None = None,
    *,
    placement: Plan | Mapping[str, Placement] | None = None,
    transport: Transport = _DEFAULT,
    leave: Collection[str] = (),
) -> Parallelized:
    """Spread every mixture of a model over ranks, in place: each rank keeps its experts only.

    Every rank must call it, with the same model and weights, and from then on call the model, each
    with its own cells. A mixture is either a module that holds a `brt.ExpertRouter` and the stacked
    weights that it calls it with (3-D parameters of P experts, and 2-D ones called ``...bias``), or
    one that holds a `brt.ScatterRouter`, an ``nn.ModuleList`` of P branches and a
    `brt.GatherRouter`, used as in ``gather([branch(path) ...], route)``. With packed rows, in place
    of the branches stands a module that holds such stacked weights, used as in
    ``gather(experts(rows, route.offsets_P1), route)``.

    Args:
        model: changed in place. Names of the parameters stay; those of other ranks' branches go.
        ranks: a group, or a mesh of one dimension; None = all ranks.
        placement: a plan for the model, or for the path of a mixture the rank of each expert, or
            its ranks (`Parallelized.sum_replicas`); others in equal blocks.
        transport: how cells travel.
        leave: paths of modules in which nothing is changed.

    Raises:
        ParallelError: before anything is changed, where a mixture cannot be spread or none is
            there, with its path and the reason.
        PlacementError: where the plan is for another model or number of ranks.
        ExchangeError: on every rank, where the ranks disagree, or one of them found an error.
    """
    group = resolve(_group_of(ranks))
    with telling(_WHAT, group):
        settings = Settings(group, _placement_of(model, placement, group), transport)
        changes = list(find_changes(model, settings, leave))
        _check(model, changes, settings)
    changed = tuple((change.path or type(model).__name__, str(change.spread)) for change in changes)
    words = "a model with " + "; ".join(f"{path}: {what}" for path, what in changed)
    agree(_WHAT, words, torch.zeros(dist.get_world_size(group), 1, dtype=torch.int64), group)
    entries = tuple(_entries(model, changes))
    for change in changes:
        change.carry_out()
    there = {name for name, _ in model.named_parameters()}
    experts = {name for change in changes for name in change.owners}
    spreads = {change.path: change.spread for change in changes}
    return Parallelized(changed, spreads, frozenset(experts & there), entries, group)


def _entries(model: nn.Module, changes: Sequence[Change]) -> Iterator[Entry]:
    of = {name: change for change in changes for name in change.owners}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        kind = name, tuple(tensor.shape), tensor.dtype
        if name in of:
            owner = of[name].owners[name]
            yield Entry(*kind, of[name].spread, owner, name in trained)
        else:
            yield Entry(*kind)


def _placement_of(
    model: nn.Module, placement: Plan | Mapping[str, Placement] | None, group: Group
) -> Mapping[str, Placement]:
    """The rank of each expert, by the path of the module that holds the router."""
    if not isinstance(placement, Plan):
        return placement or {}
    placement.check(model, dist.get_world_size(group))
    routers = signature(model)
    # A plan of a bare trace knows no names: then the routers' order stands for them
    paths = placement.layers if set(placement.layers) & set(routers) else tuple(routers)
    return {
        path.rpartition(".")[0]: [
            np.flatnonzero((expert_WS == expert).any(1)).tolist()
            for expert in range(placement.num_experts)
        ]
        for path, expert_WS in zip(paths, placement.expert_LWS, strict=True)
    }


def _group_of(ranks: Group | DeviceMesh | None) -> Group | None:
    if not isinstance(ranks, DeviceMesh):
        return ranks
    if ranks.ndim != 1:
        raise ParallelError(
            f"{_WHAT}: experts are spread over one dimension of a mesh, got {ranks}; pass "
            "mesh['its name']"
        )
    return ranks.get_group()


def _check(model: nn.Module, changes: Sequence[Change], settings: Settings) -> None:
    """What concerns the model as a whole."""
    if not changes:
        raise ParallelError(
            f"{type(model).__name__} has no brt.ExpertRouter and no brt.ScatterRouter; "
            "brt.adapt(model) may make some of its mixtures"
        )
    unknown = set(settings.placement) - {change.path for change in changes}
    if unknown:
        raise ParallelError(
            f"the placement names {sorted(unknown)}, the mixtures are "
            f"{[change.path for change in changes]}"
        )
    settings.transport.check(settings.group)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for change in changes:
        for name in change.owners:
            if isinstance(parameters.get(name), DTensor):
                raise refused(
                    change.path, f"{name} is sharded: parallelize first, then fully_shard"
                )
            shared = names[id(parameters[name])] if name in parameters else []
            if len(shared) > 1:
                raise refused(change.path, f"its parameter is shared: {' and '.join(shared)}")
