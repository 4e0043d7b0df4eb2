"""Other libraries' modules become brt routers and experts, in place, by the adapters on offer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from brt import plugins
from brt.errors import PluginError
from brt.specs import AdapterSpec


@dataclass(frozen=True)
class Adapted:
    """What `adapt` did to a model: (module path, adapter) of each module that it replaced."""

    changed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        if not self.changed:
            return "nothing was adapted: no installed adapter matches a module of this model"
        width = max(len(path) for path, _ in self.changed)
        return "\n".join(f"{path:<{width}}  by {adapter}" for path, adapter in self.changed)


def adapt(model: nn.Module) -> Adapted:
    """Replace every module of ``model`` that an installed adapter matches, in place.

    The replacements share the parameters of what they replace, under the same names. The root
    itself cannot be replaced in place: adapt a module that contains it. Two adapters that match one
    module, and one that changes the names of parameters, are errors, and nothing is changed.
    """
    specs = plugins.collect("adapters")
    planned: list[tuple[nn.Module, str, str, AdapterSpec]] = []
    for path, parent, name, child in _children(model, ""):
        matching = [(spec, owner) for spec, owner in specs.values() if spec.matches(child)]
        if len(matching) > 1:
            names = " and ".join(f"{spec.name!r} of {owner}" for spec, owner in matching)
            raise PluginError(f"adapt: {path} ({type(child).__name__}) is matched by {names}")
        if matching:
            planned.append((parent, name, path, matching[0][0]))
    replacements = []
    for parent, name, path, spec in planned:
        old = getattr(parent, name)
        new = spec.adapt(old)
        before, after = set(old.state_dict(keep_vars=True)), set(new.state_dict(keep_vars=True))
        if before != after:
            lost, added = sorted(before - after), sorted(after - before)
            raise PluginError(
                f"adapt: {spec.name!r} changes the state of {path}: lost {lost}, added {added}"
            )
        replacements.append((parent, name, new))
    for parent, name, new in replacements:
        setattr(parent, name, new)
    return Adapted(tuple((path, spec.name) for _, _, path, spec in planned))


def _children(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """(path, parent, name, child) of every module below, parents first."""
    found = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        found.append((path, module, name, child))
        found += _children(child, path)
    return found
