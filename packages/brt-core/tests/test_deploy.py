"""Optimised models where they are deployed: exported, compiled, and loaded on another machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import Mixture, to_paths
from safetensors import safe_open

import brt
from brt.optimized import Optimized
from brt.passes import BUILTIN, forms, fusion

INSIDE = to_paths([0, 0, 0, 0])  # path 0 always, the others never
MIXED = to_paths([0, 1, 1, 0, 1])
OUTSIDE = to_paths([2, 1, 2, 2])


def made(name: str, profiled: torch.Tensor) -> tuple[Mixture, Optimized]:
    model = Mixture().eval()
    profile = brt.profile(model, [profiled])
    return model, brt.optimize(model, profile, passes=[name], sample=profiled)


@pytest.mark.filterwarnings("ignore::brt.PluginWarning")
@pytest.mark.parametrize("profiled", [INSIDE, MIXED], ids=["permanent", "mixed"])
@pytest.mark.parametrize("name", [one.name for one in BUILTIN])
def test_every_pass_exports(name: str, profiled: torch.Tensor) -> None:
    model, fast = made(name, profiled)
    exported = torch.export.export(fast, (profiled,), strict=False).module()
    assert set(exported.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        for x in (profiled, OUTSIDE if len(profiled) == len(OUTSIDE) else MIXED.flip(0)):
            torch.testing.assert_close(exported(x), model(x))


@torch.no_grad()
def test_a_padded_batch_exports_as_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "race", lambda runs, *_, **__: [2e-9, 1e-9])
    model, fast = made("fuse-horizontal", MIXED)
    assert "PaddedLevels" in {type(module).__name__ for module in fast.inserted.values()}
    exported = torch.export.export(fast, (MIXED,), strict=False).module()
    torch.testing.assert_close(exported(MIXED), model(MIXED))


@torch.no_grad()
def test_pinned_paths_compile() -> None:
    model, fast = made("pin-capacities", MIXED)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    for x in (MIXED, OUTSIDE, to_paths([2] * 7)):
        torch.testing.assert_close(compiled(x), model(x))


def test_drift_counts_nothing_in_a_graph() -> None:
    model = Mixture().eval()
    drift = brt.OnDrift(every=1)
    profile = brt.profile(model, [MIXED])
    fast = brt.optimize(model, profile, passes=[], sample=MIXED, on_drift=drift)
    torch.export.export(fast, (MIXED,), strict=False)
    assert fast.stats["load:scatter"].hits == 0


def test_forms_of_another_machine_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced = []

    def last_wins(runs: list[Callable[[], None]], *_: Any, **__: Any) -> list[float]:
        raced.append(len(runs))
        return [1.0 - 0.1 * i for i in range(len(runs))]

    monkeypatch.setattr(forms, "race", last_wins)
    model = Mixture().eval()
    profile = brt.profile(model, [MIXED])
    fast = brt.optimize(model, profile, passes=["pin-capacities"], sample=MIXED, measure=True)
    fast.save(tmp_path / "plan")
    with safe_open(tmp_path / "plan", framework="pt") as file:
        saved = json.loads(file.metadata()["plan"])
    assert saved["forms"][""]["kept"] == ["pin-capacities"]
    brt.load(tmp_path / "plan", model, sample=MIXED)
    assert raced == [2]
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with pytest.warns(brt.PluginWarning, match=r"this is cpu .* torch 9\.9\.0: measuring again"):
        again = brt.load(tmp_path / "plan", model, sample=MIXED)
    assert raced == [2, 2]
    torch.testing.assert_close(again(OUTSIDE), model(OUTSIDE))
