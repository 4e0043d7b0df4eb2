"""fold-constants: decisions that are proved to be fixed, and what depends on no input."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dynamic_models import DIM, Mixture, to_paths
from torch import Tensor, nn

import brt
from brt import protocols
from brt.optimize import optimize
from brt.optimized import Optimized
from brt.passes import FoldConstants
from brt.passes.verify import largest_error
from brt.profile import profile
from brt.testing import check_pass

NAME = "fold-constants"
NUM_CELLS = (5, 1, 0, 8)


def folded(model: nn.Module, num_cells: int = 5, **kwargs: Any) -> Optimized:
    return optimize(model, passes=[NAME], sample=cells(num_cells), **kwargs)


def cells(num_cells: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(num_cells)
    return torch.randn(num_cells, DIM, generator=made).to(dtype)


def assert_same(fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    largest_error(fast(x), model(x), FoldConstants().tolerance)


def changed(fast: Optimized) -> bool:
    (record,) = fast.report.records
    return record.changed


class Learned(Mixture):
    """The same learned scores for every cell."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.logits = nn.Parameter(torch.tensor([0.0, 2.0, 1.0]))

    def scores(self, x: Tensor) -> Tensor:
        return self.logits.softmax(-1).expand(x.shape[0], -1)


class Placed(Mixture):
    """Scores of their own for each of eight places."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("places", torch.randn(8, 3))

    def scores(self, x: Tensor) -> Tensor:
        return self.places.softmax(-1)  # type: ignore[no-any-return, operator]


class Soft(Mixture):
    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x).softmax(-1)


class Routed(Soft):
    """The route leaves the model."""

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        return self.gather(outs, route), route


class Flows(Soft):
    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter((x, x[:, :1].contiguous()), self.scores(x))
        outs = [
            (branch(rows) * scale, scale)
            for branch, (rows, scale) in zip(self.branches, paths, strict=True)
        ]
        return self.gather(outs, route)


class Exits(nn.Module):
    """Two exits, one of which nothing can take, and one that all take that come."""

    def __init__(self, *limits: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        stages = [nn.Linear(DIM, DIM) for _ in range(3)]
        heads = [nn.Linear(DIM, 4) for _ in range(3)]
        decide = [protocols.BinaryThreshold(limit) for limit in limits]
        self.exits = brt.EarlyExit(stages, heads, decide)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.exits(x)


@dataclass(frozen=True)
class Case:
    name: str
    model: type[nn.Module] = Soft
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_cells: tuple[int, ...] = NUM_CELLS

    def __str__(self) -> str:
        return self.name

    def made(self) -> nn.Module:
        return self.model(*self.args, **self.kwargs)


def rule(name: str, protocol: protocols.Protocol, model: type[nn.Module] = Soft, **kw: Any) -> Case:
    return Case(name, model, kwargs={"protocol": protocol, **kw})


CASES = (
    Case("learned", Learned),
    Case("learned-two", Learned, kwargs={"k": 2}),
    Case("learned-residual", Learned, kwargs={"gather": {"overflow": "residual"}}),
    rule("learned-capacity", protocols.CapacityTopK(1, capacity_factor=1.0), Learned),
    Case("placed", Placed, num_cells=(8,)),
    rule("above", protocols.Threshold(-0.5)),
    rule("above-route", protocols.Threshold(-0.5), Routed),
    rule("below", protocols.Threshold(1.5)),
    rule("below-route", protocols.Threshold(1.5), Routed),
    rule("below-added", protocols.Threshold(1.5), gather={"add_residual": True}),
    rule("residual-path", protocols.Threshold(1.5, residual_path=1)),
    rule("residual-path-route", protocols.Threshold(1.5, residual_path=1), Routed),
    rule("all-paths", protocols.TopK(3)),
    rule("all-paths-route", protocols.TopK(3), Routed),
    rule("all-paths-flows", protocols.TopK(3), Flows),
    rule("all-paths-in", protocols.TopK(3), scatter={"weighted": True}, gather={"weighted": False}),
    rule("one-path", protocols.TopK(1), Routed, num_paths=1),
    rule("one-path-switch", protocols.Switch(capacity_factor=None), Routed, num_paths=1),
    rule("one-path-union", protocols.TopK(1), num_paths=1, gather={"result": "union"}),
    Case("exits", Exits, args=(2.0, -1.0)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_gives_what_the_model_gives(case: Case, dtype: torch.dtype) -> None:
    model = case.made().to(dtype)
    first, *_ = case.num_cells
    fast = optimize(model, passes=[NAME], sample=cells(first, dtype))
    assert changed(fast), fast.report
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for num_cells in case.num_cells * 2:
            for x in (cells(num_cells, dtype), -10 * cells(num_cells, dtype)):
                kept = x.clone()
                assert_same(fast, model, x)
                assert_same(twin, model, x)
                assert torch.equal(x, kept), "the input was written to"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_original_s(case: Case, training: bool) -> None:
    model = case.made().double().train(training)
    first, *_ = case.num_cells
    fast = optimize(model, passes=[NAME], sample=cells(first, torch.float64))
    for num_cells in case.num_cells:
        came = []
        for module in (model, fast, fast):
            model.zero_grad()
            leaf = cells(num_cells, torch.float64).requires_grad_()
            out = module(leaf)
            (out if isinstance(out, Tensor) else out[0]).sin().sum().backward()
            came.append([leaf.grad, *(p.grad for p in model.parameters())])
        for wanted, *found in zip(*came, strict=True):
            for one in found:
                assert (wanted is None) == (one is None)
                if wanted is not None:
                    torch.testing.assert_close(one, wanted)


def count_decisions(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    made: list[None] = []
    decide = protocols.TopK.decide

    def counted(self: protocols.TopK, scores: Tensor, num_paths: int) -> Any:
        made.append(None)
        return decide(self, scores, num_paths)

    monkeypatch.setattr(protocols.TopK, "decide", counted)
    return made


@torch.no_grad()
def test_a_decision_is_made_again_only_where_a_weight_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Learned(), cells(5)
    fast = folded(model)
    before = model(x)
    made = count_decisions(monkeypatch)
    assert torch.equal(fast(x), before)
    assert not made  # it was when the sample was compared
    for change in (
        lambda: model.logits.copy_(torch.tensor([9.0, 0.0, 0.0])),
        lambda: model.load_state_dict({**model.state_dict(), "logits": torch.tensor([0.0, 0, 9])}),
        lambda: setattr(model.logits, "data", torch.tensor([0.0, 8.0, 0.0])),
    ):
        change()
        wanted = model(x)
        assert not torch.equal(wanted, before)
        made.clear()
        assert torch.equal(fast(x), wanted)
        assert torch.equal(fast(x), wanted)
        assert len(made) == 1
        before = wanted


@torch.no_grad()
def test_rows_and_branches() -> None:
    model, x = Soft(protocol=protocols.Threshold(1.5, residual_path=1)), cells(5)
    fast = folded(model)
    rows: dict[int, Tensor] = {}
    for p, branch in enumerate(fast.branches):
        branch[0].register_forward_pre_hook(lambda _, args, p=p: rows.update({p: args[0]}))
    fast(x)
    rows.clear()
    fast(x)
    assert rows.keys() == {1}  # the others do not even run without rows
    assert rows[1] is x


@torch.no_grad()
def test_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (Learned(), Soft(k=3)):
        fast = folded(model)
        fast(cells(5))
        with monkeypatch.context() as patched:
            patched.setattr("brt.ops.path_sizes", None)
            fast(cells(5))


def test_scores_are_still_checked() -> None:
    fast = folded(Soft(protocol=protocols.Threshold(1.5)))
    with pytest.raises(brt.BrtError, match="scores hold NaN"):
        fast(torch.full((2, DIM), torch.nan))
    fast = folded(Placed(), 8)
    with pytest.raises(brt.BrtError, match="cells"):
        fast(cells(5))


@torch.no_grad()
def test_results_alias_nothing() -> None:
    for case in CASES:
        model, x = case.made(), cells(case.num_cells[0])
        fast = folded(model, case.num_cells[0])
        wanted = model(x)
        for _ in range(2):
            found = fast(x)
            largest_error(found, wanted, FoldConstants().tolerance)
            (found if isinstance(found, Tensor) else found[0]).mul_(0)


def test_inference_mode_and_then_gradients() -> None:
    model = Learned()
    model.logits.requires_grad_(False)
    fast = folded(model)
    x = cells(8)  # unlike the sample, for which there is a route already
    with torch.inference_mode():
        fast(x)
    leaf = x.clone().requires_grad_()
    fast(leaf).sum().backward()
    assert leaf.grad is not None


@torch.no_grad()
def test_other_dtypes_states_and_threads() -> None:
    model = Learned()
    fast = folded(model)
    fast(cells(5))
    half, x = copy.deepcopy(fast).bfloat16(), cells(5, torch.bfloat16)
    assert_same(half, copy.deepcopy(model).bfloat16(), x)
    other = Learned()
    other.logits.copy_(torch.tensor([5.0, 0, 0]))
    fast.load_state_dict(other.state_dict())
    assert_same(fast, other, cells(5))
    found: list[bool] = []

    def work(num_cells: int) -> None:
        with torch.no_grad():
            x = cells(num_cells)
            found.extend(bool(torch.allclose(fast(x), other(x))) for _ in range(40))

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


@torch.no_grad()
def test_a_protocol_that_is_replaced() -> None:
    for model in (Learned(), Soft(k=3)):
        fast = folded(model)
        fast(cells(5))
        for one in (model, fast):
            one.scatter.protocol = protocols.TopK(2)
        assert_same(fast, model, cells(5))


class Scaled(Soft):
    """A tensor made of two parameters, and one that leaves the model."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.a, self.b = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x @ (self.a @ self.b).tanh())
        return y, self.a + 1


def test_constants_are_kept() -> None:
    model, x = Scaled(), cells(5)
    fast = folded(model)
    (kept,) = fast.inserted.values()
    with torch.no_grad():
        assert_same(fast, model, x)
        assert kept() is kept()
        model.a.mul_(2)
        assert_same(fast, model, x)
        fast(x)[1].zero_()
        assert_same(fast, model, x)
    for module in (model, fast):
        module(x)[0].sum().backward()
    twice = model.a.grad
    model.zero_grad()
    (2 * model(x)[0].sum()).backward()
    torch.testing.assert_close(twice, model.a.grad)


class Counting(Learned):
    """Scores of a buffer that the model writes to, by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(3))  # as it is left
        self.register_buffer("view", self.seen[:])

    def scores(self, x: Tensor) -> Tensor:
        made = (self.seen * 2).expand(x.shape[0], -1)
        self.view.fill_(1.0)  # type: ignore[operator]
        return made


class Rewritten(Soft):
    """Probabilities that are written to before they are thresholds' scores."""

    def scores(self, x: Tensor) -> Tensor:
        made = super().scores(x)
        made.mul_(4)
        return made


class KeepsRoute(Learned):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.scatter(x, self.scores(x))[1]


class Own(protocols.TopK):
    pass


@pytest.mark.parametrize(
    "model",
    [
        Soft(k=2),
        Soft(protocol=protocols.Threshold(0.5)),
        Soft(protocol=protocols.Threshold(1.0)),
        Mixture(protocol=protocols.Threshold(1.5)),
        Soft(protocol=protocols.CapacityTopK(3, capacity_factor=0.5)),
        Rewritten(protocol=protocols.Threshold(1.5)),
        Soft(protocol=Own(3)),
        Exits(0.5, 1.0),
    ],
    ids=str,
)
def test_decisions_that_are_not_fixed_stay(model: nn.Module) -> None:
    fast = folded(model)
    assert not changed(fast)
    assert_same(fast, model, to_paths([0, 1, 2]))


def test_a_buffer_that_the_model_writes_to_is_no_constant() -> None:
    model, alone = Counting(), Counting()
    fast = folded(model)
    assert not changed(fast)
    with torch.no_grad():
        for path in range(3):
            for one in (model, alone):
                one.seen.copy_(torch.eye(3)[path])
            assert_same(fast, alone, cells(5))


def test_what_is_left_alone() -> None:
    (record,) = folded(KeepsRoute()).report.records
    assert "reads its route" in record.left[0].why
    assert_same(folded(KeepsRoute()), KeepsRoute(), cells(5))
    model = Soft(k=3, scatter={"inherit_weights": True})
    (record,) = folded(model).report.records
    assert "inherits weights" in record.left[0].why
    with pytest.warns(brt.PluginWarning, match="draws random numbers"):
        folded(Soft(protocol=protocols.Random()))


def test_what_evidence_shows_is_left_to_another_pass() -> None:
    x = to_paths([1, 1])
    model = Mixture(protocol=protocols.Threshold(1.0))
    names = [NAME, "fold-permanent-paths"]
    fast = optimize(model, profile(model, [x]), passes=names, sample=x)
    assert [record.changed for record in fast.report.records] == [False, True]
    model = Soft(k=3)
    fast = optimize(model, profile(model, [x]), passes=names[::-1], sample=x)
    assert [record.changed for record in fast.report.records] == [True, False]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_keeps_the_rules_of_passes(case: Case) -> None:
    others = [cells(num_cells) for num_cells in case.num_cells]
    check_pass(FoldConstants(), case.made(), others[:1], others=others)
