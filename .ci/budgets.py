"""How long each session may take, and did."""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Callable

import nox

# Seconds on 2 cores, environment included. The default sessions together: 30 minutes.
BUDGETS = {
    "lint": 15,
    "imports": 15,
    "types": 90,
    "tests(core)": 480,
    "tests(kernels-alone)": 300,  # compiles them, for CUDA too
    "tests(kernels)": 240,
    "tests(all)": 240,
    "tests(dist)": 180,
    "tests(models)": 180,
    "wheels": 360,
    "demo": 180,
    "build": 240,
    "thorough": 3600,
    "sanitizers": 1200,
    "faults": 900,
}
OTHER_BUDGET = 120

spent: dict[str, float] = {}
started = time.perf_counter()


def timed(session_function: Callable[..., None]) -> Callable[..., None]:
    """Record how long a session takes, for the table that ends a run."""

    @functools.wraps(session_function)
    def run(session: nox.Session, **case: str) -> None:
        start = time.perf_counter()
        try:
            session_function(session, **case)
        finally:
            spent[session.name] = time.perf_counter() - start

    return run


@atexit.register
def print_budgets() -> None:
    """Say for each session that ran how long it took and how long it may take."""
    if not spent:
        return
    print(f"\n{'session':<24}{'seconds':>8}{'budget':>8}")
    for name, seconds in spent.items():
        budget = BUDGETS.get(name, OTHER_BUDGET)
        print(f"{name:<24}{seconds:>8.0f}{budget:>8}{'  over' * (seconds > budget)}")
    print(f"{'together':<24}{time.perf_counter() - started:>8.0f}")
