"""What `brt.optimize` returns, and the regions inside it that run by a rewritten graph."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, fx, nn

from brt.errors import PassError
from brt.guard import Count, Guard, Guarded, Skip
from brt.report.data import Report

if TYPE_CHECKING:
    from brt.drift import Follower
    from brt.passes.base import Pass
    from brt.profile import Profile

_BOOKKEEPING = tuple(nn.Module().__dict__)


class OtherArguments(Exception):  # noqa: N818 - it is caught, never shown
    """A region is called with arguments for which it was not traced."""


@fx.node.has_side_effect
def expect(value: Any, fixed: Any, name: str) -> None:
    """Leave the graph where an argument that the trace fixed has another value."""
    if value is not fixed and (isinstance(value, Tensor) or value != fixed):
        raise OtherArguments(name)


@fx.node.has_side_effect
def expect_given(value: Any, name: str) -> None:
    """Leave the graph where an argument that the trace had is left out."""
    if value is None:
        raise OtherArguments(name)


class NotPickled:
    """Can be copied (`copy.deepcopy`), and says what to do instead of pickling it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state: Any = self.__getstate__()
        twin.__setstate__(deepcopy(state, memo))  # type: ignore[attr-defined]
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PassError(
            "an optimised module is not pickled: save its state_dict(), and optimise again where "
            "it is loaded"
        )


class Plan:
    """How a region runs: by its rewritten graph, or by its own code where that does not apply.

    A graph holds for the mode (train or eval) and the plain arguments that it was traced with, and
    while the modules whose code is in it have no forward hooks.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        path: str,
        opened: Iterable[nn.Module],
        inserted: Mapping[str, nn.Module],
    ) -> None:
        self.guard = Guard(f"region:{path or 'model'}", "modes, arguments and hooks of the trace")
        self._run = run
        self._mode = module.training
        self._modes = tuple((inner, inner.training) for inner in opened)
        self.inserted = dict(inserted)

    def __call__(
        self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What the module's own forward would return."""
        if self._applies(module):
            try:
                out = self._run(module, *args, **kwargs)
            except OtherArguments:
                pass
            else:
                self._count(True)
                return out
        self._count(False)
        return own(module, *args, **kwargs)

    def _applies(self, module: nn.Module) -> bool:
        if module.training != self._mode:
            return False
        for inner, mode in self._modes:
            if inner.training != mode or inner._forward_hooks or inner._forward_pre_hooks:
                return False
        return True

    def _count(self, held: bool) -> None:
        if not torch.compiler.is_compiling():
            self.guard.count(held)


class RegionModule(NotPickled, nn.Module):
    """Mixed into the class of a region's module, whose forward then goes by a plan."""

    _brt_plan: Plan

    def train(self, mode: bool = True) -> Self:
        """Set the mode, also of what passes inserted."""
        super().train(mode)
        for module in self._brt_plan.inserted.values():
            module.train(mode)
        return self


def take_over(module: nn.Module, plan: Plan) -> None:
    """Let a module run by a plan. It stays what it is: its class becomes a subclass of its own."""
    module.__dict__["_brt_plan"] = plan
    module.__class__ = _planned(type(module))  # type: ignore[arg-type]


@functools.cache
def _planned(made: type[nn.Module]) -> type[nn.Module]:
    own = made.forward

    @functools.wraps(own)
    def forward(self: RegionModule, *args: Any, **kwargs: Any) -> Any:
        return self._brt_plan(self, own, args, kwargs)

    members = {"forward": forward, "__module__": made.__module__, "__doc__": made.__doc__}
    return type(made.__name__, (RegionModule, made), members)


class Optimized(NotPickled, nn.Module):
    """A model after `brt.optimize`: the same results, state and methods, by another graph.

    It shares the original's parameters and buffers, under the same names, until ``to``, ``half``
    and the like give it tensors of its own; the original stays as it was.
    """

    _report: Report
    _made_by: tuple[tuple[Pass, ...], Profile | None]
    _follower: Follower | None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # The very containers: who changes them in one place changes them in the other
        self.__dict__.update({name: model.__dict__[name] for name in _BOOKKEEPING})
        self._behind = (model,)  # in a tuple, where torch.nn does not look
        self._follower = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        if self._follower is not None and not torch.compiler.is_compiling():
            self._follower.called(args, kwargs)
        return self._behind[0].forward(*args, **kwargs)

    @property
    def report(self) -> Report:
        """What each pass did; print it."""
        return self._report

    @property
    def stats(self) -> Mapping[str, Count]:
        """Guard -> how often it held (hits), and did not; ``on_drift`` adds ``load:<router>``."""
        return {**self.counts(), **(self._follower.loads.read() if self._follower else {})}

    @property
    def replans(self) -> int:
        """How often another plan took over."""
        return self._follower.replans if self._follower else 0

    def counts(self) -> Mapping[str, Count]:
        """`stats` of the guards alone."""
        return {guard.name: guard.read() for guard in self._guards()}

    def reset_stats(self) -> None:
        """Count from zero again."""
        for guard in self._guards():
            guard.reset()
        if self._follower is not None:
            self._follower.loads.reset()

    def _take(self, other: Optimized) -> None:
        """Run as ``other`` from the next call on; a call that is under way ends as it began."""
        model = other._behind[0]
        self._behind = (model,)
        self.__dict__.update({name: model.__dict__[name] for name in _BOOKKEEPING})
        self._report, self._made_by = replace(other._report, stats=self.counts), other._made_by

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write how this was made, for `brt.load`: passes, profile, measurements; no weights.

        The file is safetensors. Raises `PassError` for a pass that cannot be named in a file.
        """
        from brt.plan_files import save_plan  # it imports optimize, which imports this

        save_plan(self, Path(path))

    def train(self, mode: bool = True) -> Self:
        """Set the mode."""
        self._behind[0].train(mode)
        self.training = self._behind[0].training
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_behind" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self._behind[0], name)

    def __getitem__(self, index: Any) -> Any:
        return self._behind[0][index]  # type: ignore[index]

    def __iter__(self) -> Any:
        return iter(self._behind[0])  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self._behind[0])  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    __hash__ = nn.Module.__hash__

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._behind[0]._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._behind[0]._load_from_state_dict(*args, **kwargs)

    @property
    def inserted(self) -> Mapping[str, nn.Module]:
        """What passes put into the graphs, by place and name; `modules` does not list it."""
        return {
            f"{path}.{name}" if path else name: module
            for path, plan in self._plans().items()
            for name, module in plan.inserted.items()
        }

    def _plans(self) -> dict[str, Plan]:
        named = self._behind[0].named_modules()
        return {path: m._brt_plan for path, m in named if isinstance(m, RegionModule)}

    def _guards(self) -> list[Guard]:
        plans = self._plans().values()
        inserted = [m for plan in plans for m in plan.inserted.values() if isinstance(m, Guarded)]
        return [*(plan.guard for plan in plans), *(module.guard for module in inserted)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        slots = [
            (module, name, parameter)
            for module in (self.modules() if recurse else [self])
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        # Without this torch writes the converted values into the parameters: the original's too
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            super()._apply(fn, recurse)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        chosen: dict[int, nn.Parameter] = {}
        for module, name, old in slots:
            new = module._parameters[name]
            assert new is not None
            # Tied parameters stay tied, and what did not change stays shared
            kept = chosen.setdefault(id(old), old if _same_memory(new, old) else new)
            if kept is not new:
                setattr(module, name, kept)
        for module in self.inserted.values():
            module._apply(fn, recurse)
            if isinstance(module, (Guarded, Skip)):
                module.forget()
        return self


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.device == b.device
        and a.layout == b.layout == torch.strided
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
        and not a.is_meta
    )
