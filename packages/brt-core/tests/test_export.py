"""torch.export with sizes that the inputs or the loads decide, saved and loaded again."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_cases import LOADS, MODULES, Branches, Records, first_of
from core_cases import close
from test_nested_routes import DynamicRouting, FourExits
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import brt

# torch.export uses parts of torch that are deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def saved_and_loaded(exported: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def check(
    model: nn.Module,
    inputs: list[tuple[Tensor, ...]],
    dynamic_shapes: Any,
    strict: bool = False,
) -> ExportedProgram:
    """Export for the first inputs; run as made and as loaded on all of them."""
    model = model.eval()
    exported = torch.export.export(model, inputs[0], dynamic_shapes=dynamic_shapes, strict=strict)
    for program in (exported, saved_and_loaded(exported)):
        run = program.module()
        for args in inputs:
            close(first_of(run(*args)), first_of(model(*args)), [tuple(a.shape) for a in args])
    return exported


@pytest.mark.parametrize(
    ("kind", "num_paths", "strict"),
    [
        *((kind, num_paths, False) for kind in ("linear", "conv") for num_paths in (1, 2, 16)),
        ("linear", 2, True),
        ("conv", 2, True),
        pytest.param("linear", 16, True, marks=pytest.mark.slow),
        pytest.param("conv", 16, True, marks=pytest.mark.slow),
    ],
)
def test_branches(kind: str, num_paths: int, strict: bool, device: torch.device) -> None:
    model = Branches(kind, num_paths).to(device)
    inputs = [model.inputs(8, load, device) for load in LOADS]
    inputs += [model.inputs(n, "random", device) for n in (1, 13)]
    num_cells = Dim("num_cells", min=1)
    exported = check(model, inputs, ({0: num_cells}, {0: num_cells}), strict)
    targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    ours = {target for target in targets if "brt" in target}
    assert {"brt.route.default", "brt.dispatch.default", "brt.combine.default"} <= ours
    assert ours <= {f"brt.{op}.default" for op in brt.ops.OPERATORS}


@pytest.mark.parametrize(("name", "make", "made"), MODULES, ids=[m[0] for m in MODULES])
def test_modules(
    name: str, make: Callable[[], nn.Module], made: Callable[[int], Tensor], device: torch.device
) -> None:
    dim = 1 if made(3).ndim == 3 else 0
    shapes = ({dim: Dim("num_cells", min=1)},)
    check(make().to(device), [(made(n).to(device),) for n in (5, 9, 1)], shapes)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_four_level_early_exit(strict: bool, device: torch.device) -> None:
    inputs = [(torch.randn(n, 6, device=device),) for n in (5, 33, 1)]
    check(FourExits().to(device), inputs, ({0: Dim("num_cells", min=1)},), strict)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_three_scales_by_three_layers(strict: bool, device: torch.device) -> None:
    class Outputs(DynamicRouting):
        def forward(self, x_ND: Tensor) -> Tensor:
            return super().forward(x_ND)[0]

    inputs = [(torch.randn(n, 4, device=device),) for n in (5, 17, 1)]
    check(Outputs().to(device), inputs, ({0: Dim("num_cells", min=1)},), strict)


def test_static_sizes(device: torch.device) -> None:
    model = Branches("linear", 4).to(device)
    check(model, [model.inputs(8, load, device) for load in LOADS], None)


def test_records_are_outputs(device: torch.device) -> None:
    """Auxiliary losses need the route and the decision; they come back as what they were."""
    model = Records().to(device).eval()
    args = (torch.randn(2, 5, 4, device=device),)
    shapes = ({0: Dim("num_sequences"), 1: Dim("num_tokens")},)
    exported = torch.export.export(model, args, dynamic_shapes=shapes)
    for program in (exported, saved_and_loaded(exported)):
        for shape in ((2, 5, 4), (3, 7, 4)):
            x = torch.randn(shape, device=device)
            _, route, cells, grid, decision = program.module()(x)
            _, want_route, want_cells, want_grid, want_decision = model(x)
            for record, wanted in (
                (route, want_route),
                (cells, want_cells),
                (grid, want_grid),
                (decision, want_decision),
            ):
                assert type(record) is type(wanted)
            num_cells = shape[0] * shape[1]
            assert (route.num_paths, route.num_cells) == (4, num_cells)
            for field in ("cell_R", "row_NK", "offsets_P1", "weight_R"):
                close(getattr(route, field), getattr(want_route, field), field)
            assert route.sizes == want_route.sizes
            close(route.load_P, want_route.load_P)
            close(cells.cell_R, want_cells.cell_R)
            assert (grid.dims, grid.sizes) == (want_grid.dims, shape)
            rows = torch.randn(num_cells, 6, device=device)
            assert torch.equal(grid.restore(rows), want_grid.restore(rows))
            close(decision.choice_NK, want_decision.choice_NK)
            close(decision.weight, want_decision.weight)
            assert decision.num_cells == num_cells
            assert cells.root == grid.cells.root == route.cells.root


def test_decompositions_keep_the_operators(device: torch.device) -> None:
    model = Branches("conv", 2).to(device).eval()
    inputs = model.inputs(8, device=device)
    num_cells = Dim("num_cells", min=1)
    exported = torch.export.export(
        model, inputs, dynamic_shapes=({0: num_cells}, {0: num_cells})
    ).run_decompositions()
    assert any("brt.dispatch" in str(node.target) for node in exported.graph.nodes)
    for n in (8, 3):
        inputs = model.inputs(n, device=device)
        close(exported.module()(*inputs), model(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_exports_compile(kind: str, device: torch.device) -> None:
    """An exported program goes through Inductor: no router of ours is there to prepare it."""
    model = Branches(kind, 2).to(device).eval()
    inputs = model.inputs(8, device=device)
    num_cells = Dim("num_cells", min=2)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: num_cells}, {0: num_cells}))
    compiled = torch.compile(saved_and_loaded(exported).module(), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for load in LOADS:
            for n in (8, 5):
                inputs = model.inputs(n, load, device)
                close(compiled(*inputs), model(*inputs), load)
