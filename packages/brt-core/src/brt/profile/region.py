"""A profile of a model seen from one of its submodules.

Legend: F forwards.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from torch import Tensor

from brt.errors import ProfileError
from brt.profile.data import Profile, RouterProfile

# A call of the submodule: (forward of the model, which call within it)
_Scope = tuple[int, int]


def region(profile: Profile, path: str) -> Profile:
    """See `Profile.region`."""
    start, depth = len(path) + 1, path.count(".")
    of_model = {
        at[start:]: what
        for at, what in profile.routers_of_model.items()
        if at.startswith(f"{path}.")
    }
    if not of_model:
        raise ProfileError(
            f"region: the profile knows no router inside {path!r}; it has: "
            f"{', '.join(profile.routers_of_model)}"
        )
    inside = {key: r for key, r in profile.routers.items() if r.module.startswith(f"{path}.")}
    scopes = {key: _scopes(router, depth) for key, router in inside.items()}
    order = {s: i for i, s in enumerate(sorted({s for given in scopes.values() for s in given}))}
    calls = _calls_inside(inside, scopes)
    parts: dict[str, list[RouterProfile]] = defaultdict(list)
    for key, router in inside.items():
        for call in sorted(set(calls[key])):
            index = [i for i, c in enumerate(calls[key]) if c == call]
            part = router.select(index)
            forward_F = part.forward_F.new_tensor([order[scopes[key][i]] for i in index])
            part = dataclasses.replace(
                part,
                module=router.module[start:],
                call=call,
                forward_F=forward_F,
                scope_FA=part.scope_FA[:, depth + 1 :],
            )
            parts[part.key].append(part)
    joint: dict[tuple[str, str], Tensor] = {}
    for (first, second), counts in profile.joint.items():
        if not (first in inside and second in inside):
            continue
        steady = len(set(calls[first])) == 1 and len(set(calls[second])) == 1
        if steady and _together(scopes[first], scopes[second]):
            pair = (
                f"{inside[first].module[start:]}#{calls[first][0]}",
                f"{inside[second].module[start:]}#{calls[second][0]}",
            )
            joint[pair] = joint[pair] + counts if pair in joint else counts
    return Profile(
        model=f"{profile.model}.{path}",
        routers_of_model=of_model,
        num_forwards=len(order),
        window=profile.window,
        routers={key: _in_order(given) for key, given in parts.items()},
        joint=joint,
    )


def _scopes(router: RouterProfile, depth: int) -> list[_Scope]:
    return [
        (int(forward), int(calls[depth]))
        for forward, calls in zip(router.forward_F, router.scope_FA, strict=True)
    ]


def _calls_inside(
    inside: dict[str, RouterProfile], scopes: dict[str, list[_Scope]]
) -> dict[str, list[int]]:
    """For each key and forward: which of the router's calls within its scope that call was."""
    happened: dict[tuple[str, _Scope], list[int]] = defaultdict(list)
    for key, router in inside.items():
        for scope in scopes[key]:
            happened[router.module, scope].append(router.call)
    return {
        key: [sorted(happened[r.module, scope]).index(r.call) for scope in scopes[key]]
        for key, r in inside.items()
    }


def _together(first: list[_Scope], second: list[_Scope]) -> bool:
    """Whether two calls are part of one call of the submodule, whenever both happen."""
    of_first, of_second = dict(first), dict(second)
    return all(of_first[f] == of_second[f] for f in of_first.keys() & of_second.keys())


def _in_order(parts: list[RouterProfile]) -> RouterProfile:
    joined = RouterProfile.joined(parts)
    return joined.select(joined.forward_F.argsort(stable=True).tolist())
