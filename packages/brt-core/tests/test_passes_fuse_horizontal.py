"""fuse-horizontal: equal to the branches on any input, and honest about what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import plugins
from brt.passes import fusion
from brt.passes.fuse_horizontal import FuseHorizontal, GroupedLevels
from brt.protocols import CapacityTopK, Random, Threshold, TopK

DIM = 6


class Fast:
    """A kernel that always wins the estimate: the reference by another name."""

    @brt.hookimpl
    def brt_kernels(self) -> Iterator[brt.KernelSpec]:
        yield brt.KernelSpec(
            op="grouped_linear",
            device="cpu",
            name="acme-fast",
            forward=brt.reference.grouped_linear,
            estimate=lambda *args: 0.0,
        )


@pytest.fixture(autouse=True)
def fast_kernel() -> Iterator[None]:
    with plugins.using(Fast()):
        yield


class Gated(nn.Module):
    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 8, bias=False)
        self.up = nn.Linear(DIM, 8, bias=False)
        self.down = nn.Linear(8, DIM, bias=False)
        self.flip = flip

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.silu(self.gate(x)), self.up(x)
        return self.down(up * gate if self.flip else gate * up)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(DIM, 5), nn.Identity(), nn.ReLU())
        self.gated, self.up = nn.Linear(5, 7), nn.Linear(5, 7)
        self.last = nn.Sequential(
            nn.Sequential(nn.Dropout(0.1), nn.Linear(7, DIM)), nn.GELU("tanh")
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.mul(F.gelu(self.gated(x)), self.up(x)))


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(DIM, DIM),
    "mlp": lambda: nn.Sequential(nn.Linear(DIM, 9), nn.GELU(), nn.Linear(9, DIM)),
    "no-bias": lambda: nn.Sequential(nn.Linear(DIM, 9, False), nn.ReLU(), nn.Linear(9, DIM, False)),
    "gated": Gated,
    "gated-flipped": lambda: Gated(flip=True),
    "deep": Deep,
}


class Layer(nn.Module):
    def __init__(
        self, make: Callable[[], nn.Module], protocol: Any = None, *, use_each: bool = False
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 3)
        self.scatter = brt.ScatterRouter(protocol or TopK(2), 3)
        self.experts = nn.ModuleList(make() for _ in range(3))
        self.gather = brt.GatherRouter()
        self.use_each = use_each

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        if self.use_each:
            return self.gather(brt.each(self.experts, paths), route)
        outs = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        return self.gather(outs, route)


def optimised(model: nn.Module, sample: Tensor | None = None) -> Any:
    return brt.optimize(model, passes=[FuseHorizontal()], sample=sample)


def is_fused(fast: Any) -> bool:
    return any(isinstance(module, GroupedLevels) for module in fast.inserted.values())


def reasons(fast: Any) -> str:
    return "; ".join(
        f"{left.what}: {left.why}"
        for region in fast.report.regions
        for record in region.records
        for left in record.left
    )


@pytest.mark.parametrize("use_each", [False, True], ids=["opened", "each"])
@pytest.mark.parametrize("name", BRANCHES)
def test_equal_on_any_input(name: str, use_each: bool) -> None:
    model = Layer(BRANCHES[name], use_each=use_each).eval()
    fast = optimised(model)
    assert is_fused(fast), reasons(fast)
    for num_cells in (0, 1, 7, 33):
        x = torch.randn(num_cells, DIM)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    one = torch.randn(1, DIM).expand(9, DIM)  # all on the same paths
    torch.testing.assert_close(fast(one), model(one), rtol=1e-5, atol=1e-6)


def test_capacity_and_dropped_cells() -> None:
    model = Layer(BRANCHES["mlp"], CapacityTopK(2, 0.5)).eval()
    fast = optimised(model)
    assert is_fused(fast), reasons(fast)
    x = torch.randn(24, DIM)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_parameters_of_the_model() -> None:
    model = Layer(BRANCHES["gated"]).train()
    fast = optimised(model)
    assert is_fused(fast), reasons(fast)
    x, found = torch.randn(9, DIM), []
    for module in (fast, model):
        model.zero_grad()
        module(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == len(list(model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_stacked_weights_follow_the_model() -> None:
    model = Layer(BRANCHES["mlp"]).eval()
    fast, x = optimised(model), torch.randn(9, DIM)
    (fused,) = (m for m in fast.inserted.values() if isinstance(m, GroupedLevels))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        assert fused._stacked(0, "weight") is fused._stacked(0, "weight")
        model.experts[1][0].weight.mul_(3)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        other = copy.deepcopy(fast)
        other.get_parameter("experts.0.2.bias").add_(1)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(other(x), fast(x))
    assert set(fast.state_dict()) == set(model.state_dict())
    fast.load_state_dict(Layer(BRANCHES["mlp"]).state_dict())
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    model.double()
    torch.testing.assert_close(fast(x.double()), model(x.double()))


def test_compiled() -> None:
    model = Layer(BRANCHES["mlp"]).eval()
    fast, x = optimised(model), torch.randn(9, DIM)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        model.experts[0][0].weight.mul_(3)  # nothing stale is in the compiled code
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "residual":
            return x + self.one(x)
        if self.what == "ungated":
            return self.one(x) * self.two(x)
        if self.what == "twice":
            return F.relu(F.relu(self.one(x)))
        if self.what == "first":
            return self.one(F.relu(x))
        return self.one(x) * 2


STRANGE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm": (lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)), "is a LayerNorm"),
    "residual": (lambda: Odd("residual"), "is no linear layer"),
    "ungated": (lambda: Odd("ungated"), "does not multiply an activated layer"),
    "twice": (lambda: Odd("twice"), "does not follow a linear layer"),
    "first": (lambda: Odd("first"), "does not follow a linear layer"),
    "scaled": (lambda: Odd("scaled"), "does not multiply two layers"),
    "nothing": (lambda: nn.Identity(), "no linear layer"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_branches_are_left_alone_with_the_reason(name: str) -> None:
    make, reason = STRANGE[name]
    model = Layer(make).eval()
    fast = optimised(model)
    assert reason in reasons(fast)
    assert not is_fused(fast)
    x = torch.randn(5, DIM)
    assert torch.equal(fast(x), model(x))


def unlike(*branches: nn.Module) -> Layer:
    each = iter(branches)
    return Layer(lambda: next(each)).eval()


def branch(width: int, act: type[nn.Module] = nn.GELU, out: int = DIM) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, width), act(), nn.Linear(width, out))


def test_branches_of_other_widths_are_filled_up() -> None:
    model = unlike(branch(7), branch(8), branch(2))
    fast = optimised(model)
    assert is_fused(fast), reasons(fast)
    for x in (torch.randn(0, DIM), torch.randn(1, DIM), torch.randn(30, DIM)):
        found = []
        for module in (model, fast):
            model.zero_grad(set_to_none=True)
            module(x).sin().sum().backward()
            found.append([module(x).detach(), *(p.grad for p in model.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_branches_of_other_kinds_are_groups() -> None:
    model = Layer(BRANCHES["mlp"])
    model.scatter = brt.ScatterRouter(TopK(2), 5)
    model.gate = nn.Linear(DIM, 5)
    kinds = [nn.GELU, nn.ReLU, nn.GELU, nn.ReLU, nn.ReLU]
    model.experts = nn.ModuleList(branch(3 + p, kind) for p, kind in enumerate(kinds))
    fast = optimised(model.eval())
    assert "GroupedForms" in {type(module).__name__ for module in fast.inserted.values()}
    assert "paths [0, 2]" in str(fast.report)
    for num_cells in (0, 1, 40):
        x = torch.randn(num_cells, DIM)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(1, DIM).expand(9, DIM)  # all on the same paths
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_branches_that_do_not_go_together_are_left_alone() -> None:
    every = unlike(branch(7), branch(7, nn.ReLU), branch(7, nn.SiLU))
    assert "3 branches are of 3 kinds: too many to group" in reasons(optimised(every))


def test_a_padded_batch_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "race", lambda runs, *_, **__: [2e-9, 1e-9])
    model, x = Layer(BRANCHES["mlp"]).eval(), torch.randn(20, DIM)
    fast = optimised(model, x)
    assert "PaddedLevels" in {type(module).__name__ for module in fast.inserted.values()}
    assert "(padded batch)" in str(fast.report)
    for num_cells in (0, 1, 33):
        x = torch.randn(num_cells, DIM)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_slower_form_is_left_alone_with_its_times() -> None:
    model = Layer(BRANCHES["mlp"]).eval()
    with plugins.using():  # only the reference
        fast = optimised(model, torch.randn(64, DIM))
        if not is_fused(fast):
            assert "as branches" in reasons(fast)


def test_what_cannot_be_packed_is_left_alone() -> None:
    wide = Layer(BRANCHES["mlp"])
    wide.scatter = brt.ScatterRouter(Threshold(0.1), 3)
    assert is_fused(optimised(wide.eval()))  # three rows a cell at most
    wide.scatter.num_paths = 20
    wide.gate = nn.Linear(DIM, 20)
    wide.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(20))
    assert "along many paths" in reasons(optimised(wide))


def test_random_regions_are_refused() -> None:
    with pytest.warns(brt.PluginWarning, match="random"):
        optimised(Layer(BRANCHES["mlp"], Random(1)).eval())
