"""Which ranks are missing after an exchange has failed.

Ranks that saw the failure say so in the store that they were started with. A rank that says nothing
has ended, is cut off, or is still at something else.
"""

from __future__ import annotations

import threading
import time

import torch.distributed as dist
from torch.distributed import distributed_c10d

_PATIENCE_S = 1.0


def reason(group: dist.ProcessGroup) -> str:
    """What ranks that do not answer, or none, say about why an exchange of the group failed."""
    missing = _missing(group)
    if missing is None:
        return (
            "the store that ranks meet in does not answer: its host ended, or this one is cut off"
        )
    why = "ended, cannot be reached, or took longer than the group's timeout"
    if not missing:
        return f"a rank {why}; all of them answer now"
    ranks = ", ".join(str(dist.get_global_rank(group, rank)) for rank in missing)
    return f"{'rank' if len(missing) == 1 else 'ranks'} {ranks} {why}"


def _missing(group: dist.ProcessGroup) -> list[int] | None:
    """Ranks of the group that have not reported in time; None where the store is out of reach."""
    found: list[list[int]] = []

    def ask() -> None:
        try:
            found.append(_silent(group))
        except RuntimeError:
            return  # The store is gone: that nothing was found says so

    # A call of a store whose host is cut off never returns
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * _PATIENCE_S)
    return found[0] if found else None


def _silent(group: dist.ProcessGroup) -> list[int]:
    store = distributed_c10d._get_default_store()
    keys = [f"brt_dist/failed/{group.group_name}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], "seen")
    end = time.monotonic() + _PATIENCE_S
    while True:
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not silent or time.monotonic() > end:
            return silent
        time.sleep(0.02)
