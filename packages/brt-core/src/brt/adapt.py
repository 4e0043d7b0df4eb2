"""Other libraries' modules become brt routers and experts, in place, by the adapters on offer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from brt import plugins
from brt.errors import PluginError
from brt.specs import AdapterSpec


@dataclass(frozen=True)
class Adapted:
    """What `adapt` did to a model.

    Attributes:
        changed: (module path, adapter) of each module that is brt's now.
        left: (module path, why) of each that an adapter knows and leaves as it is.
    """

    changed: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        rows = [(path, f"by {adapter}") for path, adapter in self.changed]
        rows += [(path, f"left: {why}") for path, why in self.left]
        if not self.changed:
            rows.insert(0, ("", "nothing was adapted: no adapter takes a module of this model"))
        width = max(len(path) for path, _ in rows)
        return "\n".join(f"{path:<{width}}  {what}".strip() for path, what in rows)


@dataclass(frozen=True)
class _Place:
    """Where a module stands in a model; the model itself has no parent."""

    path: str
    module: nn.Module
    parent: nn.Module | None = None
    name: str = ""


def adapt(model: nn.Module) -> Adapted:
    """Make brt's every module of ``model`` that an installed adapter matches, in place.

    What they become shares the parameters that were there, under the same names. Inside a module
    that was matched no other is looked for. Two adapters that match one module, and one that
    changes the names of parameters, are errors.
    """
    specs = plugins.collect("adapters")
    planned: list[tuple[_Place, AdapterSpec]] = []
    left: list[tuple[str, str]] = []
    for place, matching in _matches(_Place("", model), list(specs.values()), left):
        if len(matching) > 1:
            names = " and ".join(f"{spec.name!r} of {owner}" for spec, owner in matching)
            raise PluginError(f"adapt: {_named(place)} is matched by {names}")
        planned.append((place, matching[0][0]))
    made = [(place, _made(place, spec)) for place, spec in planned]
    for place, new in made:
        if place.parent is not None:
            setattr(place.parent, place.name, new)
    changed = tuple((place.path or type(model).__name__, spec.name) for place, spec in planned)
    return Adapted(changed, tuple(left))


def _made(place: _Place, spec: AdapterSpec) -> nn.Module:
    """What an adapter makes of a module, checked."""
    before = set(place.module.state_dict(keep_vars=True))
    new = spec.adapt(place.module)
    after = set(new.state_dict(keep_vars=True))
    if before != after:
        lost, added = sorted(before - after), sorted(after - before)
        raise PluginError(
            f"adapt: {spec.name!r} changes the state of {_named(place)}: lost {lost}, added {added}"
        )
    if place.parent is None and new is not place.module:
        raise PluginError(
            f"adapt: {spec.name!r} would put another module in place of the model itself; adapt a "
            "module that contains it"
        )
    return new


Matching = list[tuple[AdapterSpec, str]]


def _matches(
    place: _Place, specs: Matching, left: list[tuple[str, str]]
) -> Iterator[tuple[_Place, Matching]]:
    """Every place with the adapters that match it, from the model inwards."""
    matching = [(spec, owner) for spec, owner in specs if spec.matches(place.module)]
    if matching:
        yield place, matching
        return
    for spec, _ in specs:
        why = spec.leaves(place.module) if spec.leaves is not None else None
        if why is not None:
            left.append((place.path or type(place.module).__name__, why))
    for name, child in place.module.named_children():
        path = f"{place.path}.{name}" if place.path else name
        yield from _matches(_Place(path, child, place.module, name), specs, left)


def _named(place: _Place) -> str:
    return f"{place.path or 'the model'} ({type(place.module).__name__})"
