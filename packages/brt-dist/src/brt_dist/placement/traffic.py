"""Where cells go, in the form that placement works on.

Legend: L layers, E experts, T tokens, K choices of a token.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import brt
from brt_dist.placement.errors import PlacementError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Traffic:
    """How many rows each expert gets and, where that is known, which experts share their tokens.

    Attributes:
        model: what it was measured on.
        layers: names of the mixtures, in the order in which tokens meet them.
        num_cells: tokens that were routed.
        load_LE: rows of each expert.
        moves_LEE: ``[L - 1, E, E]``: tokens that went from an expert of a layer to one of the
            next; None unless each token takes one expert, and so can stay where that is.
        choice_TLK: the experts of each token; -1 = none. None where only counts are known.
    """

    model: str
    layers: tuple[str, ...]
    num_cells: int
    load_LE: Floats
    moves_LEE: Floats | None = None
    choice_TLK: Ints | None = None

    @property
    def admits(self) -> str:
        """What a placement can save here beside balance: "affinity", "co-activation", "nothing".

        Affinity between layers is worth something where a token stays on the rank of its expert:
        with one expert a token. With more, its rows return, and what counts is how many ranks
        it visits in a layer.
        """
        if self.moves_LEE is not None:
            return "affinity"
        return "nothing" if self.choice_TLK is None else "co-activation"

    @classmethod
    def of(cls, source: brt.Profile | Traffic | ArrayLike | str | Path) -> Traffic:
        """From a profile, a trace ``[T, L, K]``, or a file with either of them or with loads."""
        if isinstance(source, Traffic):
            return source
        if isinstance(source, brt.Profile):
            return of_profile(source)
        if isinstance(source, (str, Path)):
            return load_traffic(Path(source))
        return of_trace(source)


def of_profile(profile: brt.Profile) -> Traffic:
    """From a profile: loads and, where each token takes one expert, its moves between layers.

    Moves are known where the layers decide about the same root (`brt.Profile.joint`).
    """
    calls: dict[str, list[Any]] = {}
    for router in profile.routers.values():
        calls.setdefault(router.module, []).append(router)
    sizes = {module: routers[0].num_paths for module, routers in calls.items()}
    if len(set(sizes.values())) > 1:
        raise PlacementError(
            f"plan: the layers of {profile.model} have different numbers of experts: {sizes}; "
            "plan parts of it: profile.region(path)"
        )
    load_LE = np.stack(
        [sum(r.rows_FP.sum(0).double().numpy() for r in rs) for rs in calls.values()]
    )
    num_cells = max(sum(router.cells for router in routers) for routers in calls.values())
    keys = [routers[0].key for routers in calls.values()]
    pairs = list(itertools.pairwise(keys))
    stays = all(len(routers) == 1 for routers in calls.values()) and all(
        int(r.rows_FP.sum()) + r.unrouted == r.cells for r in profile.routers.values()
    )
    moves_LEE = None
    if stays and pairs and all(pair in profile.joint for pair in pairs):
        moves_LEE = np.stack([profile.joint[pair].double().numpy() for pair in pairs])
    return Traffic(profile.model, tuple(calls), num_cells, load_LE, moves_LEE)


def of_trace(
    choice: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    top_k: int | None = None,
    num_experts: int | None = None,
    model: str = "trace",
) -> Traffic:
    """From the experts of each token, ``[T, L, K]``; -1 = none.

    Args:
        choice: ids.
        weights: of the same shape; orders the choices of a token.
        top_k: keep so many choices of each token, the heaviest ones.
        num_experts: E; without it, the highest id decides.
        model: what the plan will say it is for.
    """
    choice_TLK = np.asarray(choice)
    if choice_TLK.ndim != 3 or choice_TLK.dtype.kind not in "iu":
        raise PlacementError(
            "plan: a trace has whole numbers [tokens, layers, choices], got "
            f"{choice_TLK.dtype} {list(choice_TLK.shape)}"
        )
    choice_TLK = choice_TLK.astype(np.int64)
    if weights is not None:
        order_TLK = np.argsort(-np.asarray(weights, np.float64), axis=2, kind="stable")
        choice_TLK = np.take_along_axis(choice_TLK, order_TLK, 2)
    highest = int(choice_TLK.max(initial=-1))
    choice_TLK = choice_TLK[:, :, :top_k]
    num_experts = highest + 1 if num_experts is None else num_experts
    if highest >= num_experts or choice_TLK.min(initial=0) < -1 or num_experts < 1:
        raise PlacementError(
            f"plan: ids of a trace must be -1 to {num_experts - 1}, got "
            f"{choice_TLK.min(initial=0)} to {highest}"
        )
    num_cells, num_layers, num_choices = choice_TLK.shape
    counts = [_counted(choice_TLK[:, layer].ravel(), num_experts) for layer in range(num_layers)]
    load_LE = np.stack(counts) if counts else np.zeros((0, num_experts))
    layers = unnamed(num_layers)
    if num_choices > 1:
        return Traffic(model, layers, num_cells, load_LE, choice_TLK=choice_TLK)
    moves = [
        _counted_pairs(choice_TLK[:, layer, 0], choice_TLK[:, layer + 1, 0], num_experts)
        for layer in range(num_layers - 1)
    ]
    moves_LEE = np.stack(moves) if moves else np.zeros((0, num_experts, num_experts))
    return Traffic(model, layers, num_cells, load_LE, moves_LEE, choice_TLK)


def unnamed(num_layers: int) -> tuple[str, ...]:
    """What layers are called where nothing says so."""
    return tuple(f"layer {layer}" for layer in range(num_layers))


def _counted(ids: Ints, num_experts: int) -> Floats:
    return np.bincount(ids[ids >= 0], minlength=num_experts).astype(np.float64)


def _counted_pairs(first_T: Ints, second_T: Ints, num_experts: int) -> Floats:
    both_T = (first_T >= 0) & (second_T >= 0)
    pair_T = first_T[both_T] * num_experts + second_T[both_T]
    return _counted(pair_T, num_experts * num_experts).reshape(num_experts, num_experts)


def of_loads(loads: Sequence[Sequence[float]], *, model: str = "loads") -> Traffic:
    """From the rows of each expert in each layer, ``[L, E]``; only balance can be planned."""
    try:
        load_LE = np.asarray(loads, np.float64)
    except (TypeError, ValueError) as error:
        raise PlacementError(f"plan: loads must be numbers [layers, experts]: {error}") from error
    if load_LE.ndim != 2 or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise PlacementError(
            "plan: loads must be numbers [layers, experts], none below 0, got "
            f"{list(load_LE.shape)}"
        )
    layers = unnamed(len(load_LE))
    num_cells = round(float(load_LE.sum(1).max(initial=0)))
    return Traffic(model, layers, num_cells, load_LE)


def load_traffic(path: Path, top_k: int | None = None) -> Traffic:
    """Read a file: a profile (.safetensors), a trace (.npz), or loads (.json).

    Of an .npz all arrays of whole numbers ``[T, L, K]`` are taken, one after another, ordered by
    the weights in ``NAME_w`` where there are any. A .json file has ``[L, E]`` numbers, alone or
    as "loads" of an object that may say "model".
    """
    if path.suffix == ".npz":
        return _load_trace(path, top_k)
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlacementError(f"plan: {path} is no JSON: {error}") from error
        if not isinstance(found, Mapping):
            found = {"loads": found}
        if "loads" not in found:
            raise PlacementError(f"plan: {path} has no 'loads'; it has {', '.join(found)}")
        return of_loads(found["loads"], model=str(found.get("model", path.stem)))
    return of_profile(brt.Profile.load(path))


def _load_trace(path: Path, top_k: int | None) -> Traffic:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise PlacementError(f"plan: {path} cannot be read: {error}") from error
    names = [n for n, a in found.items() if a.ndim == 3 and a.dtype.kind in "iu"]
    if not names or len({found[name].shape[1:] for name in names}) > 1:
        shapes = {name: list(array.shape) for name, array in found.items()}
        raise PlacementError(
            f"plan: {path} must hold whole numbers [tokens, layers, choices], got {shapes}"
        )
    choice = np.concatenate([found[name].astype(np.int64) for name in names])
    weighed = all(f"{name}_w" in found for name in names)
    weights = np.concatenate([found[f"{name}_w"] for name in names]) if weighed else None
    return of_trace(choice, weights=weights, top_k=top_k, model=path.stem)
