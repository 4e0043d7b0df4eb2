"""`optimize`: what stays as it was, what the result is, and bad input."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import DIM, Mixture, Residual, Untraceable, to_paths
from torch import Tensor, nn

import brt
from brt import protocols
from brt.guard import Count
from brt.optimize import optimize
from brt.optimized import Optimized
from brt.profile import Profile, profile

INSIDE = to_paths([0, 1, 1, 0])
PASSES = ["drop-dead-paths", "fold-permanent-paths"]
DEAD = "drop-dead-paths:mixture.scatter[2]"


def batches() -> Iterator[Tensor]:
    yield INSIDE
    for paths in ([], [2], [0], [2, 1, 0], [2] * 5):
        yield to_paths(paths)


def made(model: nn.Module, **kwargs: Any) -> Optimized:
    return optimize(model, profile(model, [INSIDE]), passes=PASSES, sample=INSIDE, **kwargs)


@torch.no_grad()
def assert_same(fast: nn.Module, model: nn.Module) -> None:
    for x in batches():
        torch.testing.assert_close(fast(x), model(x))


def test_the_original_is_not_touched() -> None:
    model = Residual()
    state = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = [(name, id(module), set(vars(module))) for name, module in model.named_modules()]
    fast = made(model)
    assert_same(fast, model)
    assert modules == [(name, id(m), set(vars(m))) for name, m in model.named_modules()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == state[name][0]
        assert torch.equal(tensor, state[name][1])


def test_state_is_shared_under_the_same_names() -> None:
    model = Residual()
    fast = made(model)
    ours, theirs = fast.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(fast.inserted) == ["brt_spill_0"]
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.mixture.branches[2][0].weight.mul_(3)
    assert_same(fast, model)


def test_state_dicts_go_round() -> None:
    model, other = Residual(), Residual()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    fast = made(model)
    fast.load_state_dict(other.state_dict())
    assert_same(fast, other)
    assert_same(model, other)
    third = Residual()
    third.load_state_dict(fast.state_dict())
    assert_same(third, fast)
    with torch.no_grad():
        other.head.bias.add_(1)
    fast.load_state_dict(other.state_dict(), assign=True)
    assert_same(fast, other)
    with pytest.raises(RuntimeError, match=r"Missing key.*head"):
        fast.load_state_dict({})


class Extra(Residual):
    """Has state of its own kind."""

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def test_extra_state_stays() -> None:
    model = Extra()
    fast = made(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.load_state_dict(model.state_dict())
    assert fast.seen == {"version": 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversion_leaves_the_original_alone(dtype: torch.dtype) -> None:
    model = Residual()
    fast = made(model)
    with torch.no_grad():
        fast(INSIDE)
    fast.to(dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.dtype for t in fast.state_dict().values()} == {dtype}
    twin = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for x in batches():
            torch.testing.assert_close(fast(x.to(dtype)), twin(x.to(dtype)))
    assert_same(made(model), model)


def test_a_conversion_that_changes_nothing_keeps_sharing() -> None:
    model = Residual()
    model.tied = model.head  # two names, one layer
    fast = made(model).to("cpu").float()
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    fast.double()
    assert fast.tied.weight is fast.head.weight
    assert fast.head.weight is not model.head.weight


def test_modes_follow() -> None:
    model = Residual()
    model.mixture.branches[0].append(nn.Dropout(0.5).eval())
    fast = made(model)
    assert not fast.training
    fast.train()
    assert fast.training
    assert fast.mixture.branches[0][2].training
    assert not model.training
    model.train()
    for module in (fast, model):
        torch.manual_seed(3)
        module.came = module(INSIDE).detach()
    assert torch.equal(fast.came, model.came)
    assert fast.stats["region:model"] == Count(hits=0, fallbacks=1)
    fast.eval()
    assert_same(fast, model.eval())
    assert fast.stats["region:model"].fallbacks == 1


def test_training_after_optimising_gives_the_gradients_of_the_original() -> None:
    model = Residual()
    fast = made(model).train()
    model.train()
    grads = []
    for module in (model, fast):
        model.zero_grad()
        module(to_paths([0, 1, 0])).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for wanted, found in zip(*grads, strict=True):
        assert wanted is not None
        assert found is not None
        torch.testing.assert_close(found, wanted)


def test_deep_copies_are_apart() -> None:
    model = Residual()
    fast = made(model)
    twin = copy.deepcopy(fast)
    assert_same(twin, model)
    assert twin.stats[DEAD].hits > 0
    assert fast.stats[DEAD] == Count()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert float(twin(INSIDE).abs().sum()) == 0.0
        assert float(twin(to_paths([2])).abs().sum()) == 0.0
    assert_same(fast, model)
    twin.double()
    assert twin(INSIDE.double()).dtype == torch.float64
    assert dict(twin.report.guards())[DEAD]["hits"] == twin.stats[DEAD].hits
    assert list(twin.state_dict()) == list(model.state_dict())


def test_attributes_and_methods_of_the_model_are_there() -> None:
    model = Residual()
    model.note = "kept"  # type: ignore[assignment]
    fast = made(model)
    assert fast.note == "kept"
    assert fast.mixture.num_paths == 3
    assert torch.equal(fast.mixture.scores(INSIDE), INSIDE[:, :3])
    with pytest.raises(AttributeError, match="nowhere"):
        _ = fast.nowhere


class Stages(nn.Module):
    """Walks through a container that could be called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(Mixture(), Mixture(k=2))
        self.listed = [self.stages[0]]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            assert isinstance(stage, Mixture)
            x = x + stage(x)
            if x.shape[0] and bool((x > 1e6).any()):
                break
        return x + self.listed[0](x)


def test_regions_stay_what_they_were() -> None:
    model = Stages()
    fast = made(model)
    assert_same(fast, model)
    assert len(fast.stages) == 2
    assert fast.listed[0] is fast.stages[0]
    assert_same(copy.deepcopy(fast), model)
    model = Untraceable()
    fast = made(model)
    assert isinstance(fast.first, Mixture)
    assert type(fast.first).__name__ == "Mixture"
    assert type(model.first) is Mixture
    assert not fast.report.regions[1].reason


def test_a_container_stays_one() -> None:
    model = nn.Sequential(Mixture(), nn.ReLU()).eval()
    fast = made(model)
    assert len(fast) == 2
    assert isinstance(fast[1], nn.ReLU)
    assert [type(layer).__name__ for layer in fast] == ["Mixture", "ReLU"]
    fast.train()
    assert_same(fast, model)  # by its own code
    assert fast.stats["region:model"].fallbacks > 0
    assert fast.inserted["brt_spill_0"].training
    fast.eval()
    assert not fast.inserted["brt_spill_0"].training
    assert made(Residual())
    with pytest.raises(TypeError):
        len(made(Residual()))
    assert_same(fast, model)


def test_hooks_run() -> None:
    model = Residual()
    ran: list[str] = []
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    fast = made(model)
    fast.register_forward_hook(lambda *_: ran.append("model"))
    ran.clear()
    fast(INSIDE)
    assert ran == ["head", "model"]


def test_hooks_of_modules_that_were_opened() -> None:
    ran: list[str] = []
    model = Residual()
    fast = made(model)
    handle = fast.mixture.register_forward_hook(lambda *_: ran.append("late"))
    assert_same(fast, model)
    assert len(ran) == len(list(batches())) == fast.stats["region:model"].fallbacks
    handle.remove()
    assert_same(fast, model)
    assert len(ran) == fast.stats["region:model"].fallbacks
    model.mixture.register_forward_hook(lambda *_: ran.append("early"))
    with pytest.warns(brt.PluginWarning, match="Mixture in it has forward hooks"):
        fast = made(model)
    ran.clear()
    fast(INSIDE)
    assert ran == ["early"]


def test_threads_and_interleaved_calls() -> None:
    model = Residual()
    fast, other = made(model), made(model)
    wanted = [(x, model(x).detach()) for x in batches()]
    failed: list[str] = []

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(40):
                x, y = wanted[(start + i) % len(wanted)]
                if not torch.allclose((fast if i % 3 else other)(x), y):
                    failed.append(f"{start} {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    counts = [one.stats["region:model"].hits for one in (fast, other)]
    assert sum(counts) == 80


@torch.no_grad()
def test_results_of_calls_do_not_alias() -> None:
    fast = made(Residual())
    first = fast(INSIDE)
    kept = first.clone()
    second = fast(INSIDE)
    second.zero_()
    assert torch.equal(first, kept)
    assert torch.equal(fast(INSIDE), kept)


def test_a_model_that_can_be_traced_in_part_only() -> None:
    model = Untraceable()
    fast = made(model)
    assert_same(fast, model)
    paths = {region.path: region.reason for region in fast.report.regions}
    assert paths.keys() == {"", "first", "second"}
    assert "cannot be traced" in (paths[""] or "")
    assert paths["first"] is None
    assert "drop-dead-paths:first.scatter[2]" in fast.stats
    assert fast.stats["region:first"].hits > 0
    assert list(fast.state_dict()) == list(model.state_dict())
    far = to_paths([0]) * 100
    assert fast(far) is far
    assert_same(copy.deepcopy(fast), model)
    fast.train()
    assert fast.first.training
    assert_same(fast.eval(), model)
    assert_same(fast.float().to("cpu"), model)


def test_modules_that_stay_one_node_are_listed() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if len(x) > 3 else x * 3

    model = nn.Sequential(Odd(), Mixture()).eval()
    fast = made(model)
    (region,) = fast.report.regions
    assert region.closed.keys() == {"0"}
    assert "one node: 0: Odd" in str(fast.report)
    assert_same(fast, model)


def test_one_module_in_two_places() -> None:
    class Twice(Untraceable):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.first

    model = Twice()
    fast = made(model)
    assert fast.first is fast.second
    assert_same(fast, model)
    assert fast.stats["region:first"].hits == 2 * len(list(batches()))


class Looping(nn.Module):
    """A loop whose body has routers."""

    def __init__(self) -> None:
        super().__init__()

        class Netlet(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mixture = Mixture()

            def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
                x = x + torch.tanh(self.mixture(x))
                return x, x[:, 3:5], state

        self.loop = brt.LoopRouter(Netlet(), max_steps=3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(x, ())[0]


def test_the_body_of_a_loop_is_a_region() -> None:
    model = Looping()
    fast = made(model)
    assert_same(fast, model)
    assert "region:loop.netlet" in fast.stats
    assert fast.stats["drop-dead-paths:loop.netlet.mixture.scatter[2]"].fallbacks > 0


def test_early_exit_is_listed_where_it_stays_closed() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.ndim == 2 else x

    for make, is_open in ((nn.Linear, True), (Own, False)):
        layers = [make(DIM, DIM) for _ in range(2)]
        heads = [nn.Linear(DIM, 4) for _ in range(2)]
        model = nn.Sequential(nn.Linear(DIM, DIM), brt.EarlyExit(layers, heads)).eval()
        fast = made(model)
        reasons = {region.path: region.reason for region in fast.report.regions}
        assert reasons == {"": None} if is_open else "how many tensors" in (reasons["1"] or "")
        assert_same(fast, model)


class Options(Residual):
    """Takes a flag, and keywords."""

    def forward(self, x: Tensor, twice: bool = False, *, shift: Tensor | None = None) -> Any:  # type: ignore[override]
        y = self.mixture(x)
        if twice:
            y = y + self.mixture(y)
        if shift is not None:
            y = y + shift
        return {"y": y, "first": self.head(y)}


@torch.no_grad()
def test_other_arguments_than_the_sample_s() -> None:
    model = Options()
    shift = torch.ones(DIM)
    for sample in (INSIDE, (INSIDE,), (INSIDE, True), {"x": INSIDE, "shift": shift}, None):
        found = profile(model, [INSIDE if sample is None else sample])
        fast = optimize(model, found, passes=PASSES, sample=sample)
        for kwargs in ({}, {"twice": True}, {"shift": shift}, {"twice": True, "shift": shift}):
            torch.testing.assert_close(fast(INSIDE, **kwargs), model(INSIDE, **kwargs))  # type: ignore[arg-type]
        assert fast.stats["region:model"].fallbacks > 0


class Constants(Residual):
    """Tensors that are no state: in attributes, at two depths, and made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.linspace(0, 1, DIM)
        self.mixture.plain = torch.linspace(1, 2, DIM)

    def forward(self, x: Tensor) -> Any:
        return self.mixture(x) * self.plain + self.mixture.plain * torch.tensor([2.0] * DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_that_are_no_state(dtype: torch.dtype) -> None:
    model = Constants()
    fast = made(model)
    assert list(dict(fast.named_buffers())) == list(dict(model.named_buffers()))
    for one in (fast, copy.deepcopy(fast)):
        one.to(dtype)
        twin = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            for x in batches():
                torch.testing.assert_close(one(x.to(dtype)), twin(x.to(dtype)))
    assert_same(made(model), model)


def test_a_compiled_result_gives_the_same() -> None:
    model = Residual()
    fast = made(model)
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        for x in (INSIDE, to_paths([2, 0, 1])):
            torch.testing.assert_close(compiled(x), model(x))


def test_an_exported_result_gives_the_same() -> None:
    model = Residual()
    exported = torch.export.export(made(model), (INSIDE,), strict=False).module()
    torch.testing.assert_close(exported(INSIDE), model(INSIDE))
    assert set(exported.state_dict()) == set(model.state_dict())


def test_convolutions_and_batches_of_tuples() -> None:
    class Two(Mixture):
        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) + y

    model, other = Two(), torch.ones(DIM)
    fast = optimize(model, profile(model, [(INSIDE, other)]), passes=PASSES, sample=(INSIDE, other))
    with torch.no_grad():
        for x in batches():
            torch.testing.assert_close(fast(x, other), model(x, other))
            torch.testing.assert_close(fast(x, y=other), model(x, y=other))


def test_under_inference_mode_and_autocast() -> None:
    model = Residual()
    fast = made(model)
    for x in batches():
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
            torch.testing.assert_close(fast(x), model(x))


def test_the_profile_of_the_result_is_that_of_the_original() -> None:
    model = Residual()
    permanent = to_paths([1, 1])
    for x in (INSIDE, permanent):
        fast = optimize(model, profile(model, [x]), passes=PASSES, sample=x)
        again = profile(fast, [x])
        wanted = profile(model, [x])
        assert again.routers.keys() == wanted.routers.keys()
        for key, router in wanted.routers.items():
            assert torch.equal(again.routers[key].rows_FP, router.rows_FP)


def test_the_report() -> None:
    fast = made(Residual())
    text = str(fast.report)
    assert "Residual, " in text
    assert "path 2 of mixture.scatter: no cell of 4 took it in 1 forwards" in text
    assert "verified on the sample: largest difference" in text
    (region,) = fast.report.regions
    assert region.before is not None
    assert region.after is not None
    assert len(region.before) > len(region.after)
    kinds = {node.target: node for node in region.before.nodes}
    assert kinds["mixture.scatter"].kind == "scatter"
    assert kinds["mixture.gather"].kind == "gather"
    branch = kinds["mixture.branches.1.0"]
    assert (branch.kind, branch.path, branch.share) == ("branch", 1, 0.5)
    assert branch.scatter == kinds["mixture.scatter"].name
    assert kinds["mixture.scatter"].router == "mixture.scatter#0"
    assert any(node.kind == "guard" for node in region.after.nodes)
    (router,) = region.routers
    assert router.share_P == (0.5, 0.5, 0.0)
    assert router.never_P == (False, False, True)
    data = json.loads(json.dumps(fast.report.to_json()))
    assert data["guards"][DEAD] == {"hits": 0, "fallbacks": 0}
    fast(to_paths([2]))
    assert fast.report.to_json()["guards"][DEAD] == {"hits": 0, "fallbacks": 1}
    assert f"{DEAD}  0     1" in str(fast.report)
    assert data["versions"]["torch"] == torch.__version__
    fast.reset_stats()
    assert fast.stats[DEAD] == Count()


def test_it_is_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(brt.PassError, match="save its state_dict"):
        torch.save(made(Residual()), tmp_path / "fast.pt")


def test_a_report_outlives_the_work() -> None:
    fast = optimize(Residual(), passes=[])
    assert fast.report.records == ()
    assert "passes: none" in str(fast.report)
    assert_same(fast, Residual())


# Bad input


def test_what_is_no_model_for_it() -> None:
    x = INSIDE
    for model, what in (
        (3, "takes an nn.Module, got int"),
        (nn.Linear(DIM, DIM), r"Linear has no routers.*brt\.adapt"),
        (nn.Module(), "no routers"),
        (made(Residual()), "give the original"),
        (nn.Sequential(made(Residual())), "give the original"),
    ):
        with pytest.raises(brt.PassError, match=what):
            optimize(model, passes=[], sample=x)  # type: ignore[arg-type]


def test_a_model_that_is_a_router_has_nothing_around_it() -> None:
    model = brt.ScatterRouter(protocols.TopK(1), 2)
    with pytest.warns(brt.PluginWarning, match="nothing to work on"):
        fast = optimize(model, passes=[])
    paths, _ = fast(INSIDE, INSIDE[:, :2])
    assert len(paths) == 2


def test_a_model_that_cannot_be_copied() -> None:
    model = Residual()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(brt.PassError, match=r"cannot be copied.*deepcopy"):
        optimize(model, passes=[])


def test_a_profile_that_does_not_fit(tmp_path: Path) -> None:
    model = Residual()
    other = profile(Mixture(4), [INSIDE])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(brt.ProfileError, match="does not fit the model"):
        optimize(model, other, sample=INSIDE)
    with pytest.raises(brt.PassError, match=r"needs a profile: brt\.optimize"):
        optimize(model, sample=INSIDE, passes=PASSES)
    with pytest.raises(brt.PassError, match=r"must be a brt\.Profile, got str"):
        optimize(model, "profile.brt", sample=INSIDE)  # type: ignore[arg-type]
    file = tmp_path / "a.safetensors"
    profile(model, [INSIDE]).save(file)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(brt.ProfileError, match="damaged"):
        optimize(model, Profile.load(file))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_sample_that_the_model_does_not_take() -> None:
    model = Residual()
    found = profile(model, [INSIDE])
    with pytest.raises(brt.ProtocolError, match="scores must be"):
        optimize(model, found, sample=torch.randn(3, 2, 1))


def test_a_trace_that_answers_otherwise_is_left_alone() -> None:
    class Sly(Mixture):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            Sly.calls += 1  # which a graph does not see
            return super().forward(x) + (0.0 if type(x) is Tensor else 1.0)

    model = Sly()
    with pytest.warns(brt.PluginWarning, match="another result on the sample"):
        fast = made(model)
    assert fast.report.regions[0].reason
    assert_same(fast, model)
