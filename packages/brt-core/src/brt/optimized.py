"""What `brt.optimize` returns: a module in place of another, with its weights under its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from brt.errors import PassError
from brt.guard import Count, Guard, Guarded
from brt.report.data import Report

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


class StandIn(nn.Module):
    """A module in place of another: its parameters, buffers, submodules and hooks are shared."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # The very containers: who changes them in one place changes them in the other
        self.__dict__.update({name: module.__dict__[name] for name in _BOOKKEEPING})
        self._behind = (module,)  # in a tuple, where torch.nn does not look

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the other module returns."""
        return self._behind[0].forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of both."""
        self._behind[0].train(mode)
        self.training = self._behind[0].training
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PassError(
            "an optimised module is not pickled: save its state_dict(), and optimise again where "
            "it is loaded"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_behind" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self._behind[0], name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._behind[0]._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._behind[0]._load_from_state_dict(*args, **kwargs)


class RegionModule(StandIn):
    """A region that runs its rewritten graph; or its own code, where the graph does not apply.

    A graph holds for the mode (train or eval) and the plain arguments that it was traced with, and
    while the modules whose code is in it have no forward hooks.
    """

    def __init__(
        self, module: nn.Module, run: Callable[..., Any], path: str, opened: Iterable[nn.Module]
    ) -> None:
        super().__init__(module)
        self.guard = Guard(f"region:{path or 'model'}", "modes, arguments and hooks of the trace")
        self._run = run
        self._modes = tuple((inner, inner.training) for inner in opened)
        self._mode = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself would return."""
        if self._applies():
            try:
                out = self._run(self._behind[0], *args, **kwargs)
            except OtherArguments:
                pass
            else:
                self._count(True)
                return out
        self._count(False)
        return self._behind[0].forward(*args, **kwargs)

    def _applies(self) -> bool:
        if self.training != self._mode:
            return False
        for module, mode in self._modes:
            if module.training != mode or module._forward_hooks or module._forward_pre_hooks:
                return False
        return True

    def _count(self, held: bool) -> None:
        if not torch.compiler.is_compiling():
            self.guard.count(held)


class Optimized(StandIn):
    """A model after `brt.optimize`: the same results, state and methods, by another graph.

    It shares the original's parameters and buffers, under the same names, until it is moved or
    converted: ``to``, ``half`` and the like give it tensors of its own and leave the original as it
    was. Call `report` for what was done, and `stats` for how often its guards held.
    """

    _report: Report

    @property
    def report(self) -> Report:
        """What each pass did; print it."""
        return self._report

    @property
    def stats(self) -> Mapping[str, Count]:
        """Guard -> how often its assumption held (hits), and did not (fallbacks)."""
        return self.counts()

    def counts(self) -> Mapping[str, Count]:
        """`stats` as a method."""
        return {guard.name: guard.read() for guard in self._guards()}

    def reset_stats(self) -> None:
        """Count from zero again."""
        for guard in self._guards():
            guard.reset()

    def _guards(self) -> list[Guard]:
        held = [self._behind[0], *self.modules()]
        found = {id(m): m.__dict__["guard"] for m in held if "guard" in m.__dict__}
        return [guard for guard in found.values() if isinstance(guard, Guard)]

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
        for module in self.modules():
            if isinstance(module, Guarded):
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
