"""`brt.grouped` and `brt.each` against each branch on its own.

Legend: N cells, P paths, R packed rows, D H O feature sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from core_cases import close, grads_of, one_hot_scores, top_k
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import brt
from brt import GatherRouter, ScatterRouter, ops

BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 5),
    "no-bias": lambda: nn.Linear(4, 5, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)),
    "tanh-gelu": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU("tanh"), nn.Linear(6, 5)),
    "relu-last": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU()),
    "activation-first": lambda: nn.Sequential(nn.SiLU(), nn.Linear(4, 5)),
    "two-activations": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.SiLU(), nn.Identity()),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.SiLU()), nn.Linear(6, 5)),
    "linears": lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Identity()),
    "in-place": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True)),
    "identity": lambda: nn.Identity(),
    "weight-norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
}


def routed(num_cells: int, paths: list[int] | None, device: torch.device) -> tuple:
    """(packed rows, route, rows of each path) of three paths."""
    x = torch.randn(num_cells, 4, device=device)
    scores = torch.rand(num_cells, 3, device=device)
    if paths is not None:
        scores = one_hot_scores(paths, 3, device)
    protocol = top_k(2 if paths is None else 1)
    rows, route = ScatterRouter(protocol, 3, result="packed")(x, scores)
    split, _ = ScatterRouter(protocol, 3)(x, scores)
    return rows, route, split


@pytest.mark.parametrize("paths", [None, [1] * 7, [0, 2, 2, 0, 0, 2, 2]], ids=str)
@pytest.mark.parametrize("name", BRANCHES)
def test_grouped_equals_each(name: str, paths: list[int] | None, device: torch.device) -> None:
    modules = nn.ModuleList(BRANCHES[name]() for _ in range(3)).to(device)
    rows, route, split = routed(7, paths, device)

    def together(rows: Tensor) -> Tensor:
        return GatherRouter()(brt.grouped(list(modules), rows, route), route)

    def apart(rows: Tensor) -> Tensor:
        parts = [m(part) for m, part in zip(modules, route.with_sizes().split(rows), strict=True)]
        return GatherRouter()(parts, route)

    kept = rows.clone()
    came, came_grads = grads_of(together, rows)
    parameter_grads = [p.grad.clone() for p in modules.parameters()]
    modules.zero_grad()
    wanted, wanted_grads = grads_of(apart, rows)
    close(came[0], wanted[0], factor=3)
    close(came_grads[0], wanted_grads[0], factor=3)
    for a, b in zip(parameter_grads, modules.parameters(), strict=True):
        close(a, b.grad, factor=5)  # also of branches without cells: zeros
    assert torch.equal(rows, kept)
    with torch.no_grad():
        close(together(rows), apart(rows), factor=3)
        outs = brt.each(modules, split)
        close(torch.cat(outs), torch.cat([m(p) for m, p in zip(modules, split, strict=True)]))


def test_no_cells(device: torch.device) -> None:
    modules = [nn.Linear(4, 5).to(device) for _ in range(3)]
    rows, route, split = routed(0, None, device)
    assert brt.grouped(modules, rows, route).shape == (0, 5)
    with torch.no_grad():
        assert [tuple(out.shape) for out in brt.each(modules, split)] == [(0, 5)] * 3


def test_grouped_is_one_operator_a_layer(device: torch.device) -> None:
    modules = [BRANCHES["mlp"]().to(device) for _ in range(3)]
    rows, route, _ = routed(7, None, device)
    with torch.no_grad(), Calls() as ran:
        brt.grouped(modules, rows, route)
    assert ran.names.count("brt.grouped_linear.default") == 2
    assert not any("linear" in call and "brt" not in call for call in ran.names)
    assert not any("gelu" in call for call in ran.names)  # it is fused


@pytest.mark.parametrize("paths", [None, [1] * 7, [0, 2, 2, 0, 0, 2, 2], []], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_large_weights_are_not_copied(
    paths: list[int] | None, bias: bool, device: torch.device
) -> None:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 9000, bias), nn.SiLU(), nn.Linear(9000, 5, bias))

    modules = [branch().to(device) for _ in range(3)]
    rows, route, _ = routed(7 if paths != [] else 0, paths or None, device)
    packed = torch.cat([rows, rows.new_zeros(2, 4)])
    route = dataclasses.replace(route, cell_R=F.pad(route.cell_R, (0, 2), value=-1))
    wanted = brt.grouped(modules, packed, route).detach()
    with torch.inference_mode():
        close(brt.grouped(modules, packed, route), wanted, factor=3)
        with Calls() as ran:
            brt.grouped(modules, packed, route)
    on_cpu = device.type == "cpu"
    assert ("aten.stack.default" in ran.names) is not on_cpu
    # The parts of one tensor are that tensor
    for position in (0, 2):
        stacked = torch.stack([m[position].weight.detach() for m in modules])
        for module, part in zip(modules, stacked, strict=True):
            module[position].weight = nn.Parameter(part)
    with torch.inference_mode(), Calls() as ran:
        close(brt.grouped(modules, packed, route), wanted, factor=3)
    assert ran.names.count("brt.grouped_linear.default") == 2
    assert ran.names.count("aten.stack.default") == (2 if bias else 0)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    modules = [BRANCHES["mlp"]().to(device, dtype) for _ in range(3)]
    x = torch.randn(9, 4).to(device, dtype)
    rows, route = ScatterRouter(top_k(2), 3, result="packed")(x, torch.rand(9, 3, device=device))
    came = brt.grouped(modules, rows, route)
    wanted = [m(p) for m, p in zip(modules, route.with_sizes().split(rows), strict=True)]
    close(came, torch.cat(wanted), factor=2)


def test_autocast(device: torch.device) -> None:
    modules = [BRANCHES["mlp"]().to(device) for _ in range(3)]
    rows, route, split = routed(9, None, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        came = brt.grouped(modules, rows, route)
        wanted = torch.cat([m(p) for m, p in zip(modules, split, strict=True)])
    close(came, wanted, factor=2)


class Doubles(nn.Linear):
    """Not what its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Backwards(nn.Sequential):
    """Not what a Sequential does."""

    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


def hooked() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, out: out + 1)
    return linear


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Linear(4, 4)] * 2, "2 modules for a route of 3 paths"),
        ([nn.Conv1d(4, 4, 1)] * 3, r"takes nn\.Linear, .* got Conv1d; use brt\.each"),
        ([nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()], "module 2 has other layers than module 0"),
        (
            [nn.Sequential(nn.Linear(4, 4), nn.GELU(a)) for a in ("none", "tanh", "none")],
            "module 1 has other layers",
        ),
        ([nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(4, 4)], r"different shapes \[\(4, 4\), \(5"),
        (
            [nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)],
            "some linear layers have a bias and some have none",
        ),
        ([Doubles(4, 4)] * 3, "got Doubles; use brt.each"),
        ([Backwards(nn.Linear(4, 4), nn.ReLU())] * 3, "got Backwards"),
        ([hooked()] * 3, "got Linear with forward hooks"),
        ([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))] * 3, "got Dropout"),
        ([nn.Linear(5, 4)] * 3, "features of x and of weight.*got 4 and 5"),
    ],
)
def test_bad_branches(modules: list[nn.Module], message: str) -> None:
    rows, route, _ = routed(7, None, torch.device("cpu"))
    with pytest.raises(brt.RouteError, match=message):
        brt.grouped(modules, rows, route)


def test_bad_rows() -> None:
    rows, route, split = routed(7, None, torch.device("cpu"))
    modules = [nn.Linear(4, 4)] * 3
    with pytest.raises(brt.RouteError, match=r"one packed tensor: ScatterRouter\(\.\.\., result="):
        brt.grouped(modules, split, route)
    with pytest.raises(brt.RouteError, match=r"rows and rows of the route .* got 3 and 14"):
        brt.grouped(modules, rows[:3], route)


# each


def counted(module: nn.Module, calls: list[int]) -> nn.Module:
    module.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[0]))
    return module


def test_each_skips_what_is_empty(device: torch.device) -> None:
    calls: list[int] = []
    modules = [counted(nn.Linear(4, 5).to(device), calls) for _ in range(3)]
    _, _, split = routed(7, [0, 2, 2, 0, 0, 2, 2], device)
    with torch.no_grad():
        outs = brt.each(modules, split)
    assert calls == [3, 4]
    assert outs[1].shape == (0, 5)
    assert outs[1].dtype == torch.float32
    calls.clear()
    outs = brt.each(modules, split)  # gradients of the empty branch are zeros, not None
    assert calls == [3, 0, 4]
    torch.cat(outs).sum().backward()
    assert modules[1].weight.grad is not None
    assert not modules[1].weight.grad.any()


def test_each_asks_the_module_where_all_are_empty(device: torch.device) -> None:
    modules = [nn.Linear(4, 5 + p).to(device) for p in range(2)]
    with torch.no_grad():
        outs = brt.each(modules, [torch.zeros(0, 4, device=device)] * 2)
    assert outs[0].shape == (0, 5)


def test_each_of_flows(device: torch.device) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, y * 2

    x, y = torch.randn(5, 4, device=device), torch.arange(5, device=device)
    paths, route = ScatterRouter(top_k(), 3)((x, y), one_hot_scores([0, 2, 0, 0, 2], 3, device))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outs = brt.each([Two()] * 3, paths)
            came = GatherRouter(weighted=False)(outs, route)
        close(came[0], x + 1)
        close(came[1], y * 2)


def test_each_wants_as_many() -> None:
    with pytest.raises(brt.RouteError, match="2 modules for 3 paths"):
        brt.each([nn.Identity()] * 2, [torch.zeros(1, 2)] * 3)


def test_operators_that_grouped_runs(device: torch.device) -> None:
    """The whole layer in one operator gives what its parts give."""
    ups = [nn.Linear(4, 6).to(device) for _ in range(3)]
    downs = [nn.Linear(6, 4).to(device) for _ in range(3)]
    x = torch.randn(9, 4, device=device)
    rows, route = ScatterRouter(top_k(2), 3, result="packed")(x, torch.rand(9, 3, device=device))
    modules = [nn.Sequential(up, nn.GELU(), down) for up, down in zip(ups, downs, strict=True)]
    with torch.no_grad():
        wanted = GatherRouter()(brt.grouped(modules, rows, route), route)
        came = ops.expert_mlp(
            *(x, route.cell_R, route.row_NK, route.offsets_P1, route.weight_R),
            *(torch.stack([m.weight for m in ups]), torch.stack([m.bias for m in ups])),
            *(torch.stack([m.weight for m in downs]), torch.stack([m.bias for m in downs])),
            "gelu",
        )
    close(came, wanted, factor=3)
