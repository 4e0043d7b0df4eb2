"""What a process group is to an exchange: its size, this rank's place in it, and its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from brt_dist.errors import ExchangeError
from brt_dist.roll_call import reason

Group = dist.ProcessGroup

# Asked for several times an exchange, and parsed anew by torch each time
_DEVICE_TYPES: WeakKeyDictionary[Group, set[str]] = WeakKeyDictionary()


def resolve(group: Group | None) -> Group:
    """The group, or that of all ranks; an error where this process takes no part in it."""
    if not dist.is_available() or not dist.is_initialized():
        raise ExchangeError(
            "brt_dist: torch.distributed is not started: start the program with torchrun and call "
            "torch.distributed.init_process_group()"
        )
    if group is None:
        whole = dist.group.WORLD
        assert whole is not None
        return whole
    if not isinstance(group, dist.ProcessGroup):
        raise ExchangeError(
            "brt_dist: group must be a process group that this rank is in (or None: all ranks), "
            f"got {group!r} on rank {dist.get_rank()}"
        )
    return group


def global_rank(group: Group, rank: int) -> int:
    """The number that all ranks together know a rank of the group by."""
    return dist.get_global_rank(group, rank)


def device_types(group: Group) -> set[str]:
    """Types of device whose tensors the group can carry."""
    if group not in _DEVICE_TYPES:
        pairs = dist.get_backend_config(group).split(",")
        _DEVICE_TYPES[group] = {pair.partition(":")[0] for pair in pairs}
    return _DEVICE_TYPES[group]


def host_device(group: Group) -> torch.device:
    """Where counts travel: the host if the group reaches it, so that no device is waited for."""
    if "cpu" in device_types(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def naming_failures(what: str, group: Group) -> Iterator[None]:
    """Say which rank of how many saw an exchange fail, and which others are missing."""
    try:
        yield
    except RuntimeError as error:
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        raise ExchangeError(
            f"{what}: it failed on rank {global_rank(group, rank)} (of {num_ranks} in the group): "
            f"{reason(group)}: {error}"
        ) from error
