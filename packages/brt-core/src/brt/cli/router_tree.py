"""The routers of a model as a tree for the terminal: what is alike is drawn once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from rich.markup import escape
from rich.tree import Tree


@dataclass
class Place:
    """A module that is a router, or has some inside."""

    router: str = ""
    what: str = ""
    inside: dict[str, Place] = field(default_factory=dict)


def drawn(title: str, summary: str, routers: Iterable[Mapping[str, str]]) -> Tree:
    """The tree of routers, each a mapping with "place", "router" and "what"."""
    root = Place()
    for router in routers:
        at = root
        for part in router["place"].split("."):
            at = at.inside.setdefault(part, Place())
        at.router, at.what = router["router"], router["what"]
    tree = Tree(f"[bold]{escape(title)}[/]: {escape(summary)}")
    _grow(tree, root)
    return tree


def _grow(tree: Tree, place: Place) -> None:
    for names, inner in _alike(place.inside):
        label = _numbers(names)
        while not inner.router and len(inner.inside) == 1:
            ((name, inner),) = inner.inside.items()
            label += f".{name}"
        about = f" {inner.router} [dim]{escape(inner.what)}[/]" if inner.router else ""
        _grow(tree.add(f"[cyan]{escape(label)}[/]{about}"), inner)


def _alike(inside: Mapping[str, Place]) -> list[tuple[list[str], Place]]:
    """Names of neighbours by number that hold the same, and one of them."""
    found: list[tuple[list[str], Place]] = []
    for name, place in inside.items():
        if found and name.isdigit() and found[-1][0][-1].isdigit() and found[-1][1] == place:
            found[-1][0].append(name)
        else:
            found.append(([name], place))
    return found


def _numbers(names: list[str]) -> str:
    """One name as it is; numbers as ranges: 0-3, 5."""
    if len(names) == 1:
        return names[0]
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(map(int, names)), lambda pair: pair[1] - pair[0])
    ]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ", ".join(texts) + "}"
