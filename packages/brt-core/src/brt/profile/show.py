"""Profiles for people: a histogram in the terminal, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from brt.errors import ProfileError
from brt.files import atomic_write
from brt.profile.data import MARGIN_EDGES, Profile, RouterProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 32
_MOST_PATHS = 16
_MOST_PICTURES = 24


def text(profile: Profile) -> str:
    """A line for each path: the share of cells that took it, over all forwards."""
    forwards = _count(profile.num_forwards, "forward")
    lines = [f"Profile of {profile.model}: {forwards}, {_count(len(profile.routers), 'decision')}"]
    for router in profile.routers.values():
        lines += ["", *_lines(router)]
    missing = set(profile.routers_of_model) - {r.module for r in profile.routers.values()}
    if missing:
        lines += ["", f"Never called: {', '.join(sorted(missing))}"]
    return "\n".join(lines)


def _lines(router: RouterProfile) -> list[str]:
    forwards = _count(router.num_forwards, "forward")
    head = f"{router.key}: {_count(router.cells, 'cell')} in {forwards}"
    for count, what in ((router.unrouted, "on no path"), (router.dropped, "choices dropped")):
        head += f", {count} {what}" if count else ""
    lines = [head]
    share_P, fractions = router.share_P.tolist(), router.fractions
    low_P, high_P = fractions.min_P.tolist(), fractions.max_P.tolist()
    shown = list(range(router.num_paths))
    if router.num_paths > _MOST_PATHS:  # the busiest ones, in their order
        shown = sorted(sorted(shown, key=lambda p: -share_P[p])[: _MOST_PATHS - 1])
    for p in shown:
        bar = "#" * round(share_P[p] * _WIDTH)
        lines.append(
            f"  path {p:<3} {bar:<{_WIDTH}} {share_P[p]:6.1%}  "
            f"(in a forward {low_P[p]:.1%} to {high_P[p]:.1%}){_permanence(router, p)}"
        )
    if len(shown) < router.num_paths:
        rest = set(range(router.num_paths)) - set(shown)
        num_never = sum(bool(router.never_P[p]) for p in rest)
        lines.append(f"  ... and {len(rest)} paths more, of which {num_never} never taken")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _permanence(router: RouterProfile, path: int) -> str:
    return "  always" if router.always_P[path] else "  never" if router.never_P[path] else ""


def summary(profile: Profile) -> dict[str, Any]:
    """See `Profile.to_json`."""
    return {
        "model": profile.model,
        "digest": profile.digest(),
        "forwards": profile.num_forwards,
        "routers": {key: _summary(router) for key, router in profile.routers.items()},
        "joint": [
            {"first": first, "second": second, "cells": counts.tolist()}
            for (first, second), counts in profile.joint.items()
        ],
    }


def _summary(router: RouterProfile) -> dict[str, Any]:
    rows, fractions = router.rows, router.fractions
    paths: list[dict[str, Any]] = [
        {
            "share": router.share_P[p].item(),
            "always": bool(router.always_P[p]),
            "never": bool(router.never_P[p]),
        }
        for p in range(router.num_paths)
    ]
    for what, loads in (("rows", rows), ("fraction", fractions)):
        measures = {
            "mean": loads.mean_P,
            "min": loads.min_P,
            "max": loads.max_P,
            **{f"p{q}": loads.percentile_P(q) for q in (5, 50, 95)},
        }
        for p, path in enumerate(paths):
            path[what] = {name: value_P[p].item() for name, value_P in measures.items()}
    return {
        "cells": router.cells,
        "forwards": router.num_forwards,
        "unrouted": router.unrouted,
        "dropped": router.dropped,
        "paths": paths,
        "margins": {"edges": list(MARGIN_EDGES), "cells": router.margins_B.tolist()},
    }


def plot(profile: Profile, path: Path) -> None:
    """See `Profile.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProfileError("plot: needs matplotlib; pip install matplotlib") from error
    routers = list(profile.routers.values())[:_MOST_PICTURES]
    shown = {router.key for router in routers}
    # Where cells go next: each router with the one before it about the same root
    nearest: dict[str, str] = {}
    for first, second in profile.joint:
        nearest[second] = first
    pairs = [(a, b) for b, a in nearest.items() if a in shown and b in shown]
    rows = len(routers) + len(pairs)
    figure = Figure(figsize=(7, 2.2 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for ax, router in zip(axes, routers, strict=False):
        _draw_loads(ax, router)
    for ax, pair in zip(axes[len(routers) :], pairs, strict=True):
        _draw_joint(figure, ax, pair, profile)
    left_out = len(profile.routers) - len(routers)
    note = f", the first {len(routers)} of {len(profile.routers)} router calls" if left_out else ""
    figure.suptitle(f"{profile.model}: {profile.num_forwards} forwards{note}")
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def _draw_loads(ax: Axes, router: RouterProfile) -> None:
    fractions = router.fractions
    mean_P, paths = fractions.mean_P, range(router.num_paths)
    spread = [(mean_P - fractions.min_P).tolist(), (fractions.max_P - mean_P).tolist()]
    ax.bar(paths, mean_P.tolist(), yerr=spread, capsize=3, color="#4477aa", ecolor="#333333")
    ax.set_title(router.key, fontsize=9, loc="left")
    ax.set_ylabel("share of cells")
    ax.set_xlabel("path (mean, least and most of a forward)", fontsize=8)
    ax.set_ylim(0, 1.05)
    ax.set_xticks(_ticks(router.num_paths))


def _draw_joint(figure: Any, ax: Axes, pair: tuple[str, str], profile: Profile) -> None:
    image = ax.imshow(profile.joint[pair].numpy(), cmap="Blues", aspect="auto", vmin=0)
    ax.set_title(f"{pair[0]} then {pair[1]}", fontsize=9, loc="left")
    ax.set_ylabel("path before")
    ax.set_xlabel("path after", fontsize=8)
    ax.set_yticks(_ticks(profile.joint[pair].shape[0]))
    ax.set_xticks(_ticks(profile.joint[pair].shape[1]))
    figure.colorbar(image, ax=ax, label="cells")


def _ticks(num_paths: int) -> list[int]:
    return list(range(0, num_paths, 1 + num_paths // _MOST_PATHS))
