"""What earlier optimisations measured: a saved plan's, or the tuning store's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from brt import plugins, tuning
from brt.passes.base import Candidate, Pass
from brt.tuning import Choice, Store

if TYPE_CHECKING:
    from brt.passes.run import Work
    from brt.profile import Profile

Form = tuple[tuple[str, ...], tuple[Candidate, ...]]
"""The passes that are kept in a region, and all forms of it that were measured."""


@dataclass(frozen=True, eq=False)
class Remembered:
    """Choices that need not be measured again.

    Attributes:
        store: of this machine; None for none.
        decisions: of a saved plan, by the keys of `Context.decide`.
        forms: of a saved plan: {region: what was kept there}.
    """

    store: Store | None = None
    decisions: Mapping[str, bool] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)

    def decisions_of(self, one: Pass, work: Work) -> Mapping[str, bool]:
        """What `Context.known` is to be, before the pass runs."""
        # Without a sample a pass decides by what it knows, and measures nothing
        if self.store is None or not work.calls:
            return self.decisions
        key = tuning.key_of(work.key, repr(one), work.graph.code)
        return _Decisions(self.decisions, self.store, key, f"{one.name} on {work.type}", _on(work))

    def form(self, work: Work, passes: tuple[Pass, ...]) -> Form | None:
        """Which form of a region was kept before; None where that is not known."""
        if work.path in self.forms:
            return self.forms[work.path]
        if self.store is None or not work.calls:
            return None
        found = self.store.get(tuning.key_of(work.key, passes))
        if found is None:
            return None
        candidates = (Candidate(tuple(names), s, kept) for names, s, kept in found.value["all"])
        return tuple(found.value["kept"]), tuple(candidates)

    def keep_form(self, work: Work, passes: tuple[Pass, ...], form: Form) -> None:
        """Write to the store which form of a region is kept."""
        if self.store is None:
            return
        kept, candidates = form
        value = {
            "kept": list(kept),
            "all": [[list(c.passes), c.seconds, c.kept] for c in candidates],
        }
        what = f"{work.type}: {' + '.join(kept) or 'the original'}"
        choice = Choice("region", _on(work), what, value)
        self.store.put(tuning.key_of(work.key, passes), choice)


@dataclass(frozen=True, eq=False)
class _Decisions(Mapping[str, bool]):
    """Decisions of a plan, then those of the store."""

    plan: Mapping[str, bool]
    store: Store
    key: str
    what: str
    device: str

    def __getitem__(self, name: str) -> bool:
        if name in self.plan:
            return self.plan[name]
        found = self.store.get(tuning.key_of(self.key, name))
        if found is None:
            raise KeyError(name)
        return bool(found.value)

    def keep(self, decisions: Mapping[str, bool]) -> None:
        """Write new ones to the store."""
        for name, worth in decisions.items():
            if name not in self:
                what = f"{self.what}: {name} {'is' if worth else 'is not'} worth it"
                self.store.put(
                    tuning.key_of(self.key, name), Choice("decision", self.device, what, worth)
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)


def keep(known: Mapping[str, bool], decisions: Mapping[str, bool]) -> None:
    """Write what a pass has measured to where ``known`` came from."""
    if isinstance(known, _Decisions):
        known.keep(decisions)


def region_key(work: Work) -> str:
    """What measurements of a region depend on: machine, code, shapes, and where cells go.

    Numbers of rows are taken in classes, by powers of two; values of weights do not matter.
    """
    state = [(name, *_form(t)) for name, t in work.scope.state_dict(keep_vars=True).items()]
    leaves = [pytree.tree_leaves((call.args, call.kwargs)) for call in work.calls]
    inputs = [
        (tuning.size_class(leaf.shape[0]) if leaf.ndim else 1, leaf.shape[1:], *_form(leaf)[1:])
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for call in leaves
        for leaf in call
    ]
    kernels = sorted(plugins.collect("kernels"))
    settings = (work.scope.training, torch.is_inference_mode_enabled())
    parts = (repr(work.scope), work.graph.code, state, inputs, _loads(work.profile), settings)
    return tuning.key_of(tuning.versions(), kernels, _on(work), *parts)


def _form(tensor: Any) -> tuple[Any, ...]:
    if not isinstance(tensor, Tensor):
        return (repr(tensor),)
    return tuple(tensor.shape), tensor.dtype, tensor.device.type


def _loads(profile: Profile | None) -> list[Any]:
    if profile is None:
        return []
    return [
        (key, [tuning.size_class(math.ceil(rows)) for rows in router.rows.mean_P.tolist()])
        for key, router in profile.routers.items()
    ]


def _on(work: Work) -> str:
    return tuning.device_name(work.device)
