"""preload-weights: the same results with a bounded part of the weights in memory."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brt
from brt.passes import PreloadWeights
from brt.passes.preload_weights import Preloaded, Shelf
from brt.protocols import Label, Threshold
from brt.testing import check_pass

DIM, NUM_PATHS, NUM_LAYERS = 32, 4, 4
GROUP = 4 * 4096
"""No group of weights here needs more: 8 KiB and a little, anywhere in a file."""


class Chain(nn.Module):
    """Layers whose paths are inputs; ``each``: the branches run by `brt.each`."""

    def __init__(self, each: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.each = each
        self.scatters = nn.ModuleList(
            brt.ScatterRouter(Label(), NUM_PATHS) for _ in range(NUM_LAYERS)
        )
        self.experts = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
                for _ in range(NUM_PATHS)
            )
            for _ in range(NUM_LAYERS)
        )
        self.gather = brt.GatherRouter()
        self.eval()

    def forward(self, x: Tensor, path_NL: Tensor) -> Tensor:
        x, grid = brt.annotate(x, 0)
        for i, (scatter, experts) in enumerate(zip(self.scatters, self.experts, strict=True)):
            paths, route = scatter(x, path_NL[:, i], grid.cells)
            if self.each:
                outs = brt.each(experts, paths)
            else:
                outs = [expert(path) for expert, path in zip(experts, paths, strict=True)]
            x = x + self.gather(outs, route)
        return x


def batch(*first: int, turn: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cells that begin at these paths, and go on to the next path from layer to layer."""
    start_N1 = torch.tensor(first).unsqueeze(1)
    path_NL = (start_N1 + turn * torch.arange(NUM_LAYERS)) % NUM_PATHS
    made = torch.Generator().manual_seed(sum(first))
    return torch.randn(len(first), DIM, generator=made).to(dtype), path_NL


SEEN = [batch(p) for p in (0, 1, 2, 3)]
CASES = [*SEEN, batch(0, 2), batch(2, turn=3), batch(0, 1, 2, 3), batch(1, turn=2), batch(3, 3, 1)]


def pinned(tmp_path: Path, each: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """(a pinned model, the same in memory)"""
    model = Chain(each).to(dtype)
    twin = copy.deepcopy(model)
    brt.memory.pin(model, tmp_path / "weights.safetensors")
    return model, twin


def preloading(model: nn.Module, groups: int = 3, mode: Any = "predicted") -> Any:
    profile = brt.profile(model, SEEN, progress=False)
    one = PreloadWeights(budget_bytes=groups * GROUP, mode=mode)
    return brt.optimize(model, profile, passes=[one], sample=SEEN[0])


def shelf_of(fast: Any) -> Shelf:
    return next(m.shelf for m in fast.inserted.values() if isinstance(m, Preloaded))


def misses(fast: Any) -> int:
    return sum(n.fallbacks for name, n in fast.stats.items() if name.startswith("preload"))


@pytest.mark.parametrize("mode", ["on-demand", "predicted"])
@pytest.mark.parametrize("each", [False, True], ids=["branches", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_on_any_input(tmp_path: Path, mode: str, each: bool, dtype: torch.dtype) -> None:
    model, twin = pinned(tmp_path, each, dtype)
    profile = brt.profile(twin, [(x.to(dtype), p) for x, p in SEEN], progress=False)
    one = PreloadWeights(budget_bytes=2 * GROUP, mode=mode)  # type: ignore[arg-type]
    fast = brt.optimize(model, profile, passes=[one])
    with torch.no_grad():
        for _ in range(2):
            for x, path_NL in CASES:
                torch.testing.assert_close(fast(x.to(dtype), path_NL), twin(x.to(dtype), path_NL))
        none = torch.zeros(0, DIM, dtype=dtype), torch.zeros(0, NUM_LAYERS, dtype=torch.int64)
        torch.testing.assert_close(fast(*none), twin(*none))
    assert shelf_of(fast).traffic["cpu"].loads > NUM_LAYERS * NUM_PATHS


def test_the_budget_holds(tmp_path: Path) -> None:
    model, twin = pinned(tmp_path)
    for groups in (1, 3, 100):
        fast = preloading(model, groups)
        with torch.no_grad():
            for case in CASES:
                torch.testing.assert_close(fast(*case), twin(*case))
        held = shelf_of(fast).resident_bytes["cpu"]
        assert held <= groups * GROUP
        assert held <= GROUP * NUM_LAYERS * NUM_PATHS  # no more than there are weights
    small = brt.optimize(model, None, passes=[PreloadWeights(100, "on-demand")])
    (record,) = small.report.regions[0].records
    assert "more than the budget of 100" in record.left[0].why
    assert not record.changed


def test_what_is_predicted_is_there(tmp_path: Path) -> None:
    model, twin = pinned(tmp_path)
    found = {}
    for mode in ("on-demand", "predicted"):
        fast = preloading(model, 3, mode)
        with torch.no_grad():
            for _ in range(3):
                for case in SEEN:
                    torch.testing.assert_close(fast(*case), twin(*case))
        found[mode] = misses(fast)
    # Only where a call begins, nothing tells the path
    assert found["predicted"] <= 3 * len(SEEN)
    assert found["on-demand"] > 2 * found["predicted"]


def test_weights_that_are_written_to_are_seen(tmp_path: Path) -> None:
    model, twin = pinned(tmp_path)
    fast, case = preloading(model, 100), CASES[6]
    with torch.no_grad():
        torch.testing.assert_close(fast(*case), twin(*case))
        for net in (model, twin):
            net.experts[1][2][0].weight.mul_(3)
        torch.testing.assert_close(fast(*case), twin(*case))
        state = {name: t * 0.5 for name, t in twin.state_dict().items()}
        twin.load_state_dict(state)
        fast.load_state_dict(state)
        torch.testing.assert_close(fast(*case), twin(*case))
        torch.testing.assert_close(fast.state_dict(), twin.state_dict())
        assert list(fast.state_dict()) == list(twin.state_dict())


def test_copies_and_conversions_run_from_memory(tmp_path: Path) -> None:
    model, twin = pinned(tmp_path)
    fast, case = preloading(model), CASES[4]
    with torch.no_grad():
        torch.testing.assert_close(fast(*case), twin(*case))
        other = copy.deepcopy(fast)
        torch.testing.assert_close(other(*case), twin(*case))
        assert not shelf_of(other).traffic
        brt.memory.load(model)
        torch.testing.assert_close(fast(*case), twin(*case))
        brt.memory.unload(model)
        torch.testing.assert_close(fast(*case), twin(*case))
        fast.to(torch.bfloat16)
        twin.to(torch.bfloat16)
        x = case[0].bfloat16()
        torch.testing.assert_close(fast(x, case[1]), twin(x, case[1]))
        assert model.experts[0][0][0].weight.dtype == torch.float32


def test_several_threads(tmp_path: Path) -> None:
    model, twin = pinned(tmp_path)
    fast, failed = preloading(model, 2), []
    wanted = [twin(*case).detach() for case in CASES]

    def work(shift: int) -> None:
        with torch.no_grad():
            for i in range(6 * len(CASES)):
                at = (i * (shift + 1)) % len(CASES)
                if not torch.allclose(fast(*CASES[at]), wanted[at], rtol=1e-5, atol=1e-6):
                    failed.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_gradients_reach_the_weights(tmp_path: Path) -> None:
    model, twin = pinned(tmp_path)
    fast = preloading(model)
    for net in (fast, twin):
        net(*CASES[4]).square().sum().backward()
    for one, other in zip(fast.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_refusals(tmp_path: Path) -> None:
    with pytest.warns(brt.PluginWarning, match="in memory already; brt.memory.pin"):
        brt.optimize(Chain(), passes=[PreloadWeights(mode="on-demand")])
    model, _ = pinned(tmp_path)
    with pytest.warns(brt.PluginWarning, match="it predicts by a profile"):
        brt.optimize(model, passes=["preload-weights"])
    with pytest.warns(brt.PluginWarning, match="in training mode"):
        brt.optimize(model.train(), passes=[PreloadWeights(mode="on-demand")])
    for options in ({"budget_bytes": 0}, {"likely": 0.0}, {"mode": "never"}):
        with pytest.raises(brt.PassError, match="preload-weights: budget_bytes must be"):
            PreloadWeights(**options)  # type: ignore[arg-type]


class Parts(nn.Module):
    """Branches that cannot all be lent weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scatter = brt.ScatterRouter(Threshold(0.5, 1), 3)
        self.plain = nn.Linear(DIM, DIM)
        self.recurrent = nn.LSTM(DIM, DIM)
        self.scale = nn.Parameter(torch.ones(DIM))
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        (a, b, c), route = self.scatter(x, x[:, :3].sigmoid())
        return self.gather([self.plain(a), self.recurrent(b)[0], c * self.scale], route)


def test_what_is_left_alone_is_listed(tmp_path: Path) -> None:
    model = Parts().eval()
    x = torch.randn(9, DIM)
    wanted = model(x)
    brt.memory.pin(model, tmp_path / "w.safetensors")
    fast = brt.optimize(model, passes=[PreloadWeights(mode="on-demand")], sample=x)
    torch.testing.assert_close(fast(x), wanted)
    (record,) = fast.report.regions[0].records
    assert [left.why for left in record.left] == [
        "recurrent keeps its weights in a list of its own"
    ]
    assert sum(isinstance(m, Preloaded) for m in fast.inserted.values()) == 1


@pytest.mark.parametrize("mode", ["on-demand", "predicted"])
def test_the_rules_of_passes(tmp_path: Path, mode: Any) -> None:
    model, _ = pinned(tmp_path)
    check_pass(PreloadWeights(budget_bytes=3 * GROUP, mode=mode), model, SEEN, others=CASES)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["on-demand", "predicted"])
def test_on_a_gpu_within_its_budget(mode: Any) -> None:
    model = Chain()
    twin = copy.deepcopy(model).cuda()
    profile = brt.profile(model, SEEN, progress=False)
    brt.memory.pin(model)
    fast = brt.optimize(model, profile, passes=[PreloadWeights(budget_bytes=3 * GROUP, mode=mode)])
    with torch.no_grad():
        for _ in range(3):
            for x, path_NL in CASES:
                case = x.cuda(), path_NL.cuda()
                torch.testing.assert_close(fast(*case), twin(*case), rtol=1e-4, atol=1e-5)
    assert shelf_of(fast).resident_bytes["cuda:0"] <= 3 * GROUP
    with pytest.raises(brt.PassError, match="no_grad"):
        fast(SEEN[0][0].cuda(), SEEN[0][1].cuda())
