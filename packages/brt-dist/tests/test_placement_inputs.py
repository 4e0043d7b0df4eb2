"""What placement reads: profiles, traces, loads and topologies; and `brt place`.

Legend: T tokens, L layers, K choices, E experts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from placement_cases import Mixtures, clustered, planned_equals_one_process
from ranks import Ranks
from torch import Tensor, nn

import brt
from brt import cli, plugins
from brt_dist import _plugin
from brt_dist.placement import PlacementError, Plan, Traffic, plan, record
from brt_dist.placement.traffic import load_traffic, of_loads, of_trace
from brt_dist.topology import Topology

TOML = """
hosts = 2
ranks_per_host = 2
tflops = 10
[within]
alpha_us = 1
beta_gbs = 100
[between]
alpha_us = 10
beta_gbs = 20
"""


class Chain(nn.Module):
    """Three mixtures that decide about the same cells."""

    def __init__(self, top_k: int = 1, num_paths: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        protocol = brt.protocols.TopK(top_k)
        self.gates = nn.ModuleList(nn.Linear(8, num_paths) for _ in range(3))
        self.scatters = nn.ModuleList(
            brt.ScatterRouter(protocol, num_paths=num_paths) for _ in range(3)
        )
        self.gathers = nn.ModuleList(brt.GatherRouter(weighted=False) for _ in range(3))

    def forward(self, x_ND: Tensor) -> Tensor:
        layers = zip(self.gates, self.scatters, self.gathers, strict=True)
        cells = None
        for gate, scatter, gather in layers:
            paths, route = scatter(x_ND, gate(x_ND), cells)
            cells = route.cells
            x_ND = x_ND + gather([torch.tanh(path) for path in paths], route)
        return x_ND


@pytest.fixture
def profile() -> brt.Profile:
    return brt.profile(Chain(), [torch.randn(40, 8) for _ in range(3)], progress=False)


def test_a_profile_holds_loads_and_moves(profile: brt.Profile) -> None:
    traffic = Traffic.of(profile)
    assert traffic.model == "Chain"
    assert traffic.layers == ("scatters.0", "scatters.1", "scatters.2")
    assert traffic.num_cells == 120
    assert (traffic.load_LE.sum(1) == 120).all()
    assert traffic.moves_LEE is not None
    assert (traffic.moves_LEE.sum((1, 2)) == 120).all()
    assert (traffic.moves_LEE[0].sum(1) == traffic.load_LE[0]).all()


def test_a_plan_is_for_its_model(profile: brt.Profile) -> None:
    found = plan(profile, 2)
    found.check(Chain(), 2)
    with pytest.raises(PlacementError, match="for 2 ranks, and there are 4"):
        found.check(Chain(), 4)
    with pytest.raises(PlacementError, match="for 3 routers of 4 paths"):
        found.check(Chain(num_paths=6), 2)
    with pytest.raises(PlacementError, match="Mixtures has"):
        found.check(Mixtures(), 2)
    with pytest.raises(PlacementError, match="Linear has none"):
        found.check(nn.Linear(2, 2), 2)
    plan(of_trace(np.zeros((1, 3, 1), np.int64), num_experts=4), 2).check(Chain(), 2)


@pytest.mark.dist
def test_a_plan_is_carried_out(ranks_of: Callable[[int], Ranks]) -> None:
    profile = brt.profile(Mixtures(), [torch.randn(60, 8)], progress=False)
    found = plan(profile, 2, "balance")
    placement = found.placement(Mixtures(), 2)
    assert list(placement) == ["layers.0", "layers.1"]
    assert sorted(placement["layers.0"]) == [0, 0, 1, 1]
    # Another than the default
    placement["layers.1"] = [1 - rank for rank in placement["layers.1"]]
    ranks_of(2).run(planned_equals_one_process, placement)


def test_a_profile_of_several_choices_admits_balance() -> None:
    found = brt.profile(Chain(top_k=2), [torch.randn(40, 8)], progress=False)
    with pytest.raises(PlacementError, match="pass a trace"):
        plan(found, 2)
    assert plan(found, 2, "balance").admits == "nothing"


def test_a_recording_holds_what_tokens_take_together() -> None:
    model = Chain(top_k=2)
    batches = [torch.randn(20, 8) for _ in range(2)]
    traffic = record(model, batches)
    profile = Traffic.of(brt.profile(model, batches, progress=False))
    assert traffic.layers == profile.layers
    assert (traffic.load_LE == profile.load_LE).all()
    assert traffic.choice_TLK is not None
    assert traffic.choice_TLK.shape == (40, 3, 2)
    found = plan(traffic, 2, "traffic")
    assert found.admits == "co-activation"
    found.check(model, 2)
    assert model.training
    single = record(Chain(), batches)
    moves_LEE = Traffic.of(brt.profile(Chain(), batches, progress=False)).moves_LEE
    assert moves_LEE is not None
    assert single.moves_LEE is not None
    assert (single.moves_LEE == moves_LEE).all()


def test_tokens_without_experts_are_recorded() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter = brt.ScatterRouter(brt.protocols.Threshold(0.0), num_paths=3)

        def forward(self, x_ND: Tensor) -> Tensor:
            paths, _ = self.scatter(x_ND, x_ND)
            return paths[0]

    x_ND = torch.tensor([[1.0, -1, -1], [1, -1, 1], [-1, -1, -1]])
    traffic = record(Some(), [x_ND])
    assert traffic.choice_TLK is not None
    assert traffic.choice_TLK[:, 0].tolist() == [[0, -1], [0, 2], [-1, -1]]


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(PlacementError, match="no router"):
        record(nn.Linear(2, 2), [])
    with pytest.raises(PlacementError, match="no batches"):
        record(Chain(), [])
    model = nn.Sequential(Chain(), Chain(num_paths=6))
    with pytest.raises(PlacementError, match="must decide once a forward"):
        record(model, [torch.randn(4, 8)])
    assert not any(router._observers for router in model.modules() if hasattr(router, "_observers"))


def test_layers_of_different_sizes_are_refused() -> None:
    model = nn.Sequential(Chain(), Chain(num_paths=6))
    found = brt.profile(model, [torch.randn(40, 8)], progress=False)
    with pytest.raises(PlacementError, match=r"profile\.region"):
        plan(found, 2)
    assert plan(found.region("1"), 2).num_experts == 6


def test_traces_are_ordered_by_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    choice = np.array([[[0, 1, 2]], [[2, 0, 1]]], np.uint8)
    weights = np.array([[[0.1, 0.7, 0.2]], [[0.3, 0.3, 0.4]]], np.float16)
    np.savez(path, task=choice, task_w=weights, lens=np.array([2]), more=choice, more_w=weights)
    traffic = load_traffic(path, top_k=1)
    assert traffic.load_LE.tolist() == [[0, 4, 0]]
    assert load_traffic(path).choice_TLK.shape == (4, 1, 3)  # type: ignore[union-attr]
    np.savez(path, a=choice, b=choice[:, :, :2])
    with pytest.raises(PlacementError, match="must hold whole numbers"):
        load_traffic(path)
    path.write_text("nothing")
    with pytest.raises(PlacementError, match="cannot be read"):
        load_traffic(path)


@pytest.mark.parametrize("loads", [[[1, 2, 3, 4]], {"model": "x", "loads": [[1, 2, 3, 4]]}])
def test_loads_are_json(tmp_path: Path, loads: object) -> None:
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(loads))
    found = plan(path, 2, "balance")
    assert found.model == ("x" if isinstance(loads, dict) else "loads")
    assert found.planned.balance == 1.0


@pytest.mark.parametrize("bad", ["{", '{"load": []}', "[[1, -1]]", "[1]", '[["a"]]', "[]", "[[]]"])
def test_bad_loads_are_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "loads.json"
    path.write_text(bad)
    with pytest.raises(PlacementError):
        plan(path, 1, "balance")


@pytest.mark.parametrize(
    "choice", [np.zeros((2, 2)), np.zeros((2, 2, 1)), np.full((2, 2, 1), -2)], ids=str
)
def test_bad_traces_are_refused(choice: np.ndarray) -> None:
    with pytest.raises(PlacementError):
        plan(choice, 1)
    with pytest.raises(PlacementError, match="ids of a trace"):
        of_trace(np.full((1, 1, 1), 4), num_experts=4)


def test_topologies_are_files(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "t.toml", tmp_path / "t.json"
    toml.write_text(TOML)
    as_json.write_text('{"ranks_per_host": 3, "memory_experts": 4}')
    found = Topology.load(toml)
    assert found.num_ranks == 4
    assert found.cost_WW.tolist()[0] == [0, 1, 5, 5]
    assert found.within.seconds(1e9) == pytest.approx(0.010001)
    assert Topology.load(as_json).memory_experts == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "neither TOML nor JSON"),
        ("[]", "expected hosts"),
        ("{}", "ranks_per_host is missing"),
        ('{"ranks_per_host": 2, "speed": 1}', r"unknown \['speed'\]"),
        ('{"ranks_per_host": 2.5}', "must be a whole number"),
        ('{"ranks_per_host": 2, "within": {"alpha_us": 1}}', "needs alpha_us and beta_gbs"),
        ('{"ranks_per_host": 2, "within": {"alpha_us": 1, "beta_gbs": 0}}', "above 0"),
        ('{"ranks_per_host": 2, "tflops": 0}', "tflops must be above 0"),
        ('{"ranks_per_host": 2, "memory_experts": 0}', "at least 1"),
        ('{"ranks_per_host": 0}', "at least one host"),
    ],
)
def test_bad_topologies_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(PlacementError, match=says):
        Topology.load(path)


def run(*args: str, offered: tuple[object, ...] = (_plugin,)) -> int:
    with pytest.MonkeyPatch.context() as patch, plugins.using(*offered):
        patch.setattr(sys, "argv", ["brt", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def test_brt_place(
    tmp_path: Path, profile: brt.Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, topology, out = tmp_path / "p.safetensors", tmp_path / "t.toml", tmp_path / "plan.json"
    profile.save(saved)
    topology.write_text(TOML)
    assert run("place", str(saved), "--topology", str(topology), "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "moves between ranks" in said
    assert "affinity" in said
    Plan.load(out).check(Chain(), 4)
    assert run("place", str(saved), "--topology", str(topology), "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_ranks"] == 4
    assert run("place", str(saved), "--topology", str(topology), "--solver", "packing") == 0
    capsys.readouterr()
    assert run("place", str(saved), "--topology", str(topology), "--objective", "speed") == 2
    assert "objective is one of" in capsys.readouterr().err


def test_brt_place_needs_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    assert run("place", str(path), "--topology", str(path), offered=()) == 2
    assert "packages/brt-dist" in capsys.readouterr().err


def test_solvers_have_names() -> None:
    with plugins.using(_plugin):
        found = plan(clustered(), 4, solver="packing")
    assert found.planned == found.packed
    assert of_loads([[1.0, 2.0]]).num_cells == 3
