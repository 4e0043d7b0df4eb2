"""Small problems solved to the end by an integer program (HiGHS, through scipy).

Legend: L layers, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from brt_dist.placement.problem import Problem
from brt_dist.placement.traffic import Ints

MOST_VARIABLES = 150
_NODES = 200


@dataclass(frozen=True, eq=False)
class Proof:
    """What the solver showed: nothing costs less than `bound`; `rank_LE` is its best, if any."""

    bound: float
    rank_LE: Ints | None


def num_variables(problem: Problem) -> int:
    """Columns of the integer program."""
    num_layers, num_experts, num_ranks = _sizes(problem)
    pairs = 0
    if problem.counts_traffic and problem.traffic.moves_LEE is not None:
        pairs = int(np.count_nonzero(problem.traffic.moves_LEE)) * num_ranks
    return num_layers * (num_experts * num_ranks + 1) + pairs


def admits(problem: Problem) -> bool:
    """Whether a problem is small enough, and of a kind that the program states."""
    rows_return = problem.counts_traffic and problem.traffic.moves_LEE is None
    several_hosts = problem.counts_traffic and problem.topology.hosts > 1
    return not rows_return and not several_hosts and num_variables(problem) <= MOST_VARIABLES


def solve(problem: Problem) -> Proof:
    """Best placement and bound; both stop after a fixed number of nodes, so that they repeat.

    Variables: x[l, e, w] = expert e of layer l is on rank w; z[l] = excess of the slowest rank;
    y[l, i, j, w] = a move that stays on rank w, at most x at either end.
    """
    program = _Program.of(problem)
    found = milp(
        program.cost,
        constraints=program.constraints,
        integrality=program.integral,
        bounds=Bounds(0, program.most),
        options={"node_limit": _NODES, "mip_rel_gap": 0.0},
    )
    bound = getattr(found, "mip_dual_bound", None)
    lowest = -np.inf if bound is None else float(bound) + program.constant
    if found.x is None:
        return Proof(lowest, None)
    num_layers, num_experts, num_ranks = _sizes(problem)
    x_LEW = found.x[: num_layers * num_experts * num_ranks]
    return Proof(lowest, x_LEW.reshape(num_layers, num_experts, num_ranks).argmax(2))


def _sizes(problem: Problem) -> tuple[int, int, int]:
    return problem.num_layers, problem.num_experts, problem.num_ranks


@dataclass(frozen=True, eq=False)
class _Program:
    cost: np.ndarray
    constant: float
    constraints: list[LinearConstraint]
    integral: np.ndarray
    most: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> _Program:
        num_layers, num_experts, num_ranks = _sizes(problem)
        x_LEW = np.arange(num_layers * num_experts * num_ranks).reshape(_sizes(problem))
        z_L = x_LEW.size + np.arange(num_layers)
        num_columns = num_variables(problem)
        cost = np.zeros(num_columns)
        cost[z_L] = problem.balance_weight / num_layers
        for layer in range(num_layers):
            cost[x_LEW[layer].ravel()] += problem.migration_EW(layer).ravel() / num_layers
        rows = _Rows(num_columns)
        for layer in range(num_layers):
            load_E = problem.traffic.load_LE[layer] / problem.mean_load_L[layer]
            for x_W in x_LEW[layer]:
                rows.add({int(x): 1.0 for x in x_W}, 1, 1)
            for x_E in x_LEW[layer].T:
                rows.add({int(x): 1.0 for x in x_E}, problem.low, problem.high)
                loads = {int(x): float(load) for x, load in zip(x_E, load_E, strict=True)}
                rows.add(loads | {int(z_L[layer]): -1.0}, -np.inf, 1)
        constant = 0.0
        if problem.counts_traffic and problem.traffic.moves_LEE is not None:
            constant = _add_moves(problem, x_LEW, rows, cost)
        integral = np.zeros(num_columns)
        integral[: x_LEW.size] = 1
        most = np.ones(num_columns)
        most[z_L] = np.inf
        return cls(cost, constant, [rows.constraint()], integral, most)


def _add_moves(problem: Problem, x_LEW: Ints, rows: _Rows, cost: np.ndarray) -> float:
    """Every move costs, and those that stay are paid back."""
    assert problem.traffic.moves_LEE is not None
    per_token = 1 / max(problem.traffic.num_cells, 1) / problem.num_layers
    y = x_LEW.size + problem.num_layers
    for layer, one, other in zip(*np.nonzero(problem.traffic.moves_LEE), strict=True):
        for rank in range(problem.num_ranks):
            for x in (x_LEW[layer, one, rank], x_LEW[layer + 1, other, rank]):
                rows.add({y: 1.0, int(x): -1.0}, -np.inf, 0)
            cost[y] = -per_token * problem.traffic.moves_LEE[layer, one, other]
            y += 1
    return per_token * float(problem.traffic.moves_LEE.sum())


class _Rows:
    """Constraints of the program, as they come."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._entries: list[tuple[int, int, float]] = []
        self._limits: list[tuple[float, float]] = []

    def add(self, factors: dict[int, float], low: float, high: float) -> None:
        row = len(self._limits)
        self._entries += [(row, column, value) for column, value in factors.items()]
        self._limits.append((low, high))

    def constraint(self) -> LinearConstraint:
        row, column, value = zip(*self._entries, strict=True)
        shape = (len(self._limits), self._num_columns)
        low, high = zip(*self._limits, strict=True)
        return LinearConstraint(sparse.csr_array((value, (row, column)), shape=shape), low, high)
