"""LoopRouter: compacted, carried with a mask and unrolled, against one cell at a time.

Legend: N cells, D features, L length of a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compile_cases import same_outcome
from core_cases import close
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import brt
from brt import LoopRouter
from brt.protocols import Label, Threshold
from brt.routers.loop import _flatten

# torch's compiler uses parts of torch that are deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Counter(nn.Module):
    """Counts each cell down to zero; x gathers how often it went through."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = state - 1
        done = (state <= 0).float()
        return x + 1, torch.stack([1 - done, done], 1), state


class Thinker(nn.Module):
    """A recurrent step with a cache of what it thought, a position and a flag in its state."""

    def __init__(self, num_features: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_features)
        self.value = nn.Linear(num_features, 2)
        self.confident = nn.Linear(num_features, 2)

    def forward(self, x: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        (cache_NLD, position_N), seen = state["cache"], state["seen"]
        index = position_N.clamp(max=cache_NLD.shape[1] - 1)
        cache_NLD = cache_NLD.scatter(
            1, index[:, None, None].expand(-1, 1, 2), self.value(x)[:, None]
        )
        mean = cache_NLD.sum(1) / (position_N + 1)[:, None]
        x = (self.linear(x) + torch.cat([mean, mean], 1)).tanh()
        new = {"cache": (cache_NLD, position_N + 1), "seen": seen | (x[:, 0] > 0)}
        return x, self.confident(x), new

    def start(self, num_cells: int, device: object = "cpu") -> tuple[Tensor, dict[str, Any]]:
        """(x, state) for a first step."""
        x = torch.randn(num_cells, 4).to(device)
        cache = torch.zeros(num_cells, 5, 2, device=device)
        position = torch.zeros(num_cells, dtype=torch.int64, device=device)
        seen = torch.zeros(num_cells, dtype=torch.bool, device=device)
        return x, {"cache": (cache, position), "seen": seen}


def plain(loop: LoopRouter, x: Tensor, state: Any) -> tuple[Tensor, Any, list[int]]:
    """One cell after another: (x, state, steps of each cell)."""
    outs: list[tuple[Tensor, Any]] = []
    steps: list[int] = []
    for n in range(x.shape[0]):
        one = x[n : n + 1]
        own = pytree.tree_map(lambda leaf, n=n: leaf[n : n + 1], state)
        steps.append(0)
        finished = False
        while not finished and steps[-1] < loop.max_steps:
            one, scores, own = loop.netlet(one, own)
            finished = int(scores.argmax(1)) == 1
            steps[-1] += 1
        outs.append((one, own))
    if not outs:
        return x, state, []
    rows = torch.cat([one for one, _ in outs])
    states = pytree.tree_map(lambda *leaves: torch.cat(leaves), *(own for _, own in outs))
    return rows, states, steps


def same(came: Any, wanted: Any, what: object = "", factor: float = 1.0) -> None:
    (came_leaves, came_spec), (wanted_leaves, wanted_spec) = (
        pytree.tree_flatten(came),
        pytree.tree_flatten(wanted),
    )
    assert came_spec == wanted_spec, what
    for a, b in zip(came_leaves, wanted_leaves, strict=True):
        close(a, b, what, factor)


def unrolled(loop: LoopRouter, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """What a CUDA graph captures."""
    leaves, nest = _flatten(state)
    x, *leaves = loop._unrolled((x, *leaves), nest)
    return x, nest.filled(leaves)


@pytest.mark.parametrize("num_cells", [0, 1, 2, 17])
@pytest.mark.parametrize("max_steps", [1, 3, 6])
def test_against_one_cell_at_a_time(max_steps: int, num_cells: int, device: torch.device) -> None:
    loop = LoopRouter(Thinker(), max_steps).to(device)
    x, state = loop.netlet.start(num_cells, device)
    wanted_x, wanted_state, steps = plain(loop, x, state)
    for name, came in (("eager", loop(x, state)), ("unrolled", unrolled(loop, x, state))):
        same(came, (wanted_x, wanted_state), f"{name} {max_steps=} {num_cells=}")
    assert loop(x, state)[1]["cache"][1].tolist() == steps


@pytest.mark.parametrize("how", ["compacted", "unrolled"])
def test_gradients(how: str, device: torch.device) -> None:
    loop = LoopRouter(Thinker(), 4).to(device).double()
    x, state = loop.netlet.start(6, device)
    cache, position = state["cache"]
    leaves = (x.double().requires_grad_(), cache.double().requires_grad_())
    call = loop if how == "compacted" else lambda x, state: unrolled(loop, x, state)

    def run(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        x, new = call(x, {"cache": (cache, position), "seen": state["seen"]})
        return x, new["cache"][0]

    assert torch.autograd.gradcheck(run, leaves)
    for parameter in loop.netlet.linear.parameters():
        parameter.grad = None
    sum(t.sum() for t in run(*leaves)).backward()
    came = [p.grad.clone() for p in loop.netlet.linear.parameters()]
    loop.zero_grad()
    wanted_x, wanted_state, _ = plain(
        loop, leaves[0], {"cache": (leaves[1], position), "seen": state["seen"]}
    )
    (wanted_x.sum() + wanted_state["cache"][0].sum()).backward()
    for a, b in zip(came, [p.grad for p in loop.netlet.linear.parameters()], strict=True):
        close(a, b)


def test_finished_cells_take_no_part(device: torch.device) -> None:
    loop = LoopRouter(Counter(), 10)
    seen: list[int] = []
    loop.netlet.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    counts = torch.tensor([1, 3, 2, 3, 1], device=device)
    x, state = loop(torch.zeros(5, 2, device=device), counts)
    assert seen == [5, 3, 2]
    assert x[:, 0].tolist() == [1, 3, 2, 3, 1]
    assert state.tolist() == [0] * 5


def test_netlet_runs_once_for_no_cells(device: torch.device) -> None:
    """So that gradients are zeros, not None."""
    loop = LoopRouter(Thinker(), 4).to(device)
    x, _ = loop(*loop.netlet.start(0, device))
    x.sum().backward()
    assert all(p.grad is not None for p in loop.netlet.linear.parameters())


def test_limit(device: torch.device) -> None:
    x, counts = torch.zeros(3, 1, device=device), torch.tensor([1, 9, 2], device=device)
    kept, state = LoopRouter(Counter(), 4)(x, counts)
    assert kept.flatten().tolist() == [1, 4, 2]
    assert state.tolist() == [0, 5, 0]
    loop = LoopRouter(Counter(), 4, on_limit="error")
    with pytest.raises(brt.RouteError, match=r"1 of 3 cells are not finished after max_steps=4"):
        loop(x, counts)
    loop(x, counts.clamp(max=4))
    if device.type == "cpu":
        with pytest.raises(brt.RouteError, match="cells not finished after max_steps=4"):
            unrolled(loop, x, counts)
    else:
        unrolled(loop, x, counts)
        with pytest.raises(brt.RouteError, match="cells not finished"):
            brt.check()


def test_protocols_and_observers(device: torch.device) -> None:
    class Ids(nn.Module):
        def forward(self, x: Tensor, state: None) -> tuple[Tensor, Tensor, None]:
            return x + 1, (x[:, 0] + 1 >= 3).long(), state

    x = torch.tensor([[0.0], [2.0], [1.0]], device=device)
    out, state = LoopRouter(Ids(), 9, protocol=Label())(x)
    assert out.flatten().tolist() == [3, 3, 3]
    assert state is None
    loop = LoopRouter(Counter(), 9, protocol=Threshold(0.5))
    routes = []
    loop.register_observer(lambda router, route, scores: routes.append(route))
    loop(x, torch.tensor([1, 3, 2], device=device))
    assert [route.load_P.tolist() for route in routes] == [[2, 1], [1, 1], [0, 1]]
    assert all(route.cells.root == routes[0].cells.root for route in routes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_values_pass_through_unchanged(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.arange(6, device=device).view(3, 2).to(dtype)
    out, _ = LoopRouter(Counter(), 9)(x, torch.tensor([1, 3, 2], device=device))
    assert out.dtype == dtype
    assert out.tolist() == (x + torch.tensor([[1], [3], [2]], device=device).to(dtype)).tolist()


# Compiled: all rows carried by torch.while_loop


def compiled(loop: LoopRouter, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(loop, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_results(backend: str, device: torch.device) -> None:
    loop = LoopRouter(Thinker(), 6).to(device)
    run = compiled(loop, backend)
    with torch.no_grad():
        for num_cells in (17, 5):
            x, state = loop.netlet.start(num_cells, device)
            kept = pytree.tree_map(torch.clone, (x, state))
            same(run(x, state), loop(x, state), f"{num_cells=}")
            same((x, state), kept, "inputs are not written to")


def test_compiled_with_other_layouts(device: torch.device) -> None:
    class Turned(nn.Module):
        """Returns other strides than it was given."""

        def forward(self, x: Tensor, state: tuple) -> tuple[Tensor, Tensor, tuple]:
            count, image = state
            image = image.contiguous(memory_format=torch.channels_last) + 1
            done = (count <= 1).float()
            x = x.transpose(0, 1).contiguous().transpose(0, 1) * 2
            return x, torch.stack([1 - done, done], 1), (count - 1, image)

    loop = LoopRouter(Turned(), 9)
    x = torch.randn(1, 6, device=device).expand(4, 6)
    count = torch.tensor([1, 3, 2, 5], device=device).repeat_interleave(2)[::2]
    state = (count, torch.randn(2, 3, 4, 4, device=device).transpose(0, 2)[:, :, :, :2])
    same(compiled(loop)(x, state), loop(x, state))


class Differentiable(nn.Module):
    """A loop's x and cache as one output, for `same_outcome`."""

    def __init__(self, max_steps: int = 4) -> None:
        super().__init__()
        self.loop = LoopRouter(Thinker(), max_steps)

    def forward(self, x: Tensor) -> Tensor:
        num_cells = x.shape[0]
        state = {
            "cache": (x.new_zeros(num_cells, 5, 2), x.new_zeros(num_cells, dtype=torch.int64)),
            "seen": x.new_zeros(num_cells, dtype=torch.bool),
        }
        x, state = self.loop(x, state)
        return torch.cat([x, state["cache"][0].flatten(1)], 1)


@contextlib.contextmanager
def refused_by_old_torch() -> Iterator[None]:
    """torch 2.11 refuses the backward of a compiled loop, for what its own backward does."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        yield
        return
    with pytest.raises(Exception, match="might be aliasing the input or the output"):
        yield


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [False, True])
@refused_by_old_torch()
def test_compiled_gradients(frozen: bool, backend: str, device: torch.device) -> None:
    """Of x and of parameters, through state that needs none at the start; frozen: of x alone."""
    model = Differentiable().to(device)
    if frozen:
        model.requires_grad_(False)
    run = compiled(model, backend)
    for num_cells in (17, 5):
        x = torch.randn(num_cells, 4, device=device)
        same_outcome(model, run, (x,), f"{num_cells=}")


@refused_by_old_torch()
def test_compiled_gradients_of_parameters_alone(device: torch.device) -> None:
    model = Differentiable().to(device)
    run = compiled(model)
    x = torch.randn(9, 4, device=device)
    grads = []
    for call in (model, run):
        model.zero_grad()
        call(x).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            close(a, b, factor=20)


def test_compiled_limit(device: torch.device) -> None:
    loop = LoopRouter(Counter(), 4, on_limit="error")
    run = compiled(loop)
    x, counts = torch.zeros(3, 1, device=device), torch.tensor([1, 4, 2], device=device)
    same(run(x, counts), loop(x, counts))
    if device.type == "cpu":  # on CUDA it is an assertion of the device, which ends the context
        with pytest.raises(RuntimeError, match="cells not finished after max_steps=4"):
            run(x, counts + 3)


def test_compiled_loop_stops_early(device: torch.device) -> None:
    """The graph holds a loop, not max_steps copies of the netlet."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(LoopRouter(Counter(), 1000), fullgraph=True, backend=backend)
    x, counts = torch.zeros(3, 1, device=device), torch.tensor([1, 4, 2], device=device)
    same(run(x, counts), LoopRouter(Counter(), 1000)(x, counts))
    assert len(list(graphs[0].graph.nodes)) < 30


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, device: torch.device) -> None:
    loop = LoopRouter(Thinker(), 6).to(device).eval()
    num_cells = Dim("num_cells", min=1)
    cells = {0: num_cells}
    shapes = (cells, {"cache": (cells, cells), "seen": cells})
    exported = torch.export.export(
        loop, loop.netlet.start(5, device), dynamic_shapes=shapes, strict=strict
    )
    for n in (5, 17, 1):
        x, state = loop.netlet.start(n, device)
        same(exported.module()(x, state), loop(x, state), f"{n=}")


# Bad input


class Returns(nn.Module):
    """A netlet that returns what a function makes of its state."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.made(x, state)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x, s: (x, x, None), "must return state as it got it, tensor, not None"),
        (lambda x, s: (x, x, (s, s)), r"tensor, not \('tensor', 'tensor'\)"),
        (
            lambda x, s: (x, x, torch.cat([s, s], 1)),
            r"changed state leaf 0 from torch.float32\[3, 2\] to torch.float32\[3, 4\]; .*allocate",
        ),
        (lambda x, s: (x.double(), x, s), "changed x from torch.float32.* to torch.float64"),
        (lambda x, s: (x, torch.rand(3, 3), s), r"shape \(3, 3\) came for 2 paths"),
        (lambda x, s: (x, x[:2], s), "got 3 and 2"),
        (lambda x, s: (x[:2], x, s), "rows of x after a step and before it.*got 2 and 3"),
        (lambda x, s: (x, x, s[:2]), "rows of state leaf 0 after a step and before it.*2 and 3"),
    ],
)
def test_bad_netlets(made: Any, message: str) -> None:
    with pytest.raises(brt.BrtError, match=message):
        LoopRouter(Returns(made), 3)(torch.zeros(3, 2), torch.zeros(3, 2))


def test_bad_arguments() -> None:
    with pytest.raises(brt.RouteError, match="max_steps must be at least 1, got 0"):
        LoopRouter(Counter(), 0)
    with pytest.raises(brt.RouteError, match="on_limit must be 'keep' or 'error', got 'stop'"):
        LoopRouter(Counter(), 3, on_limit="stop")
    loop = LoopRouter(Counter(), 3)
    with pytest.raises(brt.RouteError, match="state leaf 0 is int, not a tensor"):
        loop(torch.zeros(3, 1), {"steps": 3})
    with pytest.raises(brt.RouteError, match=r"rows of state leaf 0 and of x.*got 2 and 3"):
        loop(torch.zeros(3, 1), torch.zeros(2))
    assert "max_steps=3, on_limit='keep'" in repr(loop)
