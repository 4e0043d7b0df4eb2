"""`optimize` keeps the fastest form of a region, remembers it, and says what it measured."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dynamic_models import Mixture, Residual, to_paths
from torch import fx

import brt
from brt import race
from brt.passes import Context, Pass, forms
from brt.passes.base import Candidate
from brt.report.load import from_json

X = to_paths([0, 1, 1, 0])
SLOW_S = 0.004


class Sleep(torch.nn.Module):
    """Passes its input on after a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Any) -> Any:
        if self.seconds:
            time.sleep(self.seconds)
        return x


@dataclass(frozen=True)
class Slower(Pass):
    """Waits, then answers."""

    name: ClassVar[str] = "acme-slower"

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Put a wait before the output."""
        return insert(graph, ctx, SLOW_S)


@dataclass(frozen=True)
class Same(Pass):
    """Changes the graph, and costs nothing to speak of."""

    name: ClassVar[str] = "acme-same"

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Put nothing before the output."""
        return insert(graph, ctx, 0.0)


@dataclass(frozen=True)
class Faster(Pass):
    """Takes out the waits that are in the model."""

    name: ClassVar[str] = "acme-faster"

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Replace the model's wait by its input."""
        for node in graph.graph.nodes:
            if node.op == "call_module" and str(node.target) == "wait":
                node.replace_all_uses_with(node.args[0])
                return True
        return False


def insert(graph: fx.GraphModule, ctx: Context, seconds: float) -> bool:
    name = ctx.insert(graph, Sleep(seconds), "sleep")
    output = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        node = graph.graph.call_module(name, (output.args[0],))
    output.args = (node,)
    return True


class Waiting(Residual):
    """A model with a wait in it, which the tracer does not open."""

    waits: list[None]

    def __init__(self) -> None:
        super().__init__()
        self.wait = torch.nn.Identity()

    def forward(self, x: Any) -> Any:
        """The residual mixture, after a wait."""
        return super().forward(self.wait(x))


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    model = Waiting().eval()
    waits = model.__dict__["waits"] = []

    def wait(self: torch.nn.Module, x: Any) -> Any:
        waits.append(time.sleep(SLOW_S))
        return x

    monkeypatch.setattr(torch.nn.Identity, "forward", wait)
    return model


def kept(fast: Any) -> list[tuple[str, ...]]:
    return [c.passes for region in fast.report.regions for c in region.candidates if c.kept]


def test_a_slower_form_is_not_kept() -> None:
    model = Mixture().eval()
    fast = brt.optimize(model, passes=[Slower()], sample=X, measure=True)
    assert kept(fast) == [()]
    assert fast.report.regions[0].kept_nothing
    (record,) = fast.report.records
    assert not record.changed
    assert "a form without it is kept" in record.left[0].why
    assert "nothing was kept for the model" in str(fast.report)
    assert not fast.inserted  # no graph runs, so that nothing is slower
    assert not fast.stats
    torch.testing.assert_close(fast(X), model(X))


def test_a_faster_form_is_kept_without_what_slows_it(waiting: Waiting) -> None:
    passes = [Slower(), Faster(), Same()]
    fast = brt.optimize(waiting, passes=passes, sample=X, measure=True)
    (found,) = kept(fast)
    assert "acme-faster" in found
    assert "acme-slower" not in found
    (region,) = fast.report.regions
    assert [c.passes for c in region.candidates][:4] == [
        (),
        ("acme-slower",),
        ("acme-slower", "acme-faster"),
        ("acme-slower", "acme-faster", "acme-same"),
    ]
    best = next(c for c in region.candidates if c.kept)
    assert best.seconds < 0.6 * region.candidates[0].seconds
    assert [record.name for record in fast.report.records] == [p.name for p in passes]
    assert [record.changed for record in fast.report.records][:2] == [False, True]
    waiting.waits.clear()
    found_X = fast(X)
    assert not waiting.waits
    torch.testing.assert_close(found_X, waiting(X))
    assert len(waiting.waits) == 1


def test_named_passes_run_unless_measuring_is_asked_for() -> None:
    model = Mixture().eval()
    fast = brt.optimize(model, passes=[Slower()], sample=X)
    assert len(fast.inserted) == 1
    assert not fast.report.regions[0].candidates
    default = brt.optimize(model, brt.profile(model, [X]), sample=X)
    assert default.report.regions[0].candidates
    plain = brt.optimize(model, brt.profile(model, [X]), sample=X, measure=False)
    assert not plain.report.regions[0].candidates


def test_training_is_measured_with_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    backward = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (ran.append(1), backward(*a, **k)))
    model = Mixture().train()
    brt.optimize(model, passes=[Same()], sample=X, measure=True)
    assert ran
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reports_tell_the_forms(tmp_path: Path) -> None:
    fast = brt.optimize(Mixture().eval(), passes=[Slower()], sample=X, measure=True)
    data = json.loads(json.dumps(fast.report.to_json()))
    assert from_json(data).regions[0].candidates == fast.report.regions[0].candidates
    page = fast.report.to_html()
    assert "Forms that were measured" in page
    assert "acme-slower" in page
    assert "the original" in str(fast.report)


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("measured again")


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRT_TUNING", str(tmp_path / "tuning.sqlite3"))
    return tmp_path


def test_the_second_time_nothing_is_measured(
    remembering: Path, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [Slower(), Faster()]
    first = brt.optimize(waiting, passes=passes, sample=X, measure=True)
    monkeypatch.setattr(forms, "race", never)
    again = brt.optimize(waiting, passes=passes, sample=X, measure=True)
    assert kept(again) == kept(first) == [("acme-faster",)]
    assert again.report.regions[0].candidates == first.report.regions[0].candidates
    assert [record.changed for record in again.report.records] == [False, True]
    # Other shapes, passes and devices are other questions
    for other in ({"sample": torch.cat([X] * 5)}, {"passes": [Faster()]}):
        with pytest.raises(AssertionError, match="measured again"):
            brt.optimize(waiting, **{"passes": passes, "sample": X, "measure": True} | other)


def test_plans_keep_the_form(
    tmp_path: Path, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        forms, "race", lambda runs, *a, **k: [1.0 - 0.1 * i for i in range(len(runs))]
    )
    profile = brt.profile(waiting, [X])
    fast = brt.optimize(waiting, profile, passes=["drop-dead-paths"], sample=X, measure=True)
    fast.save(tmp_path / "plan")
    monkeypatch.setattr(forms, "race", never)
    again = brt.load(tmp_path / "plan", waiting)
    assert kept(again) == kept(fast) == [("drop-dead-paths",)]
    monkeypatch.setattr(forms, "race", lambda runs, *a, **k: [float(i) for i in range(len(runs))])
    fast = brt.optimize(waiting, profile, passes=["drop-dead-paths"], sample=X, measure=True)
    fast.save(tmp_path / "plan")
    assert not brt.load(tmp_path / "plan", waiting).inserted


def test_race_tells_the_faster_and_stops_early() -> None:
    calls = [0, 0]

    def sleeper(i: int, seconds: float) -> Any:
        def run() -> None:
            calls[i] += 1
            time.sleep(seconds)

        return run

    slow, quick = race.race([sleeper(0, 0.006), sleeper(1, 0.002)], torch.device("cpu"))
    assert quick < 0.6 * slow
    assert calls[0] <= 6  # two to begin with, and three or four readings
    busy = race.race([lambda: time.sleep(0.002)], torch.device("cpu"), objective="occupancy")
    assert busy[0] < 0.001  # sleeping keeps nothing busy


def test_candidates_have_names() -> None:
    assert Candidate((), 1.0).name == "the original"
    assert Candidate(("a", "b"), 1.0).name == "a + b"
