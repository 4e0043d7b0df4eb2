"""capture: regions replayed as CUDA graphs, and refused with the reason elsewhere."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brt
from brt.decision import Decision
from brt.passes import buckets, captured, conditional, exit_batches
from brt.passes.base import Pass
from brt.passes.capture import Capture
from brt.passes.captured import Captured, CapturedRegion
from brt.passes.fusion import Fusion
from brt.protocols import BinaryThreshold, CapacityTopK, TopK

DIM = 16
BF16 = torch.bfloat16  # of which torch has a grouped product that reads no offsets on the host
CLOSE = {"rtol": 3e-2, "atol": 3e-2}


@pytest.fixture(autouse=True)
def _fusing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fusion, "_measure", lambda self, graph, ctx: True)


class Layer(nn.Module):
    def __init__(self, num_paths: int = 4, result: Any = "packed") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True))
        self.gate = nn.Linear(DIM, num_paths)
        self.scatter = brt.ScatterRouter(TopK(2), num_paths, result=result)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM))
            for _ in range(num_paths)
        )
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows, route = self.scatter(x, self.gate(x).softmax(-1))
        if self.scatter.result == "packed":
            return self.gather(brt.grouped(list(self.experts), rows, route), route)
        return self.gather([e(r) for e, r in zip(self.experts, rows, strict=True)], route)


def optimised(model: nn.Module, *before: str) -> Any:
    return brt.optimize(model, passes=[*before, Capture(most_shapes=2)])


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured_of(fast: Any) -> CapturedRegion:
    (region,) = (m for m in fast.inserted.values() if isinstance(m, CapturedRegion))
    return region


def test_refusals() -> None:
    with pytest.warns(brt.PluginWarning, match="the region is on cpu"):
        fast = optimised(Layer().eval())
    x = torch.randn(5, DIM)
    assert not fast.inserted
    torch.testing.assert_close(fast(x), fast(x))
    with pytest.raises(brt.PassError, match="at least 1, got 0"):
        Capture(most_shapes=0)

    with pytest.raises(brt.PassError, match=r"buckets are numbers of rows.*got \(0, 4\)"):
        Capture(buckets=(0, 4))


def test_rounding_of_other_kernels_is_allowed_for() -> None:
    assert Capture().tolerance(BF16) == Pass.tolerance(Capture(), BF16)
    assert Capture().tolerance(torch.float32)[0] == 10 * Pass.tolerance(Capture(), torch.float32)[0]


def test_few_sizes_with_little_padding() -> None:
    assert buckets.choose([]) == ()
    assert buckets.choose([1, 1, 0]) == (1,)
    assert buckets.choose([64] * 9) == (1, 2, 4, 8, 16, 32, 64)
    assert buckets.choose([100, 100, 100, 90, 60], most=2) == (1, 2, 4, 8, 15, 30, 60, 100)
    assert buckets.choose([5, 6, 7], most=1) == (1, 2, 4, 7)
    seen = torch.randint(1, 40, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for most in (1, 2, 3):
        kept = buckets._fewest_added(Counter(seen), most)
        cost = {
            sizes: sum(min(s for s in sizes if s >= n) for n in seen)
            for sizes in itertools.combinations(sorted(set(seen)), most)
            if sizes[-1] == max(seen)
        }
        assert cost[tuple(kept)] == min(cost.values()), most
    many = buckets.choose(range(1, 5000))
    assert len(many) < 20
    for num_rows in range(1, 5000):
        size = buckets.next_size(num_rows, many)
        assert size is not None
        assert num_rows <= size < 2 * num_rows or size == num_rows == 1
    assert buckets.next_size(6000, many) is None


class Again:
    """What stands for a graph where there is no device: the function on the graph's memory."""

    def __init__(self, run: Callable[..., Any], rooms: list[Any]) -> None:
        self.run, self.rooms = run, rooms
        self.output = run(*rooms)

    def replay(self) -> None:
        self.output.copy_(self.run(*self.rooms))


@pytest.fixture
def without_device(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Regions are captured on the CPU; returns the memory that graphs read."""
    recorded: list[list[Any]] = []

    def record(run: Callable[..., Any], rooms: list[Any], warm_ups: int) -> Captured:
        recorded.append(rooms)
        graph = Again(run, rooms)
        return Captured(graph, rooms, graph.output)

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(captured, "can_record", lambda tensors: True)
    monkeypatch.setattr(Capture, "requires", lambda self, graph, ctx: None)
    return recorded


def profiled(model: nn.Module, *nums: int) -> brt.Profile:
    return brt.profile(model, [torch.randn(n, DIM) for n in nums], progress=False)


def test_calls_are_padded_to_the_sizes_of_the_profile(without_device: list[list[Any]]) -> None:
    model = Layer().eval()
    fast = brt.optimize(
        model, profiled(model, 3, 6, 6), passes=[Capture()], sample=torch.randn(6, DIM)
    )
    region = captured_of(fast)
    assert region.padding.sizes == (1, 2, 3, 6)
    assert "padded to the next of 1, 2, 3, 6 rows" in str(fast.report)
    kept: list[tuple[Tensor, Tensor]] = []
    region.replays = 0
    with torch.no_grad():
        for num_rows in (6, 5, 4, 2, 0, 9, 6, 9):
            x = torch.randn(num_rows, DIM)
            given = x.clone()
            kept.append((fast(x), model(x)))
            assert torch.equal(x, given)
    for came, wanted in kept:  # later calls left them alone
        torch.testing.assert_close(came, wanted)
    assert [len(rooms[0]) for rooms in without_device] == [6, 2, 9]
    assert region.replays == 7


def test_images_of_any_layout_are_padded_by_their_last_row() -> None:
    plain, scale = torch.rand(3, 2, 4, 4), torch.tensor(2.0)
    last = plain.contiguous(memory_format=torch.channels_last)
    keys = {buckets.signature((x, scale, 1), 4) for x in (plain, plain[:2], plain[:1], last)}
    assert len(keys) == 2
    assert buckets.signature((plain, scale, 1), 4) != buckets.signature((plain, scale, True), 4)
    assert buckets.signature((plain, scale), None) != buckets.signature((plain[:2], scale), None)
    for x in (plain, last, plain.transpose(2, 3), plain[:, :, :, ::2]):
        assert buckets.rows_of((x, scale, 1)) == 3
        rooms = buckets.room_for((x, scale, 1), 5)
        buckets.fill(rooms, (x, scale * 3, 1))
        assert torch.equal(rooms[0], torch.cat([x, x[2:], x[2:]]))
        assert (rooms[1], rooms[2]) == (6, 1)
        assert torch.equal(scale, torch.tensor(2.0))
        assert rooms[0].is_contiguous(memory_format=torch.channels_last) == (x is last)
        (back,) = buckets.cut([rooms[0]], 3)
        assert torch.equal(back, x)
        assert back.untyped_storage().data_ptr() != rooms[0].untyped_storage().data_ptr()
    assert buckets.rows_of((plain, plain[:2])) is None
    assert buckets.rows_of((scale, 3)) is None


def test_a_proof_is_for_rows_of_one_shape(without_device: list[list[Any]]) -> None:
    class Pairs(Layer):
        """Two tokens are a cell: of one row where it has an even number."""

        def forward(self, x: Tensor) -> Tensor:
            cells, grid = brt.annotate(x, (0, 1), shape=(DIM,))
            return grid.restore(super().forward(cells))

    model = Pairs().eval()
    fast = brt.optimize(model, passes=[Capture(buckets=(8,))], sample=torch.randn(6, 4, DIM // 2))
    with torch.no_grad():
        for num_rows, num_tokens in ((5, 4), (4, 5), (6, 4)):
            x = torch.randn(num_rows, num_tokens, DIM // 2)
            torch.testing.assert_close(fast(x), model(x))
    assert [tuple(rooms[0].shape[:2]) for rooms in without_device] == [(8, 4), (4, 5)]


def test_padding_is_not_assumed_to_be_harmless(without_device: list[list[Any]]) -> None:
    model, x = Layer().eval(), torch.randn(6, DIM)
    model.scatter.protocol = CapacityTopK(2)
    for profile, sample, why in (
        (profiled(model, 6), x, "compete for a path"),
        (profiled(model, 6), None, "shapes are needed"),
        (None, x, "no profile says"),
    ):
        fast = brt.optimize(model, profile, passes=[Capture()], sample=sample)
        assert captured_of(fast).padding.sizes == ()
        assert why in str(fast.report)
        with torch.no_grad():
            torch.testing.assert_close(fast(x[:4]), model(x[:4]))


def test_who_counts_decisions_sees_each_and_no_padding(without_device: list[list[Any]]) -> None:
    model = Layer().eval()
    fast = brt.optimize(model, passes=[Capture(buckets=(8,))], sample=torch.randn(6, DIM))
    region = captured_of(fast)
    batches = [torch.randn(n, DIM) for n in (6, 5, 6)]
    with torch.no_grad():
        fast(batches[0])
    replays = region.replays
    assert replays
    found, wanted = (brt.profile(one, batches, progress=False) for one in (fast, model))
    assert region.replays == replays
    assert torch.equal(found.routers["scatter#0"].rows_FP, wanted.routers["scatter#0"].rows_FP)
    with torch.no_grad():
        fast(batches[0])
    assert region.replays == replays + 1


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_other_numbers_of_rows_by_one_graph() -> None:
    model = Layer(result="paths").eval().cuda().to(BF16)
    batches = [torch.randn(n, DIM, device="cuda", dtype=BF16) for n in (48, 33, 40, 40)]
    profile = brt.profile(model, batches, progress=False)
    fast = brt.optimize(
        model, profile, passes=["fuse-horizontal", Capture()], sample=batches[0], verify=False
    )
    region = captured_of(fast)
    assert {33, 40, 48} <= set(region.padding.sizes)
    few = [torch.randn(n, DIM, device="cuda", dtype=BF16) for n in (34, 36, 39, 40, 41, 47)]
    with torch.no_grad():
        wanted = [model(x) for x in few]
        fast(few[0]), fast(few[-1])
        graphs, replays = len(region._graphs), region.replays
        with no_waiting():
            came = [fast(x) for x in few]
        for found, right in zip(came, wanted, strict=True):
            torch.testing.assert_close(found, right, **CLOSE)
        assert (len(region._graphs), region.replays) == (graphs, replays + len(few))
        large = torch.randn(60, DIM, device="cuda", dtype=BF16)
        torch.testing.assert_close(fast(large), model(large), **CLOSE)


@pytest.mark.cuda
def test_equal_with_other_loads_and_shapes() -> None:
    model = Layer().eval().cuda().to(BF16)
    fast = optimised(model)
    region = captured_of(fast)
    with torch.no_grad():
        for num_cells in (33, 33, 7, 33, 64, 1, 33):
            x = torch.randn(num_cells, DIM, device="cuda", dtype=BF16)
            kept = x.clone()
            torch.testing.assert_close(fast(x), model(x), **CLOSE)
            assert torch.equal(x, kept)
        one = torch.randn(1, DIM, device="cuda", dtype=BF16).expand(33, DIM).contiguous()
        torch.testing.assert_close(fast(one), model(one), **CLOSE)
    assert region.replays >= 7
    assert len(region._graphs) <= 2


@pytest.mark.cuda
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_do_not_alias(mode: Any) -> None:
    model = Layer().eval().cuda().to(BF16)
    fast = optimised(model)
    first, second = torch.randn(2, 9, DIM, device="cuda", dtype=BF16)
    with mode():
        a = fast(first)
        kept = a.clone()
        b = fast(second)
    assert torch.equal(a, kept)
    assert a.data_ptr() != b.data_ptr()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_after_the_fusing_passes_nothing_waits_for_the_device() -> None:
    model = Layer(result="paths").eval().cuda().to(BF16)
    with pytest.warns(brt.PluginWarning, match="the host must read"):
        optimised(model)
    fast = optimised(model, "fuse-horizontal")
    x = torch.randn(40, DIM, device="cuda", dtype=BF16)
    with torch.no_grad():
        wanted = model(x)
        fast(x)
        with no_waiting():
            came = fast(x)
    torch.testing.assert_close(came, wanted, **CLOSE)


@pytest.mark.cuda
def test_weights_that_change_are_seen() -> None:
    model = Layer(result="paths").eval().cuda().to(BF16)
    fast = optimised(model, "fuse-horizontal")
    x = torch.randn(9, DIM, device="cuda", dtype=BF16)
    with torch.no_grad():
        before = fast(x)
        model.experts[1][0].weight.mul_(3)  # stacked by fuse-horizontal, outside of the graph
        torch.testing.assert_close(fast(x), model(x), **CLOSE)
        assert not torch.allclose(fast(x), before)
        other = copy.deepcopy(fast)
        torch.testing.assert_close(other(x), fast(x), **CLOSE)
        model.load_state_dict(Layer(result="paths").state_dict())
        torch.testing.assert_close(fast(x), model(x), **CLOSE)


@pytest.mark.cuda
def test_gradients_and_other_captures_run_the_region() -> None:
    model = Layer().eval().cuda().to(BF16)
    fast = optimised(model)
    x = torch.randn(9, DIM, device="cuda", dtype=BF16)
    fast(x).sum().backward()
    assert model.gate.weight.grad is not None
    assert captured_of(fast).replays == 0
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        graph.replay()
        torch.testing.assert_close(out, model(x), **CLOSE)


@pytest.mark.cuda
def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    model = Layer().eval().cuda().double()  # the reference reads the loads on the host
    fast = optimised(model)
    x = torch.randn(9, DIM, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        with pytest.warns(brt.PluginWarning, match="runs without a CUDA graph"):
            torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(x), model(x))  # and says so once
    assert captured_of(fast).replays == 0


class Exits(nn.Module):
    """Three stages, and an exit behind each; where a cell leaves, its first feature says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(DIM, 3) for _ in range(3))
        self.exits = nn.ModuleList(
            brt.ScatterRouter(BinaryThreshold(level), 2) for level in (0.9, 0.6)
        )
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        x, grid = brt.annotate(x, 0)
        cells, left, where = grid.cells, [], []
        for stage, head, scatter in zip(self.stages, self.heads, self.exits, strict=False):
            sure = x[:, :1]
            x = stage(x) + x
            logits = torch.cat([head(x), 10 * sure], 1)
            (out, stay), route = scatter((x, logits), logits, cells)
            left.append(out[1])
            where.append(route[0])
            x, cells = stay[0], route[1]
        x = self.stages[-1](x)
        left.append(torch.cat([self.heads[-1](x), x[:, :1]], 1))
        return self.gather(left, [*where, cells])


def sure_at(exit_idx: int, device: str = "cpu") -> Tensor:
    """A cell that leaves there."""
    model = Exits().eval()
    for seed in range(2000):
        x = 2 * torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))
        if len(taken(model, x)) == exit_idx + 1:
            return x.to(device)
    raise AssertionError(exit_idx)


def taken(model: nn.Module, x: Tensor) -> list[int]:
    """The exits that a cell came to."""
    seen: list[int] = []
    handles = [
        stage.register_forward_hook(lambda m, a, o, i=i: seen.append(i) if len(o) else None)
        for i, stage in enumerate(model.stages)  # type: ignore[arg-type]
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


class _Stream:
    cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Conditional nodes without a device; returns the flags that they begin with, and the ends."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    log: list[Any] = []
    begin_end = lambda flag, _: log.append(bool(flag)), lambda _: log.append("end")
    monkeypatch.setattr(conditional, "_makers", {"here": begin_end})
    return log


def test_one_cell_goes_through_nested_bodies(bodies: list[Any]) -> None:
    model = Exits().eval()
    one = conditional.OneCell(brt.trace(model).graph, model)
    streams = [_Stream()] * one.num_levels
    with torch.no_grad():
        for exit_idx, flags in enumerate(([False], [True, False], [True, True])):
            x = sure_at(exit_idx)
            like = one.straight([x], streams)
            bodies.clear()
            out = one.captured([x], streams, like)
            assert bodies[: len(flags)] == flags
            assert bodies[-2:] == ["end", "end"]  # the second body is inside the first
            if exit_idx == 2:  # without a device every body runs
                torch.testing.assert_close(out, model(x))
        with pytest.raises(conditional.CannotCaptureError, match="has 2 cells"):
            one.straight([torch.randn(2, DIM)], streams)


@dataclass(frozen=True)
class Some(BinaryThreshold):
    """Some cells take no path."""

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        decision = super().decide(scores, num_paths)
        assert decision.choice_NK is not None
        none_N1 = scores[:, :1] > 0.7
        return replace(decision, choice_NK=decision.choice_NK.masked_fill(none_N1, -1))


class Tree(nn.Module):
    """Two scatters, one behind each path of the first, and all four paths end in one gather."""

    def __init__(
        self,
        gathers: str = "abcd",
        inner: Callable[[Tensor], Tensor] = torch.tanh,
        protocol: type[BinaryThreshold] = BinaryThreshold,
    ) -> None:
        super().__init__()
        self.routers = nn.ModuleList(
            brt.ScatterRouter(protocol(level), 2) for level in (0.5, 0.6, 0.4)
        )
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.gather = brt.GatherRouter(weighted=False)
        self.gathers, self.inner = gathers, inner

    def forward(self, x: Tensor) -> Tensor:
        x, grid = brt.annotate(x, 0)
        (left, right), route = self.routers[0](x, x[:, :2].softmax(1), grid.cells)
        left, right = self.layers[0](left), self.inner(self.layers[1](right))
        (a, b), of_left = self.routers[1](left, left[:, 2:4].softmax(1), route[0])
        (c, d), of_right = self.routers[2](right, right[:, 2:4].softmax(1), route[1])
        found = {"a": (a, of_left[0]), "b": (self.layers[2](b), of_left[1])}
        found |= {"c": (c * 2, of_right[0]), "d": (d, of_right[1])}
        chosen = [found[name] for name in self.gathers]
        return self.gather([rows for rows, _ in chosen], [cells for _, cells in chosen]) + x


@pytest.mark.parametrize(
    "model", [Exits(), Tree(), Tree(protocol=Some)], ids=["exits", "tree", "some"]
)
def test_several_cells_go_on_in_front(
    model: nn.Module, bodies: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()
    form = exit_batches.Batches(brt.trace(model).graph, model)
    streams, ran = [_Stream()] * form.num_levels, []
    block, loads = exit_batches._Run._block, {}
    for name, router in model.named_modules():
        if isinstance(router, brt.ScatterRouter):
            router.register_observer(
                lambda _, route, scores, name=name: loads.update({name: route.load_P.tolist()})
            )

    def recorded(run: Any, chain: Any, size: int) -> None:
        rows = [run.memory[chain, i][:size] for i in form._flows[chain]]
        count = int(run.memory[chain, "count"])
        scatter, path = chain[-1]
        assert count == loads[scatter.target][path]
        ran.append((len(chain), size, count))
        for row in rows:  # and what fills them up is one of them
            assert torch.equal(row[count:], row[:1].expand_as(row[count:]))
        block(run, chain, size)

    with torch.no_grad():
        for num_cells in (2, 3, 9):
            like = form.straight([torch.randn(num_cells, DIM)], streams)
            batches = [2 * torch.randn(num_cells, DIM) for _ in range(12)]
            batches += [x[:1].expand_as(x).contiguous() for x in batches[:4]]
            with monkeypatch.context() as patch:
                # A device runs a body where its flag is set
                patch.setattr(
                    exit_batches._Run, "_if", lambda _, level, flag, then: flag and then()
                )
                patch.setattr(exit_batches._Run, "_block", recorded)
                for x in batches:
                    wanted = model(x)
                    torch.testing.assert_close(form.captured([x], streams, like), wanted)
            bodies.clear()
            form.captured([batches[0]], streams, like)  # what a capture would see
            assert bodies.count("end") == len(bodies) / 2
    assert {size for _, size, _ in ran} >= {1, 2, 3, 5, 9}
    assert all(size // 2 < count <= size for _, size, count in ran)
    assert exit_batches.sizes_of(9) == (1, 2, 3, 5, 9)


def test_what_several_cells_cannot_go_through() -> None:
    for model, why in (
        (Tree("abc"), "no row of a cell"),
        (Tree("abcdd"), "or several"),
        (Tree(inner=lambda b: b[:1] + b), None),
    ):
        graph = brt.trace(model.eval()).graph
        if why is None:  # the form fits: it is the proof that it has not
            exit_batches.Batches(graph, model)
            continue
        with pytest.raises(brt.PassError, match=why):
            exit_batches.Batches(graph, model)

    class Swapped(Tree):
        def forward(self, x: Tensor) -> Tensor:
            (left, right), route = self.routers[0](x, x[:, :2].softmax(1))
            return self.gather([right, left], [route[0], route[1]])

    class Across(Tree):
        def forward(self, x: Tensor) -> Tensor:
            (left, right), route = self.routers[0](x, x[:, :2].softmax(1))
            return self.gather([left * x.amax(), right], route)

    for other, why in ((Swapped(), "rows of other cells"), (Across(), "of other cells")):
        with pytest.raises(brt.PassError, match=why):
            exit_batches.Batches(brt.trace(other.eval()).graph, other)


@pytest.mark.parametrize(
    ("inner", "why"), [(torch.tanh, None), (lambda b: b - b.mean(0), "reduces over cells")]
)
def test_exits_are_captured_for_several_cells_where_each_is_by_itself(
    without_device: list[list[Any]], inner: Callable[[Tensor], Tensor], why: str | None
) -> None:
    model = Tree(inner=inner).eval()
    x = torch.randn(6, DIM)
    for sample, reason in ((x, why), (None, "shapes are needed")):
        region = captured_of(fast := brt.optimize(model, passes=[Capture()], sample=sample))
        assert (region._batches is None) == (reason is not None)
        assert reason is None or reason in str(fast.report)
    fast = brt.optimize(model, passes=[Capture(batches=False)], sample=x)
    assert captured_of(fast)._batches is None
    with torch.no_grad():  # nobody makes conditional nodes here
        torch.testing.assert_close(fast(x), model(x))


def test_calls_with_exits_are_padded_too(
    without_device: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, picked = Tree().eval(), []

    def capture(self: CapturedRegion, exits: Any, rooms: list[Any]) -> Captured:
        picked.append((type(exits), len(rooms[0])))
        return captured.record(lambda *given: self._run(self._scope[0], *given), rooms, 1)

    monkeypatch.setattr(CapturedRegion, "_capture_exits", capture)
    profile = profiled(model, 4, 6)
    fast = brt.optimize(model, profile, passes=[Capture()], sample=torch.randn(6, DIM))
    with torch.no_grad():
        for num_rows in (6, 5, 1, 4, 3):
            x = torch.randn(num_rows, DIM)
            torch.testing.assert_close(fast(x), model(x))
    several, one = exit_batches.Batches, conditional.OneCell
    assert set(picked) == {(several, 6), (one, 1), (several, 4)}
    assert len(without_device) == 3


def test_one_cell_is_copied_with_its_model() -> None:
    model = Exits().eval()
    model.__dict__["one"] = conditional.OneCell(brt.trace(model).graph, model)
    twin = copy.deepcopy(model)
    assert twin.one is not model.one
    assert twin.one._scope[0] is twin


def test_what_is_no_exit_has_no_conditional_node() -> None:
    model = Layer(result="paths").eval()
    with pytest.raises(brt.PassError, match="a plain scatter of two paths"):
        conditional.OneCell(brt.trace(model).graph, model)


@pytest.mark.cuda
def test_without_conditional_nodes_exits_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "_makers", {})
    model = Exits().eval().cuda()
    fast, x = optimised(model), sure_at(1, "cuda")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert captured_of(fast).replays == 0
