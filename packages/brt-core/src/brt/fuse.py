"""`fuse`: several modules that run side by side, as one.

Legend: P modules, R rows of all of them together, S trailing dims of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from brt.errors import PassError
from brt.passes.fuse_conv_chains import ChainReader
from brt.passes.fuse_horizontal import LevelReader
from brt.passes.fusion import FusedBranches, NotFusableError, Reader, read_module
from brt.passes.levels import GroupedLevels, PaddedLevels
from brt.race import race

How = Literal["auto", "loop", "padded", "grouped", "chain"]

_SECONDS = 2.0


@dataclass(frozen=True)
class Tried:
    """One way to run the modules.

    Attributes:
        how: its name.
        seconds: median of a call on the sample; None where it was not measured.
        why: why it cannot be; None where it can.
        chosen: whether it is the one that runs.
    """

    how: str
    seconds: float | None = None
    why: str | None = None
    chosen: bool = False

    def __str__(self) -> str:
        if self.why is not None:
            return f"{self.how}: {self.why}"
        time = "" if self.seconds is None else f" {1e3 * self.seconds:.3f} ms"
        return f"{self.how}:{time or ' not measured'}{', chosen' if self.chosen else ''}"


class FusedModules(nn.Module):
    """Modules as one: ``forward(rows)`` takes and gives one tensor for each of them.

    It holds the modules themselves, under ``modules_P``, so that their parameters are trained,
    moved and saved as ever. Loads unlike the sample's, and none at all, give the modules' results.
    """

    def __init__(
        self, modules: Sequence[nn.Module], form: FusedBranches | None, tried: Sequence[Tried]
    ) -> None:
        super().__init__()
        self.modules_P = nn.ModuleList(modules)
        # In a tuple, where torch.nn does not look: it has no state of its own
        self._form = (form,)
        self.tried = tuple(tried)

    @property
    def how(self) -> str:
        """The way that was chosen."""
        return next(one.how for one in self.tried if one.chosen)

    @property
    def report(self) -> str:
        """Every way with its time, or why it cannot be."""
        return "\n".join(map(str, self.tried))

    def forward(self, rows_P: Sequence[Tensor]) -> list[Tensor]:
        """``[modules_P[p](rows_P[p]) ...]``."""
        if len(rows_P) != len(self.modules_P):
            raise PassError(f"fuse: {len(rows_P)} inputs for {len(self.modules_P)} modules")
        form = self._form[0]
        if form is None:
            return [module(rows) for module, rows in zip(self.modules_P, rows_P, strict=True)]
        return _run(form, rows_P)

    def extra_repr(self) -> str:
        """The way that was chosen."""
        return f"how={self.how}"


def fuse(
    modules: Sequence[nn.Module], sample_inputs: Sequence[Tensor], how: How = "auto"
) -> FusedModules:
    """Run modules that work on inputs of their own, side by side, as one module.

    ``how``: "loop" calls one after the other; "grouped" makes one operator of each level of linear
    layers; "padded" one batched product, with as many rows for each module as the fullest has;
    "chain" makes one operator of whole convolutional branches. Modules may differ in width, depth
    and activation. "auto" measures those that can be on the sample, and takes the fastest;
    ``fused.report`` says what it measured. These are the forms that `fuse-horizontal` and
    `fuse-conv-chains` put into graphs.

    Args:
        modules: P modules of one tensor to one tensor, which keep the rows of dim 0 apart.
        sample_inputs: a tensor for each of them, with a usual number of rows.
        how: which way; one that cannot be raises `PassError`, with the reason.
    """
    modules, inputs_P = list(modules), list(sample_inputs)
    _check(modules, inputs_P, how)
    names = [name for name in get_args(How) if name != "auto"] if how == "auto" else [how]
    forms: dict[str, FusedBranches | None] = {}
    why: dict[str, str] = {}
    for name in names:
        try:
            forms[name] = _FORMS[name](modules, inputs_P)
        except NotFusableError as error:
            why[name] = str(error)
    if how != "auto" and why:
        raise PassError(f"fuse: how={how!r} cannot be: {why[how]}")
    times = _measured(modules, inputs_P, forms) if how == "auto" else {}
    best = min(times, key=times.__getitem__) if times else how
    tried = [Tried(n, times.get(n), why.get(n), n == best) for n in names]
    return FusedModules(modules, forms[best], tried)


def _check(modules: list[nn.Module], inputs_P: list[Tensor], how: str) -> None:
    if how not in get_args(How):
        raise PassError(f"fuse: how must be one of {', '.join(get_args(How))}, got {how!r}")
    if not modules or len(modules) != len(inputs_P):
        raise PassError(
            f"fuse: {len(modules)} modules and {len(inputs_P)} sample inputs; give one for each"
        )
    for p, (module, rows) in enumerate(zip(modules, inputs_P, strict=True)):
        if not isinstance(module, nn.Module) or not isinstance(rows, Tensor) or rows.ndim == 0:
            raise PassError(
                f"fuse: module {p} and its sample must be an nn.Module and a tensor with rows, got "
                f"{type(module).__name__} and {type(rows).__name__}"
            )


def _loop(modules: list[nn.Module], inputs_P: list[Tensor]) -> None:
    """The modules as they are."""


def _grouped(modules: list[nn.Module], inputs_P: list[Tensor]) -> FusedBranches:
    return _read(LevelReader(), modules, inputs_P)


def _padded(modules: list[nn.Module], inputs_P: list[Tensor]) -> FusedBranches:
    levels = _read(LevelReader(), modules, inputs_P)
    if not isinstance(levels, GroupedLevels):
        raise NotFusableError("modules of several kinds are no batch")
    return PaddedLevels(levels.branches)


def _chain(modules: list[nn.Module], inputs_P: list[Tensor]) -> FusedBranches:
    return _read(ChainReader(), modules, inputs_P)


_FORMS: dict[str, Callable[[list[nn.Module], list[Tensor]], FusedBranches | None]] = {
    "loop": _loop,
    "padded": _padded,
    "grouped": _grouped,
    "chain": _chain,
}


def _read(reader: Reader, modules: list[nn.Module], inputs_P: list[Tensor]) -> FusedBranches:
    shapes = {(tuple(rows.shape[1:]), rows.dtype, rows.device) for rows in inputs_P}
    if len(shapes) > 1:
        raise NotFusableError(f"inputs are not alike: {sorted(map(str, shapes))}")
    for p, module in enumerate(modules):
        try:
            read_module(reader, module)
        except NotFusableError as error:
            raise NotFusableError(f"module {p}: {error}") from error
    form = reader.module()
    form.train(modules[0].training)
    return form


def _run(form: FusedBranches, rows_P: Sequence[Tensor]) -> list[Tensor]:
    sizes = [rows.shape[0] for rows in rows_P]
    rows_RS = torch.cat(list(rows_P))
    offsets_P1 = torch.tensor([0, *sizes], device=rows_RS.device).cumsum(0)
    return list(form.run(rows_RS, offsets_P1).split(sizes))


def _measured(
    modules: list[nn.Module], inputs_P: list[Tensor], forms: dict[str, FusedBranches | None]
) -> dict[str, float]:
    """Median seconds of each form on the sample, without gradients."""
    runs: list[Callable[[], Any]] = []
    for form in forms.values():
        runs.append(partial(FusedModules(modules, form, ()), inputs_P))
    with torch.no_grad():
        times = race(runs, inputs_P[0].device, seconds=_SECONDS)
    return dict(zip(forms, times, strict=True))
