"""What a profile is: frozen statistics of routes.

Legend: F forwards, P paths, Q paths of a second router, A modules around a router, B bins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from brt.errors import ProfileError
from brt.routers import EarlyExit, GatherRouter, Router

MARGIN_EDGES: tuple[float, ...] = (0.0, *(2.0**e for e in range(-16, 9)))
"""Bins of margins: below 0, [0, 2**-16), [2**-16, 2**-15), ..., 2**8 and above."""

_TENSORS = ("forward_F", "scope_FA", "cells_F", "rows_FP", "unrouted_F", "dropped_F", "margins_FB")


@dataclass(frozen=True, eq=False)
class Loads:
    """One number for each path and forward, and its statistics over forwards.

    All are 0 where there are no forwards.
    """

    values_FP: Tensor

    @property
    def mean_P(self) -> Tensor:
        """Float64 ``[P]``."""
        return self.values_FP.double().mean(0) if len(self.values_FP) else self._none()

    @property
    def min_P(self) -> Tensor:
        """Float64 ``[P]``."""
        return self.values_FP.double().amin(0) if len(self.values_FP) else self._none()

    @property
    def max_P(self) -> Tensor:
        """Float64 ``[P]``."""
        return self.values_FP.double().amax(0) if len(self.values_FP) else self._none()

    def percentile_P(self, percent: float) -> Tensor:
        """Float64 ``[P]``, interpolated linearly; ``percentile_P(50)`` is the median."""
        if not 0 <= percent <= 100:
            raise ProfileError(f"percentile_P: a percentage from 0 to 100, got {percent}")
        if not len(self.values_FP):
            return self._none()
        # By sorting: torch.quantile refuses more than 16M values
        ordered = self.values_FP.double().sort(0).values
        place = percent / 100 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def _none(self) -> Tensor:
        return torch.zeros(self.values_FP.shape[1], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class RouterProfile:
    """What one router decided in one of its calls within a forward, over all forwards.

    A cell takes a path at most once, so a path's rows are the cells that took it. All tensors are
    int64 on the CPU.

    Attributes:
        module: path of the router in the model.
        call: which of its calls within a forward, from 0.
        num_paths: P.
        forward_F: the forwards in which this call happened, ascending.
        scope_FA: which call of each module around the router it was part of, outermost first;
            -1 for one that was not called as a module (a ``ModuleList``).
        cells_F: cells that were decided about.
        rows_FP: rows of each path, after capacity.
        unrouted_F: cells on no path.
        dropped_F: choices that capacity dropped.
        margins_FB: histogram, by `MARGIN_EDGES`, of the cells' margins: the lowest score among the
            paths taken less the highest among the others. Cells that took all or no paths have
            none, nor have decisions that no scores ``[N, P]`` made.
    """

    module: str
    call: int
    num_paths: int
    forward_F: Tensor
    scope_FA: Tensor
    cells_F: Tensor
    rows_FP: Tensor
    unrouted_F: Tensor
    dropped_F: Tensor
    margins_FB: Tensor

    @property
    def key(self) -> str:
        """``module.path#call``."""
        return f"{self.module}#{self.call}"

    @property
    def num_forwards(self) -> int:
        """F."""
        return len(self.forward_F)

    @cached_property
    def cells(self) -> int:
        """Cells decided about, over all forwards."""
        return int(self.cells_F.sum())

    @property
    def rows(self) -> Loads:
        """Rows of the paths."""
        return Loads(self.rows_FP)

    @property
    def fractions(self) -> Loads:
        """Share of its cells that took each path; forwards without cells are left out."""
        some_F = self.cells_F > 0
        return Loads(self.rows_FP[some_F].double() / self.cells_F[some_F, None].double())

    @cached_property
    def share_P(self) -> Tensor:
        """Share of all cells that took each path, float64."""
        return self.rows_FP.sum(0).double() / max(self.cells, 1)

    @cached_property
    def always_P(self) -> Tensor:
        """Paths that every cell took, bool; all false where no cell was ever seen."""
        if self.cells == 0:
            return torch.zeros(self.num_paths, dtype=torch.bool)
        return (self.rows_FP == self.cells_F[:, None]).all(0)

    @cached_property
    def never_P(self) -> Tensor:
        """Paths that no cell took, bool; all false where no cell was ever seen."""
        if self.cells == 0:
            return torch.zeros(self.num_paths, dtype=torch.bool)
        return (self.rows_FP == 0).all(0)

    @cached_property
    def dropped(self) -> int:
        """Choices that capacity dropped, over all forwards."""
        return int(self.dropped_F.sum())

    @cached_property
    def unrouted(self) -> int:
        """Cells on no path, over all forwards."""
        return int(self.unrouted_F.sum())

    @cached_property
    def margins_B(self) -> Tensor:
        """Histogram of margins over all forwards, by `MARGIN_EDGES`."""
        return self.margins_FB.sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def select(self, index: list[int]) -> RouterProfile:
        """Only some of the forwards, by their places in `forward_F`."""
        chosen = torch.tensor(index, dtype=torch.int64)
        return self._with({k: v[chosen] for k, v in self.tensors().items()})

    @staticmethod
    def joined(parts: Iterable[RouterProfile]) -> RouterProfile:
        """One after another; the first says which router and call they are of."""
        parts = list(parts)
        return parts[0]._with({k: torch.cat([getattr(p, k) for p in parts]) for k in _TENSORS})

    def _with(self, tensors: dict[str, Any]) -> RouterProfile:
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class Profile:
    """Where the cells of sample inputs went in a model. Frozen; made by `brt.profile`.

    Attributes:
        model: class of the model.
        routers_of_model: {path: what it is} of every router in the model that decides.
        num_forwards: forwards of the model.
        window: how many earlier decisions about the same root each decision is counted with in
            `joint`; None = all.
        routers: {``module.path#call``: `RouterProfile`} in the order of their first calls.
        joint: {(key of an earlier call, key of a later call): int64 ``[P, Q]``}; how many cells of
            a root that both decided about took path p at the first and path q at the second.
    """

    model: str
    routers_of_model: Mapping[str, str]
    num_forwards: int
    window: int | None
    routers: Mapping[str, RouterProfile]
    joint: Mapping[tuple[str, str], Tensor]

    def __deepcopy__(self, memo: Any) -> Profile:
        """Itself: it is frozen."""
        return self

    def __post_init__(self) -> None:
        for name in ("routers_of_model", "routers", "joint"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def merge(self, *others: Profile) -> Profile:
        """The profile of all forwards, of this one and of others of the same model."""
        for other in others:
            mismatches = _mismatches(self.routers_of_model, other.routers_of_model)
            if self.window != other.window:
                mismatches.append(f"window={self.window} here, {other.window} there")
            if mismatches:
                raise ProfileError(_listed("merge: profiles of different models", mismatches))
        keys = dict.fromkeys(key for p in (self, *others) for key in p.routers)
        parts: dict[str, list[RouterProfile]] = {key: [] for key in keys}
        joint: dict[tuple[str, str], Tensor] = {}
        start = 0
        for one in (self, *others):
            for key, router in one.routers.items():
                shifted = dataclasses.replace(router, forward_F=router.forward_F + start)
                parts[key].append(shifted)
            for pair, counts in one.joint.items():
                joint[pair] = joint[pair] + counts if pair in joint else counts
            start += one.num_forwards
        return dataclasses.replace(
            self,
            num_forwards=start,
            routers={key: RouterProfile.joined(given) for key, given in parts.items()},
            joint=joint,
        )

    def region(self, path: str) -> Profile:
        """The profile of one submodule: keys start at it, and each of its calls is a forward.

        Where the number of its calls, or of a router's calls in it, changes from forward to
        forward, `joint` leaves out what cannot be told apart.
        """
        if not path:
            return self
        from brt.profile.region import region

        return region(self, path)

    def check(self, model: nn.Module) -> None:
        """Raise `ProfileError`, with all differences, unless this is a profile of such a model."""
        mismatches = _mismatches(self.routers_of_model, signature(model))
        if mismatches:
            came = type(model).__name__
            raise ProfileError(
                _listed(
                    f"this profile (of {self.model}) does not fit the model (a {came}); "
                    "profile it again",
                    mismatches,
                )
            )

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all that it holds."""
        from brt.profile.files import digest_of

        return digest_of(self)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from brt.profile.files import save_profile

        save_profile(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read what `save` wrote; `ProfileError` where it is damaged or of another schema."""
        from brt.profile.files import load_profile

        return load_profile(Path(path))

    def to_json(self) -> dict[str, Any]:
        """The statistics as plain values, for people's own programs; `save` keeps all of it."""
        from brt.profile.show import summary

        return summary(self)

    def plot(self, path: str | Path) -> None:
        """Draw the load of every path, and where cells go next, as a PNG. Needs matplotlib."""
        from brt.profile.show import plot

        plot(self, Path(path))

    def __str__(self) -> str:
        from brt.profile.show import text

        return text(self)


def signature(model: nn.Module) -> dict[str, str]:
    """{path: what it is} of every router in a model that decides."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Router) and not isinstance(module, (GatherRouter, EarlyExit)):
            num_paths = getattr(module, "num_paths", None)
            protocol = getattr(module, "protocol", None)
            parts = [repr(protocol)] if protocol is not None else []
            parts += [f"num_paths={num_paths}"] if num_paths is not None else []
            found[path] = f"{type(module).__name__}({', '.join(parts)})"
    return found


def _mismatches(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    found = []
    for path in sorted({*here, *there}):
        ours, theirs = here.get(path, "no router"), there.get(path, "no router")
        if ours != theirs:
            found.append(f"{path or 'the model itself'}: profiled as {ours}, now {theirs}")
    return found


def _listed(what: str, lines: list[str], most: int = 10) -> str:
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join([what + ":", *lines[:most], *more])
