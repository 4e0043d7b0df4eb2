"""Placement on real routing: fitted on half of the sequences of each task, scored on the others.

    python packages/brt-dist/benchmarks/placement.py TRACE.npz [--ranks 8] [--seed 0]

The trace has, for each task, ids ``TASK`` [tokens, layers, choices], weights ``TASK_w`` of the same
shape, and tokens of each sequence ``TASK_lens``. Then the scale of it, on synthetic loads. One
process; numbers are of the machine that it runs on.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from brt_dist.placement import Descent, Plan, Traffic, plan
from brt_dist.placement.planner import figures_of
from brt_dist.placement.traffic import of_loads, of_trace


def halves(path: Path, top_k: int) -> tuple[Traffic, Traffic]:
    """Even and odd sequences of each task."""
    parts: list[list[np.ndarray]] = [[], []]
    weights: list[list[np.ndarray]] = [[], []]
    with np.load(path, allow_pickle=False) as file:
        tasks = [name.removesuffix("_lens") for name in file.files if name.endswith("_lens")]
        highest = max(int(file[task].max()) for task in tasks)
        for task in tasks:
            lens = file[f"{task}_lens"]
            odd_T = np.repeat(np.arange(len(lens)) % 2, lens)
            for half in (0, 1):
                parts[half].append(file[task][odd_T == half].astype(np.int64))
                weights[half].append(file[f"{task}_w"][odd_T == half])
    fit, score = (
        of_trace(np.concatenate(p), weights=np.concatenate(w), top_k=top_k, num_experts=highest + 1)
        for p, w in zip(parts, weights, strict=True)
    )
    return fit, score


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def score(name: str, found: Plan, held_out: Traffic) -> None:
    """A line on what it was fitted to, and on what was held out."""
    figures = figures_of(found.rank_LE, held_out, found.num_ranks)
    say(
        f"{name:<28} fitted {found.planned.traffic:.3f} at {found.planned.balance:.3f}; held out "
        f"{figures.traffic:.3f} at {figures.balance:.3f} (worst layer {figures.worst:.3f}); "
        f"bound {found.bound.traffic:.3f}; {found.seconds:.1f} s"
    )


def real(path: Path, num_ranks: int, seed: int) -> None:
    """Real routing: both objectives, top-1 and all choices."""
    # A visit is a larger part of what a token costs where it makes three than where it moves once
    for top_k, weight in ((1, 10.0), (6, 0.9)):
        fit, held_out = halves(path, top_k)
        found = plan(fit, num_ranks, balance_weight=weight, solver=Descent(seed=seed))
        default = figures_of(default_ranks(found), held_out, num_ranks)
        say(f"top-{top_k}: contiguous, held out {default.traffic:.3f} at {default.balance:.3f}")
        score(f"top-{top_k}, both", found, held_out)
        if top_k == 1:
            for objective in ("traffic", "balance"):
                found = plan(fit, num_ranks, objective, seed=seed)
                score(f"top-1, {objective}", found, held_out)
        else:
            with_room = plan(fit, num_ranks, memory=16, balance_weight=0.75, seed=seed)
            score("top-6, both, room for 16", with_room, held_out)
            cut(found, fit, held_out)


def cut(found: Plan, fit: Traffic, held_out: Traffic) -> None:
    """Each layer cut by METIS: experts joined by the tokens that take both, weighed by load."""
    try:
        import pymetis
    except ImportError:
        say("METIS: not installed; pip install pymetis")
        return
    num_experts, start = found.num_experts, time.perf_counter()
    edges = ~np.eye(num_experts, dtype=bool)
    starts = list(range(0, edges.sum() + 1, num_experts - 1))
    graph = pymetis.CSRAdjacency(starts, np.nonzero(edges)[1].tolist())
    rank_LE = np.empty((len(found.layers), num_experts), np.int64)
    for layer, load_E in enumerate(fit.load_LE):
        takes_TE = np.zeros((fit.num_cells, num_experts))
        np.put_along_axis(takes_TE, fit.choice_TLK[:, layer], 1, 1)
        together_EE = (takes_TE.T @ takes_TE).astype(int)
        rank_LE[layer] = pymetis.part_graph(
            found.num_ranks,
            graph,
            vweights=load_E.astype(int).tolist(),
            eweights=(together_EE[edges] + 1).tolist(),
            options=pymetis.Options(ufactor=50, seed=0, ncuts=20, niter=50),
        )[1]
    seconds = time.perf_counter() - start
    there, away = (figures_of(rank_LE, half, found.num_ranks) for half in (fit, held_out))
    most = max(np.bincount(rank_E).max() for rank_E in rank_LE)
    say(
        f"METIS, loads within 5 % fitted {there.traffic:.3f} at {there.balance:.3f}; "
        f"held out {away.traffic:.3f} at {away.balance:.3f}; up to {most} experts a rank; "
        f"{seconds:.1f} s"
    )


def default_ranks(found: Plan) -> np.ndarray:
    """The contiguous placement."""
    sizes = [len(p) for p in np.array_split(np.arange(found.num_experts), found.num_ranks)]
    return np.tile(np.repeat(np.arange(found.num_ranks), sizes), (len(found.layers), 1))


def scale(seed: int, num_layers: int = 64, num_experts: int = 256, num_ranks: int = 64) -> None:
    """Synthetic loads of a large model: seconds, and the gap to a bound."""
    rng = np.random.default_rng(seed)
    load_LE = rng.gamma(2.0, 1000.0, (num_layers, num_experts)).round()
    found = plan(of_loads(load_LE), num_ranks, "balance", seed=seed)
    size = f"{num_layers} x {num_experts} x {num_ranks}"
    say(
        f"{size}, balance: {found.planned.balance:.4f}, bound {found.bound.balance:.4f}, gap "
        f"{found.gap:.2%}, EPLB {found.packed.balance:.4f}, {found.seconds:.1f} s"
    )
    found = plan(of_loads(load_LE), num_ranks, "balance", replicas=num_ranks, seed=seed)
    say(
        f"{size}, balance, {num_ranks} replicas: {found.planned.balance:.4f}, bound "
        f"{found.bound.balance:.4f}, gap {found.gap:.2%}, EPLB {found.packed.balance:.4f}, "
        f"{found.seconds:.1f} s"
    )
    start = time.perf_counter()
    moves_LEE = rng.gamma(0.1, 10.0, (num_layers - 1, num_experts, num_experts))
    load_LE = np.concatenate([moves_LEE.sum(2), moves_LEE[-1:].sum(1)])
    traffic = replace(of_loads(load_LE), moves_LEE=moves_LEE)
    found = plan(traffic, num_ranks, seed=seed)
    say(
        f"{size}, both, top-1: {found.planned.traffic:.3f} at {found.planned.balance:.3f} "
        f"(contiguous {found.default.traffic:.3f} at {found.default.balance:.3f}), bounds "
        f"{found.bound.traffic:.3f} and {found.bound.balance:.3f}, "
        f"{time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("real", "scale"))
    given = parser.parse_args()
    if given.only != "scale":
        real(given.trace, given.ranks, given.seed)
    if given.only != "real":
        scale(given.seed)
