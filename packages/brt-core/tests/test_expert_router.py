"""`brt.ExpertRouter` against a loop over cells.

Legend: N cells, K choices per cell, P paths, D model and H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core_cases import close, grads_of
from torch import Tensor
from torch.nn import functional as F

import brt

DIM, HIDDEN = 6, 5


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swiglu": swiglu,
}


def by_cell(
    x: Tensor, weight: Tensor | None, up: Tensor, down: Tensor, choice: Tensor,
    biases: tuple[Tensor, Tensor] | None, function: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    rows = []
    for n, paths in enumerate(choice.tolist()):
        total = x.new_zeros(DIM)
        for k, p in enumerate(paths):
            if p >= 0:
                hidden = function(F.linear(x[n], up[p], biases[0][p] if biases else None))
                out = F.linear(hidden, down[p], biases[1][p] if biases else None)
                total = total + out * (1 if weight is None else weight[n, k])
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, DIM)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("named", [False, True], ids=["function", "name"])
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("num_cells", [0, 1, 7])
def test_equals_a_loop_over_cells(
    num_cells: int, activation: str, named: bool, transposed: bool, bias: bool, device: torch.device
) -> None:
    num_paths, function = 3, FUNCTIONS[activation]
    halves = 2 if activation == "swiglu" else 1
    choice = torch.rand(num_cells, num_paths).topk(2, dim=1).indices.to(device)
    choice[choice == 1] = -1 if num_cells == 7 else 1
    up = torch.randn(num_paths, halves * HIDDEN, DIM, device=device)
    down = torch.randn(num_paths, DIM, HIDDEN, device=device)
    biases = (
        (torch.randn(num_paths, halves * HIDDEN, device=device), torch.randn(3, DIM, device=device))
        if bias
        else None
    )
    if transposed:
        up, down = (w.transpose(1, 2).contiguous() for w in (up, down))
    router = brt.ExpertRouter(num_paths)

    def ours(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return router(
            x, choice, weight, up, down, up_bias_PH=biases[0] if biases else None,
            down_bias_PD=biases[1] if biases else None,
            activation=activation if named else function,
        )  # fmt: skip

    def loop(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return by_cell(x, weight, up, down, choice, biases, function)

    args = (torch.randn(num_cells, DIM, device=device), torch.rand(num_cells, 2, device=device))
    came, came_grads = grads_of(ours, *args, up, down)
    wanted, wanted_grads = grads_of(loop, *args, up, down) if num_cells else (None, None)
    if wanted is None or wanted_grads is None:
        assert came[0].shape == (0, DIM)
        return
    close(came[0], wanted[0], factor=4)
    for a, b in zip(came_grads, wanted_grads, strict=True):
        close(a, b, factor=8)
    with torch.inference_mode():
        close(ours(*args, up, down), wanted[0].detach(), factor=4)


def test_it_is_observed_and_profiled() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = brt.ExpertRouter(3)
            self.up = torch.nn.Parameter(torch.randn(3, 8, 4))
            self.down = torch.nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            choice = x[:, :3].argmax(1, keepdim=True)
            return self.router(x, choice, None, self.up, self.down, activation="relu")  # type: ignore[no-any-return]

    layer, batches = Layer(), [torch.randn(5, 4), torch.randn(9, 4)]
    profile = brt.profile(layer, batches)
    assert list(profile.routers) == ["router#0"]
    assert profile.routers["router#0"].num_paths == 3
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(batches[0]), layer(batches[0]))


def test_bad_weights() -> None:
    router = brt.ExpertRouter(3)
    x, choice = torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.int64)
    up, down = torch.randn(3, 8, 4), torch.randn(3, 4, 8)
    with pytest.raises(brt.RouteError, match=r"up must hold 3 experts .* got \[2, 8, 4\]"):
        router(x, choice, None, up[:2], down)
    with pytest.raises(brt.RouteError, match=r"down must hold 3 experts .* got \[4, 8\]"):
        router(x, choice, None, up, down[0])
    with pytest.raises(brt.RouteError, match="features of x"):
        router(x[:, :2], choice, None, up, down, activation="relu")
    with pytest.raises(brt.RouteError, match="num_paths must be at least 1"):
        brt.ExpertRouter(0)
