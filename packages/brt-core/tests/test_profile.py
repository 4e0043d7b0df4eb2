"""Profiles: right counts for any batch, right cells at any depth, files that are whole or refused.

Legend: N cells, D features, P paths, Q paths of a second router, F forwards.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import brt
from brt import Profile, ProfileError, cli, plugins
from brt.graph import as_call
from brt.profile import Recorder, RouterProfile, overhead, profile
from brt.profile.data import MARGIN_EDGES
from brt.protocols import CapacityTopK, Random, Threshold, TopK

DIM, PATHS = 4, 3


class Moe(nn.Module):
    def __init__(self, protocol: Any = None, num_paths: int = PATHS) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_paths)
        self.scatter = brt.ScatterRouter(protocol or TopK(2), num_paths)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(num_paths))
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x: Tensor, cells: Any = None) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1), cells)
        outs = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        out: Tensor = self.gather(outs, route)
        return out


class Chain(nn.Module):
    """Blocks that decide about the same cells, one after another."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Moe(num_paths=2 + i) for i in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x, grid = brt.annotate(x, 0)
        for block in self.blocks:
            x = x + block(x, grid.cells)
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Moe()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.block(x))
        return y


class Nested(nn.Module):
    """An outer decision, an inner one about one path, and one about the union of some paths."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(DIM, PATHS) for _ in range(3))
        self.outer = brt.ScatterRouter(TopK(1), PATHS)
        self.inner = brt.ScatterRouter(TopK(2), PATHS)
        self.last = brt.ScatterRouter(TopK(1), PATHS)
        self.union = brt.GatherRouter(result="union", weighted=False)
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.outer(x, self.gates[0](x))
        inner, deeper = self.inner(paths[1], self.gates[1](paths[1]), route[1])
        where = [deeper[2], route[0], deeper[0]]  # path 2 of the outer and 1 of the inner go no on
        rows, cells = self.union([inner[2], paths[0], inner[0]], where)
        ends, end = self.last(rows, self.gates[2](rows), cells)
        out: Tensor = self.gather(list(ends), [end[p] for p in range(PATHS)])
        return out


def random_batches(*sizes: int, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(size, DIM, generator=made) for size in sizes]


SIZES = (0, 1, 7, 7, 30)


# In plain Python


Decisions = list[tuple[str, brt.Root, dict[int, set[int]]]]


def observed(model: nn.Module, batches: list[Any]) -> list[Decisions]:
    """For each forward: (key, root, {root cell: paths}) of each decision, by one cell at a time."""
    forwards = []
    for batch in batches:
        decisions: Decisions = []
        calls: Counter[str] = Counter()
        handles = []
        for path, module in model.named_modules():
            if isinstance(module, brt.Router):

                def observe(
                    _: Any,
                    route: brt.Route,
                    scores: Tensor,
                    path: str = path,
                    to: Decisions = decisions,
                    calls: Counter[str] = calls,
                ) -> None:
                    taken: dict[int, set[int]] = {}
                    roots = route.cells.cell_R
                    for n in range(route.num_cells):
                        taken[n if roots is None else int(roots[n])] = set()
                    offsets = route.offsets_P1.tolist()
                    for p in range(route.num_paths):
                        for r in range(offsets[p], offsets[p + 1]):
                            n = int(route.cell_R[r])
                            taken[n if roots is None else int(roots[n])].add(p)
                    to.append((f"{path}#{calls[path]}", route.cells.root, taken))
                    calls[path] += 1

                handles.append(module.register_observer(observe))
        args, kwargs = as_call(batch)
        with torch.no_grad():
            model(*args, **kwargs)
        for handle in handles:
            handle.remove()
        forwards.append(decisions)
    return forwards


def joint_of(forwards: Any, found: Profile) -> dict[tuple[str, str], Tensor]:
    joint: dict[tuple[str, str], Tensor] = {}
    for decisions in forwards:
        for i, (first, root, before) in enumerate(decisions):
            for second, other, after in decisions[i + 1 :]:
                if root is not other:
                    continue
                shape = (found.routers[first].num_paths, found.routers[second].num_paths)
                counts = joint.setdefault((first, second), torch.zeros(shape, dtype=torch.int64))
                for cell in before.keys() & after.keys():
                    for p in before[cell]:
                        for q in after[cell]:
                            counts[p, q] += 1
    return joint


MODELS: list[Callable[[], nn.Module]] = [Moe, Chain, Twice, Nested]


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_counts_are_those_of_one_cell_at_a_time(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model = make().eval()
    batches = random_batches(*SIZES)
    found = profile(model, batches, window=None)
    forwards = observed(model, batches)
    rows: dict[str, list[list[int]]] = defaultdict(list)
    cells: dict[str, list[int]] = defaultdict(list)
    for decisions in forwards:
        for key, _, taken in decisions:
            num_paths = found.routers[key].num_paths
            rows[key].append(
                [sum(p in paths for paths in taken.values()) for p in range(num_paths)]
            )
            cells[key].append(len(taken))
    assert list(found.routers) == list(rows)
    for key, router in found.routers.items():
        assert router.rows_FP.tolist() == rows[key]
        assert router.cells_F.tolist() == cells[key]
    joint = joint_of(forwards, found)
    assert found.joint.keys() == joint.keys()
    for pair, counts in joint.items():
        assert torch.equal(found.joint[pair], counts), pair
    assert found.num_forwards == len(batches)


def test_joint_counts_hold_something() -> None:
    torch.manual_seed(1)
    found = profile(Nested(), random_batches(*SIZES))
    assert set(found.joint) == {
        ("outer#0", "inner#0"),
        ("outer#0", "last#0"),
        ("inner#0", "last#0"),
    }
    assert found.joint["outer#0", "inner#0"][1].sum() > 0
    assert found.joint["outer#0", "inner#0"][[0, 2]].sum() == 0, "inner is about path 1"
    assert found.joint["outer#0", "last#0"][2].sum() == 0, "path 2 goes no further"


def test_cells_of_different_roots_are_never_joined() -> None:
    class TwoRoots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Moe(), Moe()

        def forward(self, x: Tensor) -> Tensor:
            first, one = brt.annotate(x, 0)
            second, other = brt.annotate(x, 0)
            out: Tensor = self.a(first, one.cells) + self.b(second, other.cells)
            return out + self.a(first, one.cells)

    found = profile(TwoRoots(), random_batches(5, 5))
    assert set(found.joint) == {("a.scatter#0", "a.scatter#1")}


@pytest.mark.parametrize(("window", "num_pairs"), [(0, 0), (1, 3), (2, 5), (None, 6)])
def test_a_window_bounds_the_pairs(window: int | None, num_pairs: int) -> None:
    found = profile(Chain(4), random_batches(6, 3), window=window)
    assert len(found.joint) == num_pairs
    assert found.window == window


# Statistics


def router_of(found: Profile, key: str = "scatter#0") -> RouterProfile:
    return found.routers[key]


def test_statistics_over_forwards() -> None:
    torch.manual_seed(0)
    found = router_of(profile(Moe(), random_batches(4, 9, 30, 1)))
    rows_FP = found.rows_FP.numpy()
    share_FP = rows_FP / found.cells_F.numpy()[:, None]
    for loads, values_FP in ((found.rows, rows_FP), (found.fractions, share_FP)):
        np.testing.assert_allclose(loads.mean_P, values_FP.mean(0))
        np.testing.assert_allclose(loads.min_P, values_FP.min(0))
        np.testing.assert_allclose(loads.max_P, values_FP.max(0))
        for percent in (0, 5, 37.5, 50, 95, 100):
            wanted = np.percentile(values_FP, percent, axis=0)
            np.testing.assert_allclose(loads.percentile_P(percent), wanted)
    assert found.cells == 44
    np.testing.assert_allclose(found.share_P, rows_FP.sum(0) / 44)
    with pytest.raises(ProfileError, match="from 0 to 100"):
        found.rows.percentile_P(101)


def steered(bias: list[float], protocol: Any) -> Moe:
    model = Moe(protocol, len(bias))
    with torch.no_grad():
        model.gate.bias.copy_(torch.tensor(bias))
    return model


def test_permanence() -> None:
    found = router_of(profile(steered([50, 0, 0, -50], TopK(2)), random_batches(0, 1, 20)))
    assert found.always_P.tolist() == [True, False, False, False]
    assert found.never_P.tolist() == [False, False, False, True]


def test_nothing_is_permanent_where_no_cell_was_seen() -> None:
    found = router_of(profile(Moe(), random_batches(0, 0)))
    assert not found.always_P.any()
    assert not found.never_P.any()
    assert found.fractions.mean_P.tolist() == [0.0] * PATHS
    assert found.fractions.percentile_P(50).tolist() == [0.0] * PATHS


def test_permanent_in_all_forwards_or_not_at_all() -> None:
    model, batches = Moe(TopK(1), 2), random_batches(6)
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.copy_(torch.tensor([1.0, 0.0]))
        one = profile(model, batches)
        model.gate.bias.copy_(torch.tensor([0.0, 1.0]))
        other = profile(model, batches)
    assert router_of(one).always_P.tolist() == [True, False]
    assert router_of(other).always_P.tolist() == [False, True]
    both = router_of(one.merge(other))
    assert not both.always_P.any()
    assert not both.never_P.any()


def test_dropped_and_unrouted_cells() -> None:
    protocol = CapacityTopK(2, capacity_factor=0.5)
    found = router_of(profile(Moe(protocol), random_batches(0, 1, 12, 40)))
    assert found.dropped == 2 * 53 - int(found.rows_FP.sum())
    assert found.dropped > 0
    high = router_of(profile(Moe(Threshold(2.0)), random_batches(3, 5)))
    assert high.unrouted_F.tolist() == [3, 5]
    assert high.dropped == 0


def test_margins() -> None:
    class Given(nn.Module):
        def __init__(self, protocol: Any) -> None:
            super().__init__()
            self.scatter = brt.ScatterRouter(protocol, 3)

        def forward(self, scores: Tensor) -> Any:
            return self.scatter(scores, scores)[1].load_P

    scores = torch.tensor([[0.5, 0.25, 0.0], [300.0, 0.0, 0.0], [0.1, 0.1, 0.1], [1.0, 0.0, 0.9]])
    found = router_of(profile(Given(TopK(1)), [scores]))
    bins = [int(np.searchsorted(MARGIN_EDGES, m, side="right")) for m in (0.25, 300.0, 0.0, 0.1)]
    assert found.margins_B.tolist() == np.bincount(bins, minlength=len(MARGIN_EDGES) + 1).tolist()
    everywhere = router_of(profile(Given(TopK(3)), [scores]))
    assert everywhere.margins_B.sum() == 0, "no other path: no margin"
    ruled_out = scores.masked_fill(scores == 0, -torch.inf)
    assert router_of(profile(Given(TopK(1)), [ruled_out])).margins_B.sum() == 3


def test_scores_that_the_model_overwrites_have_no_margins() -> None:
    class Overwrites(Moe):
        def forward(self, x: Tensor, cells: Any = None) -> Tensor:
            scores = self.gate(x).softmax(-1)
            paths, _ = self.scatter(x, scores)
            scores.zero_()
            return paths[0]

    found = router_of(profile(Overwrites(), random_batches(8)))
    assert found.cells == 8
    assert found.rows_FP.sum() == 16
    assert found.margins_B.sum() == 0


# Calls


def test_a_router_used_twice_has_two_keys() -> None:
    found = profile(Twice(), random_batches(3, 4))
    assert list(found.routers) == ["block.scatter#0", "block.scatter#1"]
    assert [r.call for r in found.routers.values()] == [0, 1]


def test_a_router_that_is_not_called_every_time() -> None:
    class Sometimes(Moe):
        def forward(self, x: Tensor, cells: Any = None) -> Tensor:
            return super().forward(x) if len(x) > 3 else x

    found = profile(Sometimes(), random_batches(5, 2, 6))
    assert router_of(found).forward_F.tolist() == [0, 2]
    assert found.num_forwards == 3
    with pytest.raises(ProfileError, match="no router decided"):
        profile(Sometimes(), random_batches(1))


def test_loops_and_exits() -> None:
    class Netlet(nn.Module):
        def forward(self, x: Tensor, state: Any) -> Any:
            return x - 1, torch.cat([x[:, :1], 1 - x[:, :1]], 1), state

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loop = brt.LoopRouter(Netlet(), max_steps=3)
            parts = [nn.Linear(DIM, DIM) for _ in range(3)]
            protocol = brt.protocols.BinaryThreshold(0.6)
            self.exit = brt.EarlyExit(parts, [nn.Linear(DIM, 2) for _ in parts], protocol)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.exit(self.loop(x, ())[0])
            return out

    x = torch.tensor([[0.0], [1.0], [2.0], [9.0]]).expand(4, DIM)
    found = profile(Model(), [x])
    steps = [found.routers[f"loop#{i}"].rows_FP.tolist() for i in range(3)]
    assert steps == [[[3, 1]], [[2, 1]], [[1, 1]]]
    assert found.joint["loop#0", "loop#1"].tolist() == [[2, 1], [0, 0]]
    assert [key for key in found.routers if key.startswith("exit")] == [
        "exit.scatters.0#0",
        "exit.scatters.1#0",
    ]


def test_batches_may_be_tensors_tuples_lists_or_dicts() -> None:
    (x,) = random_batches(5)
    ways = [x, (x,), [x], {"x": x}, (x, None)]
    found = profile(Moe(), ways)
    assert len({tuple(rows) for rows in router_of(found).rows_FP.tolist()}) == 1
    assert profile(Moe(), iter(ways)).num_forwards == 5


def test_the_model_is_left_as_it_was() -> None:
    model = Moe()
    model.experts[0].eval()
    modes = [m.training for m in model.modules()]

    class Modes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return x

    wrapped = nn.Sequential(Modes(), model)
    profile(wrapped, random_batches(3))
    assert [m.training for m in model.modules()] == modes
    assert wrapped.training
    with pytest.raises(TypeError):
        profile(model, [(1, 2, 3, 4, 5)])
    assert [m.training for m in model.modules()] == modes
    assert not model.scatter._observers
    assert not any(m._forward_pre_hooks for m in wrapped.modules())


def test_in_training_mode_gradients_may_flow() -> None:
    class Trains(Moe):
        def forward(self, x: Tensor, cells: Any = None) -> Tensor:
            assert self.training
            assert torch.is_grad_enabled()
            return super().forward(x)

    profile(Trains(), random_batches(3), training=True)


def test_random_draws_stay_the_same() -> None:
    model, batches = Moe(Random(1)), random_batches(6, 7)
    outs = []
    for recorded in (False, True):
        torch.manual_seed(3)
        if recorded:
            profile(model, batches)
        else:
            with torch.no_grad():
                for batch in batches:
                    model(batch)
        outs.append(torch.rand(3))
    assert torch.equal(*outs)


def test_a_compiled_model_is_profiled_eagerly() -> None:
    model, batches = Moe(), random_batches(6, 7)
    wanted = profile(model, batches)
    compiled: Any = torch.compile(model, backend="eager")
    assert profile(compiled, batches).digest() == wanted.digest()
    inside = nn.Sequential(Moe())
    inside[0].compile(backend="eager")
    assert router_of(profile(inside, batches), "0.scatter#0").cells == 13


# Regions


def test_the_profile_of_a_region_is_that_of_its_module_alone() -> None:
    torch.manual_seed(0)
    model, batches = Chain(), random_batches(4, 0, 9)
    whole = profile(model, batches)
    inputs: list[Any] = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, args: inputs.append(args))
    for batch in batches:
        model.eval()(batch)
    handle.remove()
    part = whole.region("blocks.1")
    alone = profile(model.blocks[1], inputs)
    assert list(part.routers) == list(alone.routers) == ["scatter#0"]
    assert torch.equal(part.routers["scatter#0"].rows_FP, alone.routers["scatter#0"].rows_FP)
    part.check(model.blocks[1])
    assert whole.region("") is whole
    blocks = whole.region("blocks")
    pairs = [(a, b) for b in range(3) for a in range(b)]
    assert set(blocks.joint) == {(f"{a}.scatter#0", f"{b}.scatter#0") for a, b in pairs}
    with pytest.raises(ProfileError, match=r"no router inside 'nowhere'.*blocks\.0\.scatter"):
        whole.region("nowhere")


def test_a_region_that_is_called_twice_has_twice_the_forwards() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = Twice()

        def forward(self, x: Tensor) -> Tensor:
            once: Tensor = self.twice(x[:3])
            return self.twice(x) + once.sum()

    found = profile(Outer(), random_batches(5, 8))
    assert [r.call for r in found.routers.values()] == [0, 1, 2, 3]
    part = found.region("twice")
    assert list(part.routers) == ["block.scatter#0", "block.scatter#1"]
    assert part.num_forwards == 4
    assert part.routers["block.scatter#1"].cells_F.tolist() == [3, 5, 3, 8]
    inner = part.region("block")
    assert list(inner.routers) == ["scatter#0"]
    assert inner.routers["scatter#0"].cells_F.tolist() == [3, 3, 5, 5, 3, 3, 8, 8]
    assert found.region("twice.block").digest() == inner.digest()


def test_joint_counts_of_a_region_add_up_over_its_calls() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = Chain(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.chain(self.chain(x))
            return y

    model, batches = Outer().eval(), random_batches(5, 8)
    part = profile(model, batches).region("chain")
    with torch.no_grad():
        inputs = [y for x in batches for y in (x, model.chain(x))]
    alone = profile(model.chain, inputs)
    assert part.joint.keys() == alone.joint.keys()
    for pair, counts in alone.joint.items():
        assert torch.equal(part.joint[pair], counts)


# Merging, files, checks


def test_merging_is_profiling_both() -> None:
    torch.manual_seed(0)
    model, batches = Chain(), random_batches(4, 0, 9, 30)
    whole = profile(model, batches)
    parts = [profile(model, batches[:1]), profile(model, batches[1:3]), profile(model, batches[3:])]
    merged = parts[0].merge(*parts[1:])
    assert merged.digest() == whole.digest()
    assert parts[0].merge().digest() == parts[0].digest()


def test_merging_refuses_other_models() -> None:
    batches = random_batches(4)
    with pytest.raises(ProfileError, match=r"different models.*\n.*blocks\.3\.scatter"):
        profile(Chain(3), batches).merge(profile(Chain(4), batches))
    with pytest.raises(ProfileError, match="window=8 here, 1 there"):
        profile(Chain(), batches).merge(profile(Chain(), batches, window=1))


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_a_saved_profile_comes_back(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    found = profile(model, random_batches(*SIZES))
    path = tmp_path / "new" / "profile.safetensors"
    found.save(path)
    again = Profile.load(path)
    assert again.digest() == found.digest()
    assert str(again) == str(found)
    again.check(model)
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile"
    profile(Chain(), random_batches(5, 6)).save(path)
    whole = path.read_bytes()
    for size in [0, 1, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ProfileError, match="cannot be read"):
            Profile.load(path)
    refused = 0
    for at in range(8, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ProfileError):
            Profile.load(path)
        refused += 1
    assert refused > 50
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(tmp_path / "missing")
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ProfileError, match="is no profile"):
        Profile.load(path)
    header = {"format": "brt-profile", "schema": "99", "digest": "", "profile": "{}"}
    save_file({"weight": torch.ones(2)}, path, header)
    with pytest.raises(ProfileError, match=r"schema 99, this brt reads 1; profile the model again"):
        Profile.load(path)


def test_a_profile_of_another_model_is_refused_with_all_differences() -> None:
    found = profile(Chain(2), random_batches(5))
    found.check(Chain(2))
    other = Chain(3)
    other.blocks[0] = Moe(TopK(1), 2)
    with pytest.raises(ProfileError) as raised:
        found.check(other)
    message = str(raised.value)
    assert "of Chain" in message
    assert "blocks.0.scatter: profiled as ScatterRouter(TopK(k=2" in message
    assert "now ScatterRouter(TopK(k=1" in message
    assert "blocks.2.scatter: profiled as no router" in message
    with pytest.raises(ProfileError, match="does not fit the model"):
        found.check(nn.Linear(2, 2))


def test_profiles_are_frozen() -> None:
    found = profile(Moe(), random_batches(2))
    with pytest.raises(AttributeError):
        found.num_forwards = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.routers["scatter#0"] = router_of(found)  # type: ignore[index]


# Wrong input


@pytest.mark.parametrize(
    ("model", "batches", "words"),
    [
        (Moe(), [], "no batches"),
        (nn.Linear(DIM, DIM), [torch.ones(2, DIM)], "Linear has no router"),
        (nn.Sequential(brt.GatherRouter()), [1], "has no router that decides"),
        (Moe(), torch.ones(2, DIM), r"got Tensor; for a single batch pass \[batch\]"),
        (Moe(), {"x": torch.ones(2, DIM)}, "got dict"),
        (Moe(), 3, "got int"),
        (lambda x: x, [1], r"nn\.Module"),
    ],
    ids=lambda case: str(case)[:24] if isinstance(case, str) else "",
)
def test_bad_input(model: Any, batches: Any, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        profile(model, batches)


# For people


def test_text() -> None:
    model = steered([50.0, 0.0, 0.0, -50.0], CapacityTopK(2, capacity_factor=0.5))
    text = str(profile(model, random_batches(4, 30)))
    assert "Profile of Moe: 2 forwards, 1 decision\n" in text
    assert "scatter#0: 34 cells in 2 forwards" in text
    assert "choices dropped" in text
    assert text.count("path ") == 4
    assert "never" in text
    many = str(profile(Moe(num_paths=40), random_batches(9)))
    assert many.count("\n  path ") == 15
    assert "and 25 paths more" in many


def test_json() -> None:
    found = profile(Chain(2), random_batches(4, 30)).to_json()
    assert json.loads(json.dumps(found)) == found
    paths = found["routers"]["blocks.0.scatter#0"]["paths"]
    assert [path["rows"]["max"] for path in paths] == [30.0, 30.0]
    assert found["joint"][0]["first"] == "blocks.0.scatter#0"


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "profile.png"
    profile(Chain(2), random_batches(4, 30)).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plotting_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(Moe(), random_batches(4))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ProfileError, match="pip install matplotlib"):
        found.plot(tmp_path / "profile.png")


def test_a_bar_does_not_change_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = Moe(), random_batches(4, 5)
    wanted = profile(model, batches, progress=False).digest()
    assert profile(model, batches, progress=True).digest() == wanted
    assert capsys.readouterr().out == "", "no bar before two seconds"


def test_overhead_measures_pairs() -> None:
    found = overhead(Moe(), torch.randn(64, DIM), pairs=5)
    assert found["pairs"] == 5
    assert 0 < found["inside_share"] < 1
    assert 0 < found["ratio_low_95"] <= found["median_ratio"] <= found["ratio_high_95"]
    assert found["plain_ms"] > 0
    with pytest.raises(ProfileError, match="at least 1"):
        overhead(Moe(), torch.randn(2, DIM), pairs=0)


class Work(nn.Module):
    """A forward of milliseconds around one router, by its number of layers."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.moe = Moe()
        self.heavy = nn.Sequential(*(nn.Linear(512, 512) for _ in range(num_layers)))
        self.lift = nn.Linear(DIM, 512)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.heavy(self.lift(self.moe(x)))
        return y


def test_the_recorder_takes_little_of_the_forward() -> None:
    assert overhead(Work(4), torch.randn(256, DIM), pairs=9)["inside_share"] < 0.01


@pytest.mark.slow
def test_recording_is_not_felt() -> None:
    found = overhead(Work(64), torch.randn(512, DIM), pairs=200)
    assert found["inside_share"] < 0.01, found
    assert found["ratio_high_95"] <= 1.03, found


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_recording_never_waits_for_the_device() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(DIM, PATHS)
            self.scatter = brt.ScatterRouter(TopK(2), PATHS, result="packed")
            self.gather = brt.GatherRouter(weighted=False)

        def forward(self, x: Tensor) -> Tensor:
            rows, route = self.scatter(x, self.gate(x).softmax(-1))
            out: Tensor = self.gather(rows * 2, route)
            return out

    model, batches = Packed().cuda(), [x.cuda() for x in random_batches(*SIZES)]
    wanted = profile(model.cpu(), [x.cpu() for x in batches])
    model.cuda()
    with torch.no_grad(), Recorder(model) as recorder:
        for batch in [batches[-1], *batches]:  # the first one sets up kernels
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(batch)
                recorder.end_forward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    rows_FP = recorder.result().routers["scatter#0"].rows_FP[1:]
    assert torch.equal(rows_FP, router_of(wanted).rows_FP)


# The command


@pytest.fixture
def zoo() -> Iterator[None]:
    module = ModuleType("acme")

    @brt.hookimpl
    def brt_models() -> list[brt.ModelSpec]:
        return [
            brt.ModelSpec(
                name="acme-chain",
                summary="three blocks",
                factory=Chain,
                sample=lambda seed=0: tuple(random_batches(6, seed=seed)),
            )
        ]

    module.brt_models = brt_models  # type: ignore[attr-defined]
    with plugins.using(module):
        yield


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["brt", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("zoo")
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "made" / "acme.safetensors"
    assert run(monkeypatch, "profile", "acme-chain", "--batches", "3", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert "3 forwards" in shown
    assert f"wrote {out}" in shown
    assert Profile.load(out).num_forwards == 3
    assert run(monkeypatch, "profile", "acme-chain", "--json") == 0
    assert json.loads(capsys.readouterr().out)["forwards"] == 8
    assert run(monkeypatch, "profile", "acme-chian") == 2
    assert "acme-chain" in capsys.readouterr().err
    assert run(monkeypatch, "profile", "acme-chain", "--batches", "0") == 2
