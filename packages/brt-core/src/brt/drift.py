"""Loads that drift away from the profile: counted while a model runs, and planned for anew.

Legend: P paths.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from brt.errors import PassError, PluginWarning
from brt.guard import Count
from brt.passes.match import _module_draws
from brt.passes.verify import cloned
from brt.routers import Router

if TYPE_CHECKING:
    from brt.optimized import Optimized
    from brt.profile import Profile

Plan = Callable[[nn.Module, "Profile", Any], "Optimized"]
"""``plan(model, profile, sample)``: the model optimised as before, for another profile."""


@dataclass(frozen=True)
class OnDrift:
    """What to do when loads are no longer those of the profile: ``brt.optimize(on_drift=...)``.

    Args:
        threshold: the drift of a router (see `Drift`) above which the model is planned anew.
        every: calls of the model between two looks at the loads; each look reads the device once.
        keep: recent batches that are copied, and make the next profile.
        replan: False only counts.
    """

    threshold: float = 0.25
    every: int = 100
    keep: int = 4
    replan: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise PassError(f"OnDrift: threshold must be in (0, 1], got {self.threshold}")
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise PassError(f"OnDrift: {name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Drift(Count):
    """How far the loads of a router are from the profile's.

    Attributes:
        hits: calls of the model that were counted.
        distance: sum of ``|seen - profiled|`` over sum of ``max(seen, profiled)``: 0 where every
            path has as many rows as it had, 1 where no row is where it was.
        seen_P, profiled_P: mean rows of each path in one call of the model.
    """

    distance: float = 0.0
    seen_P: tuple[float, ...] = ()
    profiled_P: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"drift {self.distance:.2f} over {self.hits} calls"


class Loads:
    """Rows of every path of a model's routers, summed on the device by two small operators a call.

    Nothing is read until `read`, and nothing counts in compiled graphs.
    """

    def __init__(self, fast: Optimized, profile: Profile) -> None:
        self.profiled = _per_forward(profile)
        self.num_calls = 0
        self._sums: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._handles = [
            router.register_observer(_Summing(self, name)) for name, router in _routers(fast)
        ]

    def add(self, name: str, load_P: Tensor) -> None:
        """Count the rows of one decision."""
        with self._lock, torch.no_grad():
            found = self._sums.get(name)
            if found is None or found.device != load_P.device:
                self._sums[name] = load_P.clone()
            else:
                found.add_(load_P)

    def read(self) -> dict[str, Drift]:
        """{"load:" + path of a router: its drift}, since the last `reset`."""
        with self._lock:
            sums = {name: sum_P.double().cpu() for name, sum_P in self._sums.items()}
        found = {}
        for name, profiled_P in self.profiled.items():
            if not self.num_calls:
                found[f"load:{name}"] = Drift(profiled_P=tuple(profiled_P.tolist()))
                continue
            seen_P = sums.get(name, torch.zeros_like(profiled_P)) / self.num_calls
            most = float(seen_P.maximum(profiled_P).sum())
            distance = float((seen_P - profiled_P).abs().sum()) / most if most else 0.0
            each = (tuple(seen_P.tolist()), tuple(profiled_P.tolist()))
            found[f"load:{name}"] = Drift(self.num_calls, 0, distance, *each)
        return found

    def reset(self) -> None:
        """Count from zero again."""
        with self._lock:
            self._sums.clear()
            self.num_calls = 0

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()


class _Summing:
    """An observer of one router."""

    def __init__(self, loads: Loads, name: str) -> None:
        self._loads, self._name = loads, name

    def __call__(self, router: Router, route: Any, scores: Tensor) -> None:
        self._loads.add(self._name, route.load_P)


class Follower:
    """Watches the loads of an optimised model, and swaps in a new plan where they drift.

    Planning runs on a thread of its own, on the model as it is then; calls that are under way end
    on the plan on which they began.
    """

    def __init__(
        self, fast: Optimized, model: nn.Module, profile: Profile, settings: OnDrift, plan: Plan
    ) -> None:
        require_no_random(model)
        self.replans = 0
        self.failure: str | None = None
        """Why the last attempt to plan anew failed; None where none did."""
        self.settings = settings
        self._fast, self._model, self._plan = fast, model, plan
        self._recent: deque[Any] = deque(maxlen=settings.keep)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.loads = Loads(fast, profile)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of the model is not followed."""

    def called(self, args: Any, kwargs: Any) -> None:
        """Count a call of the model; look at the loads where it is time."""
        settings = self.settings
        with self._lock:
            self.loads.num_calls += 1
            at = self.loads.num_calls
            if settings.replan and at % max(1, settings.every // settings.keep) == 0:
                self._recent.append(cloned((args, kwargs)))
            idle = self._thread is None or not self._thread.is_alive()
            if settings.replan and at >= settings.every and at % settings.every == 0 and idle:
                self._thread = threading.Thread(target=self._look, daemon=True, name="brt-drift")
                self._thread.start()

    def wait(self) -> None:
        """Until the planning that is under way, if any, has ended."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _look(self) -> None:
        try:
            found = self.loads.read().values()
            if max((drift.distance for drift in found), default=0.0) > self.settings.threshold:
                self._replan()
        except Exception as error:  # a thread has nobody to raise to
            first, self.failure = self.failure is None, f"{type(error).__name__}: {error}"
            if first:
                warnings.warn(
                    f"on_drift: planning anew failed, the old plan stays: {self.failure}",
                    PluginWarning,
                    stacklevel=2,
                )

    def _replan(self) -> None:
        from brt.profile import profile

        base = tied_copy(self._model, self._fast)
        with self._lock:
            batches = [_batch(*call) for call in self._recent]
        found = profile(base, batches, progress=False)
        new = self._plan(base, found, batches[-1])
        if not _same_tensors(new, self._fast) or new.training != self._fast.training:
            return  # moved, loaded or set to another mode in between: the next look plans again
        loads = Loads(new, found)
        self._fast._take(new)
        self.loads.close()
        self.loads = loads
        self.replans += 1


def require_no_random(model: nn.Module) -> None:
    """Raise where planning on another thread would change what the model draws."""
    for name, module in model.named_modules():
        why = _module_draws(module)
        if why is not None:
            raise PassError(f"on_drift: the model draws random numbers: {name}: {why}")


def tied_copy(model: nn.Module, fast: nn.Module) -> nn.Module:
    """The model as it was, around the tensors and in the mode that ``fast`` has now."""
    from brt.passes.prepare import copy_of

    base = copy_of(model)
    theirs = dict(fast.named_modules())
    for name, module in base.named_modules():
        now = theirs[name]
        for table in ("_parameters", "_buffers"):
            for key in module.__dict__[table]:
                module.__dict__[table][key] = now.__dict__[table][key]
        module.training = now.training
    return base


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)


def _batch(args: Any, kwargs: dict[str, Any]) -> Any:
    """A call as the batch that `brt.profile` takes."""
    if args and kwargs:
        raise PassError("on_drift: call the model with positional arguments, or with keywords")
    return kwargs or args


def _per_forward(profile: Profile) -> Mapping[str, Tensor]:
    """Router path -> mean rows of each path in one forward of the model, over all its calls."""
    found: dict[str, Tensor] = {}
    for router in profile.routers.values():
        rows_P = router.rows_FP.sum(0).double() / max(profile.num_forwards, 1)
        found[router.module] = found.get(router.module, torch.zeros_like(rows_P)) + rows_P
    return found


def _routers(fast: Optimized) -> Iterator[tuple[str, Router]]:
    """The routers that decide in an optimised model, by the paths that the profile has for them."""
    for name, module in fast.named_modules():
        if isinstance(module, Router):
            yield name, module
    for place, inserted in fast.inserted.items():
        region = place.rpartition(".")[0]
        for module in inserted.modules():
            target = getattr(module, "stands_for", "")
            if isinstance(module, Router) and target:
                yield f"{region}.{target}" if region else target, module
