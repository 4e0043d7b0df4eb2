"""Checks of tensor values that never stop a device.

Metadata (ranks, dtypes, devices) is checked where it is used. Values are checked here: at the call
on the CPU; on CUDA a failed check sets a flag in device memory, and the next `check` raises it.
Kernels that meet a bad index leave that access out and tell it likewise: packages of kernels say
through `watch` how to ask. `path_sizes`, which brings loads to the host, asks too.
``BRT_CHECK``, read once at import: ``sync`` raises at the call on CUDA too, ``off`` checks nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from brt.errors import BrtError, KernelError

_MODE = os.environ.get("BRT_CHECK", "")
if _MODE not in ("", "sync", "off"):
    raise BrtError(f"BRT_CHECK must be sync, off or unset, got {_MODE!r}")

_NUM_FLAGS = 1024


@dataclass
class _Flags:
    """The flags of a device: NaN where a check failed since the last `check`.

    A kernel that raises a flag reads it first, so each stream has its own: two at once would lose
    one. Checks beyond the last flag share that one, and are then named together.
    """

    pool: Tensor
    flag_of: dict[tuple[int, type[BrtError], str], Tensor] = field(default_factory=dict)


_flags_of: dict[torch.device, _Flags] = {}
# By package: what its kernels found wrong on a device
_watched: dict[str, Callable[[int, bool], str]] = {}


def wanted(values: Tensor) -> bool:
    """Tell whether the values of this tensor are to be checked: not while a graph is traced."""
    if torch.compiler.is_compiling() or _MODE == "off":
        return False
    # Fake, functional and distributed tensors are subclasses: they have no values to look at here.
    return type(values) in (Tensor, torch.nn.Parameter) and not values.is_meta


def check_values(
    ok: Tensor,
    message: str,
    *,
    detail: Callable[[], str] | None = None,
    error: type[BrtError] = BrtError,
) -> None:
    """Raise ``error(message)`` unless the 0-D boolean ``ok`` holds; on CUDA, at the next `check`.

    ``detail`` tells what only the values show (how many, where first); it is called where the error
    is raised at once. Keep ``message`` free of numbers that change from call to call: each distinct
    one takes a flag for the life of the process.
    """
    if not wanted(ok):
        return
    if ok.is_cuda and _MODE != "sync":
        _raise_flag(torch.where(ok, 0.0, math.nan), message, error)
    elif not ok:
        raise error(message if detail is None else f"{message}: {detail()}")


def check_not_nan(
    values: Tensor,
    message: str,
    *,
    detail: Callable[[], str] | None = None,
    error: type[BrtError] = BrtError,
) -> None:
    """Raise ``error(message)`` if any of the floats is NaN, as `check_values` does; in one pass."""
    if not wanted(values) or values.numel() == 0:
        return
    # The maximum is NaN if any value is. Infinities of both signs are none, unlike in a sum.
    peak = values.detach().amax()
    if peak.is_cuda and _MODE != "sync":
        _raise_flag(peak, message, error)
    elif peak.isnan():
        raise error(message if detail is None else f"{message}: {detail()}")


def watch(package: str, ask: Callable[[int, bool], str]) -> None:
    """Raise, as a `KernelError`, what the kernels of a package found wrong on a CUDA device.

    ``ask(device index, wait)`` returns a sentence, or "" for nothing, and forgets it. It waits for
    the device only where told to, and touches no device on which none of the kernels ran.
    """
    _watched[package] = ask


def raise_found(device: torch.device, *, wait: bool = False) -> None:
    """Raise what kernels found wrong on a device; without ``wait``, so far: it costs no time."""
    if device.type != "cuda" or not _watched or _MODE == "off":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    found = [text for ask in _watched.values() if (text := ask(index, wait))]
    if found:
        raise KernelError("; ".join(f"{text} (on cuda:{index})" for text in found))


def at_once() -> bool:
    """Tell whether what kernels find wrong is to be raised at the call: not in a capture."""
    return _MODE == "sync" and bool(_watched) and not torch.cuda.is_current_stream_capturing()


def check(device: torch.device | str | int | None = None) -> None:
    """Raise the value errors that CUDA work flagged since the last call; waits for that work.

    Looks at one device, or at all that ran a check or a kernel, and clears their flags.
    """
    failed: list[tuple[type[BrtError], str]] = []
    for known in _asked(device, _flags_of):
        # A captured graph may be replaying on any stream, so the whole device is waited for.
        torch.cuda.synchronize(known)
        flags = _flags_of[known]
        if not flags.pool.isnan().any():
            continue
        for (_, error, message), flag in flags.flag_of.items():
            named = (error, f"{message} (on {known})")
            if flag.isnan() and named not in failed:
                failed.append(named)
        flags.pool.zero_()
        torch.cuda.synchronize(known)
    for known in _asked(device, _cuda_devices()):
        try:
            raise_found(known, wait=True)
        except KernelError as error:
            failed.append((KernelError, str(error)))
    if failed:
        # What the caller did wrong says more than the kernel that met it
        kind = next((kind for kind, _ in failed if kind is not KernelError), KernelError)
        raise kind("; ".join(message for _, message in failed))


def _asked(
    device: torch.device | str | int | None, known: Iterable[torch.device]
) -> list[torch.device]:
    if device is None:
        return list(known)
    asked = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return [one for one in known if asked in (one, torch.device(one.type))]


def _cuda_devices() -> list[torch.device]:
    """Every device on which a watched kernel may have run."""
    if not _watched or not torch.cuda.is_initialized():
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _raise_flag(value: Tensor, message: str, error: type[BrtError]) -> None:
    """Make the flag of ``message`` NaN if ``value`` is; no value clears it."""
    flags = _flags_of.get(value.device)
    if flags is None:
        flags = _flags_of[value.device] = _Flags(_new_pool(value.device))
    key = (torch.cuda.current_stream(value.device).cuda_stream, error, message)
    flag = flags.flag_of.get(key)
    if flag is None:
        flag = flags.flag_of[key] = flags.pool[min(len(flags.flag_of), _NUM_FLAGS - 1)]
    torch.maximum(flag, value, out=flag)


def _new_pool(device: torch.device) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        # In the graph's memory, each replay would clear it; and no other can be had now.
        raise BrtError(
            "the first value check on a device cannot be captured in a CUDA graph; "
            "run the region once before, or set BRT_CHECK=off"
        )
    pool = torch.zeros(_NUM_FLAGS, device=device)
    torch.cuda.synchronize(device)
    return pool
