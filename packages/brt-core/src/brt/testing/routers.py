"""`check_router`: what a router promises.

Legend: N cells, P paths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from brt.passes.verify import cloned
from brt.route import Route
from brt.routers import Router
from brt.testing.rules import Rules, describe, equal, share_memory, tensors

_NUM_CELLS = (0, 1, 2, 17)


def check_router(router: Router, inputs: Callable[[int], tuple[Any, ...]]) -> None:
    """Raise `AssertionError` at the first rule of routers that this one breaks.

    ``inputs(num_cells)`` makes the arguments of one call for so many cells. What a router returns
    beside a `brt.Route` is taken for the rows of the route's paths.
    """
    rules = Rules(f"router {type(router).__name__}")
    rules.require(isinstance(router, Router), "is a brt.routers.Router")
    random = bool(getattr(getattr(router, "protocol", None), "stochastic", False))
    for num_cells in _NUM_CELLS:
        case = f"N={num_cells}"
        given = inputs(num_cells)
        kept = cloned(given)
        with rules.holds(f"takes any number of cells ({case})"):
            out = router(*given)
        rules.require(equal(given, kept), "leaves its input as it is", case)
        again = router(*given)
        if not random:
            rules.require(equal(out, again), "gives the same for the same input", case)
        rules.require(not share_memory(out, again), "returns other memory at the next call", case)
        _check_route(rules, out, num_cells, case)
    _observed(rules, router, inputs(3))
    _copied(rules, router, inputs(3), random)


def _check_route(rules: Rules, out: Any, num_cells: int, case: str) -> None:
    items = out if isinstance(out, tuple) else (out,)
    route = next((item for item in items if isinstance(item, Route)), None)
    if route is None or not isinstance(items[0], (tuple, list)):
        return
    paths = items[0]
    rules.require(
        len(paths) == route.num_paths,
        "gives the rows of every path",
        f"{case}: {len(paths)} sets of rows, {route.num_paths} paths",
    )
    rules.require(
        route.num_cells == num_cells,
        "routes the cells that it is given",
        f"{case}: {route.num_cells} in the route",
    )
    sizes = route.load_P.tolist()
    for p, rows in enumerate(paths):
        for one in tensors(rows):
            rules.require(
                one.shape[0] == sizes[p],
                "gives a path as many rows as its load",
                f"{case}, path {p}: {describe(one)} for a load of {sizes[p]}",
            )
        cell_R = route[p].index_R(route.cell_R.device)
        rules.require(
            bool((cell_R.diff() > 0).all()), "keeps cells in order on a path", f"{case}, path {p}"
        )


def _observed(rules: Rules, router: Router, given: tuple[Any, ...]) -> None:
    seen: list[tuple[Any, ...]] = []
    handle = router.register_observer(lambda *args: seen.append(args))
    try:
        out = router(*given)
    finally:
        handle.remove()
    items = out if isinstance(out, tuple) else (out,)
    if any(isinstance(item, Route) for item in items):
        rules.require(
            len(seen) == 1,
            "tells its observers of each decision once (self._observe(route, scores))",
            f"{len(seen)} times for one call",
        )
    for args in seen:
        rules.require(
            len(args) == 3
            and args[0] is router
            and isinstance(args[1], Route)
            and isinstance(args[2], Tensor),
            "calls observers with (router, route, scores)",
        )
    seen.clear()
    router(*given)
    rules.require(not seen, "forgets an observer whose handle was removed")


def _copied(rules: Rules, router: Router, given: tuple[Any, ...], random: bool) -> None:
    with rules.holds("survives copy.deepcopy"):
        twin = copy.deepcopy(router)
    with rules.holds("takes back its own state dict"):
        twin.load_state_dict(router.state_dict())
    if not random:
        with torch.no_grad():
            rules.require(equal(router(*given), twin(*given)), "a copy gives the same")
