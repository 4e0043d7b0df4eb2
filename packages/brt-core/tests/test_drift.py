"""Loads that drift: counted, told, and planned for anew while calls go on."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from dynamic_models import DIM, Mixture, Residual, to_paths
from torch import nn

import brt
from brt import OnDrift, drift
from brt.optimized import Optimized

BEFORE = to_paths([0, 1, 1, 0])
AFTER = to_paths([2, 2, 2, 1])
LOAD = "load:mixture.scatter"
DEAD = "drop-dead-paths:mixture.scatter[2]"


def made(model: nn.Module, passes: list[str] | None = None, **settings: Any) -> Optimized:
    return brt.optimize(
        model,
        brt.profile(model, [BEFORE]),
        passes=passes or ["drop-dead-paths"],
        sample=BEFORE,
        on_drift=OnDrift(**settings),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["drop-dead-paths", "fuse-horizontal", "fold-permanent-paths"])
def test_stats_tell_how_far_loads_are(name: str) -> None:
    fast = made(Residual().eval(), [name], replan=False)
    assert fast.stats[LOAD].hits == 0
    for _ in range(3):
        fast(BEFORE)
    found = fast.stats[LOAD]
    assert isinstance(found, drift.Drift)
    assert (found.hits, found.distance) == (3, 0.0)
    assert found.seen_P == found.profiled_P == (2.0, 2.0, 0.0)
    fast.reset_stats()
    fast(AFTER)
    found = fast.stats[LOAD]
    assert found.seen_P == (0.0, 1.0, 3.0)
    assert found.distance == pytest.approx(6 / 7)  # |2-0| + |2-1| + |0-3| of 2 + 2 + 3
    assert str(found) == "drift 0.86 over 1 calls"
    assert LOAD not in fast.report.guards()
    assert fast.replans == 0


@torch.no_grad()
def test_more_of_the_same_is_drift_too() -> None:
    fast = made(Residual().eval(), replan=False)
    fast(torch.cat([BEFORE, BEFORE]))
    assert fast.stats[LOAD].distance == pytest.approx(0.5)


@torch.no_grad()
def test_another_plan_takes_over() -> None:
    model = Residual().eval()
    fast = made(model, every=4, keep=2)
    for _ in range(4):
        fast(BEFORE)
    fast._follower.wait()
    assert fast.replans == 0
    assert DEAD in fast.stats  # path 2 had no rows
    old = fast.report
    fast.reset_stats()
    for _ in range(4):
        torch.testing.assert_close(fast(AFTER), model(AFTER))
    fast._follower.wait()
    assert fast.replans == 1
    assert DEAD not in fast.stats
    assert "drop-dead-paths:mixture.scatter[0]" in fast.stats
    assert fast.report.profile != old.profile
    assert fast.stats[LOAD].profiled_P == (0.0, 1.0, 3.0)
    for x in (AFTER, BEFORE):
        torch.testing.assert_close(fast(x), model(x))
    assert fast.stats[LOAD].hits == 2
    assert set(fast.state_dict()) == set(model.state_dict())
    twin = copy.deepcopy(fast)
    assert twin.replans == 0
    assert LOAD not in twin.stats
    torch.testing.assert_close(twin(AFTER), model(AFTER))


@torch.no_grad()
def test_the_new_plan_has_the_weights_of_now() -> None:
    model = Residual().eval()
    fast = made(model, every=2, keep=1).double()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(2.0)
    wide = copy.deepcopy(model).double()
    wide.load_state_dict(fast.state_dict())
    for _ in range(2):
        fast(AFTER.double())
    fast._follower.wait()
    assert fast.replans == 1
    assert all(parameter.dtype == torch.float64 for parameter in fast.parameters())
    torch.testing.assert_close(fast(AFTER.double()), wide(AFTER.double()))
    fast.float()
    torch.testing.assert_close(fast(AFTER), wide.float()(AFTER), rtol=1e-4, atol=1e-5)


class Slow(nn.Module):
    """A branch that waits where it is told to, so that a call is under way during a swap."""

    gates: tuple[threading.Event, threading.Event] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(wait(rows))


def wait(rows: torch.Tensor) -> torch.Tensor:
    gates = Slow.gates
    if gates is not None and threading.current_thread().name == "caller":
        gates[0].set()
        assert gates[1].wait(20)
    return rows


torch.fx.wrap("wait")


def test_a_call_under_way_ends_on_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixture(branches=[Slow() for _ in range(3)]).eval()
    fast = made(model, every=2, keep=1)
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(Slow, "gates", (begun, go_on))
    results = []

    def call() -> None:
        with torch.no_grad():
            results.append(fast(AFTER))

    caller = threading.Thread(target=call, name="caller")
    caller.start()
    assert begun.wait(20)
    with torch.no_grad():
        fast(AFTER)
    fast._follower.wait()
    assert fast.replans == 1
    go_on.set()
    caller.join(20)
    with torch.no_grad():
        torch.testing.assert_close(results[0], model(AFTER))


@torch.no_grad()
def test_calls_from_two_threads_while_plans_change() -> None:
    model = Residual().eval()
    fast = made(model, every=3, keep=1, threshold=0.05)
    wrong = []

    def calls(seed: int) -> None:
        with torch.no_grad():
            for i in range(30):
                x = (BEFORE, AFTER, to_paths([0] * 5))[(i // 6 + seed) % 3]
                if not torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    fast._follower.wait()
    assert not wrong
    assert fast.replans >= 1


@torch.no_grad()
def test_a_failure_leaves_the_old_plan() -> None:
    model = Residual().eval()
    fast = made(model, every=1, keep=1)

    def fail(*args: Any) -> Any:
        raise ValueError("no plan today")

    fast._follower._plan = fail
    follower = fast._follower
    with pytest.warns(brt.PluginWarning, match="the old plan stays: ValueError: no plan today"):
        assert follower.called((AFTER,), {}) is follower.wait()
    torch.testing.assert_close(fast(BEFORE), model(BEFORE))
    follower.wait()
    assert follower.failure == "ValueError: no plan today"  # one warning is enough


def test_wrong_use() -> None:
    for settings, said in (
        ({"threshold": 0.0}, "threshold must be in"),
        ({"every": 0}, "every must be 1 or more"),
        ({"keep": 0}, "keep must be 1 or more"),
    ):
        with pytest.raises(brt.PassError, match=said):
            OnDrift(**settings)
    model = Residual().eval()
    with pytest.raises(brt.PassError, match="on_drift needs a profile"):
        brt.optimize(model, passes=[], on_drift=OnDrift())
    drawing = nn.Sequential(Residual(), nn.Dropout(0.5)).train()
    profile = brt.profile(drawing, [BEFORE])
    with pytest.raises(brt.PassError, match="the model draws random numbers: 1: Dropout"):
        brt.optimize(drawing, profile, passes=[], on_drift=OnDrift())
