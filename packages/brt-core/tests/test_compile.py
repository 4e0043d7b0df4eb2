"""torch.compile(fullgraph=True): one graph for any loads, equal to eager in results and gradients.

Inductor takes seconds a graph, so most modules go through its front half (aot_eager: tracing,
shapes, functions and their gradients) and a few all the way; the slow ones sweep both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compile_cases import LOADS, MODULES, Branches, Grouped, first_of, same_outcome
from core_cases import close
from test_nested_routes import DynamicRouting, FourExits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import brt

# torch's compiler uses parts of torch that are deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def check_branches(model: Branches, backend: str, device: torch.device) -> None:
    """Compile once for any number of cells, then call with other loads and numbers of cells."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for load in LOADS:
        same_outcome(model, compiled, model.inputs(8, load, device), load)
    assert counter.frame_count == 1, "other loads must not compile again"
    for num_cells in (5, 13):
        same_outcome(model, compiled, model.inputs(num_cells, "random", device), num_cells)
    assert counter.frame_count == 1, "other numbers of cells must not compile again"


def test_linear_branches(device: torch.device) -> None:
    check_branches(Branches("linear", 4).to(device), "inductor", device)


def test_convolutional_branches(device: torch.device) -> None:
    check_branches(Branches("conv", 2).to(device), "inductor", device)


@pytest.mark.slow
@pytest.mark.parametrize("num_paths", [1, 2, 4, 16])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_branches_of_every_number(kind: str, num_paths: int, device: torch.device) -> None:
    check_branches(Branches(kind, num_paths).to(device), "inductor", device)


@pytest.mark.parametrize(
    ("kind", "num_paths"),
    [("linear", 1), ("linear", 16), ("conv", 1), ("conv", 16), ("conv1d", 2)],
)
def test_branches_in_the_front_half(kind: str, num_paths: int, device: torch.device) -> None:
    check_branches(Branches(kind, num_paths).to(device), "aot_eager", device)


@pytest.mark.parametrize(
    ("k", "scatter", "gather"),
    [
        (2, {}, {}),
        (1, {"weighted": True}, {"weighted": False}),
        (2, {}, {"add_residual": True}),
        (1, {}, {"overflow": "residual"}),
        (1, {}, {"overflow": "error"}),
    ],
    ids=str,
)
def test_settings(k: int, scatter: dict, gather: dict, device: torch.device) -> None:
    model = Branches("linear", 3, k, scatter, **gather).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for load in LOADS:
        same_outcome(model, compiled, model.inputs(8, load, device), load)


@pytest.mark.parametrize(("name", "make", "made"), MODULES, ids=[m[0] for m in MODULES])
def test_modules_in_the_front_half(
    name: str, make: Callable[[], nn.Module], made: Callable[[int], Tensor], device: torch.device
) -> None:
    model = make().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_cells in (5, 12):
        same_outcome(model, compiled, (made(num_cells).to(device),), f"{name} {num_cells=}")


@pytest.mark.parametrize("name", ["tokens", "ids"])
def test_from_static_to_dynamic_sizes(name: str, device: torch.device) -> None:
    """As a user's first calls go; one cell and none are graphs of their own."""
    make, made = next((make, made) for other, make, made in MODULES if other == name)
    model = make().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for num_cells in (5, 9, 1, 12):
        same_outcome(model, compiled, (made(num_cells).to(device),), f"{name} {num_cells=}")
    with torch.no_grad():
        x = made(0).to(device)
        close(first_of(compiled(x)), first_of(model(x)), name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make", "made"), MODULES, ids=[m[0] for m in MODULES])
def test_modules(
    name: str, make: Callable[[], nn.Module], made: Callable[[int], Tensor], device: torch.device
) -> None:
    model = make().to(device)
    compiled = torch.compile(model, fullgraph=True)
    for num_cells in (5, 9, 1, 12):
        same_outcome(model, compiled, (made(num_cells).to(device),), f"{name} {num_cells=}")


def test_four_level_early_exit(device: torch.device) -> None:
    model = FourExits().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_cells in (33, 5):
        same_outcome(model, compiled, (torch.randn(num_cells, 6, device=device),), num_cells)


@pytest.mark.slow
def test_three_scales_by_three_layers(device: torch.device) -> None:
    model = DynamicRouting().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_cells in (17, 5):
        x = torch.randn(num_cells, 4, device=device)
        same_outcome(model, compiled, (x,), num_cells)


def test_graph_of_grouped_does_not_grow_with_paths(device: torch.device) -> None:
    """Experts in one operator: from 4 to 64 paths only their parameters are more."""
    nodes = []
    for num_experts in (4, 64):
        graphs: list[torch.fx.GraphModule] = []

        def backend(
            graph: torch.fx.GraphModule,
            inputs: list[Tensor],
            graphs: list[torch.fx.GraphModule] = graphs,
        ) -> object:
            graphs.append(graph)
            return graph.forward

        model = Grouped(num_experts=num_experts).to(device)
        x = torch.randn(2, 9, 4, device=device)
        close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
        torch._dynamo.reset()
        nodes.append(sum(node.op != "placeholder" for node in graphs[0].graph.nodes))
    assert nodes[0] == nodes[1]


def test_one_host_read_a_scatter(device: torch.device) -> None:
    """Loads come to the host through one operator, however many paths there are."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = Branches("linear", 16).to(device)
    torch.compile(model, fullgraph=True, backend=backend)(*model.inputs(8, device=device))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("path_sizes" in target for target in targets) == 1
    assert not any(
        "item" in t or "nonzero" in t or "tolist" in t for t in targets if "get" not in t
    )


def test_two_calls_do_not_alias(device: torch.device) -> None:
    model = Branches("linear", 2).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(*model.inputs(8, device=device))
        kept = first.clone()
        compiled(*model.inputs(8, device=device)).zero_()
    assert torch.equal(first, kept)


def test_roots_are_told_apart_in_a_graph(device: torch.device) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), 2)
            self.gather = brt.GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, x)
            others, other = self.scatter(x, x)
            return self.gather([paths[0], others[1]], [route[0], other[1]])

    compiled = torch.compile(Wrong(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="belong to another root"):
        compiled(torch.randn(5, 2, device=device))


def test_other_numbers_of_rows_fail_at_run_time(device: torch.device) -> None:
    """A branch that loses a row is no silent wrong result."""

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), 2)
            self.gather = brt.GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, x)
            return self.gather([paths[0], paths[0]], route)

    compiled = torch.compile(Wrong(), fullgraph=True, backend="aot_eager")
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    close(compiled(x), torch.ones(2, 1) * x[:1].cpu())  # loads happen to be equal
    with pytest.raises(RuntimeError):
        compiled(torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device))
