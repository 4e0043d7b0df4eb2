"""Training: mixed precision, activation checkpointing, data parallelism, and that it learns.

Legend: N cells, D features.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compile_cases import Capacity, Grouped, Patches, Tokens
from core_cases import close
from ddp_worker import Model, batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import brt
from brt import GatherRouter, ScatterRouter
from brt.protocols import CapacityTopK, NoisyTopK, TopK


def grads(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [Tokens, Grouped, Capacity])
def test_autocast(make: type[Tokens], dtype: torch.dtype, device: torch.device) -> None:
    """Experts run in half precision and so is the result; scores and weights are float32."""
    model = make(dim=8).to(device)
    x = torch.randn(2, 9, 8, device=device)
    routes = []
    model.scatter.register_observer(lambda router, route, scores: routes.append(route))
    with torch.autocast(device.type, dtype=dtype):
        out = model(x)
    (route,) = routes
    assert out.dtype == dtype
    assert route.weight_R.dtype == torch.float32  # whatever autocast made of the scores
    # The same choices as in float32, but for scores that lie next to each other
    wanted = model(x)
    same = (routes[1].decision().mask_NP == route.decision().mask_NP).all(1)
    assert same.float().mean() > 0.7
    torch.testing.assert_close(
        out.flatten(0, 1)[same].float(), wanted.flatten(0, 1)[same], rtol=0.05, atol=0.05
    )
    out.float().square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())


def test_autocast_compiles(device: torch.device) -> None:
    model = Tokens().to(device)
    x = torch.randn(2, 9, 4, device=device)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return model(x)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    close(compiled(x), run(x), factor=2)


def test_protocols_decide_in_float32_under_autocast(device: torch.device) -> None:
    scores = torch.randn(64, 8, device=device)
    protocol = TopK(2, softmax="before", renormalise=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        decision = protocol(scores, 8)
    wanted = protocol(scores, 8)
    assert torch.equal(decision.choice_NK, wanted.choice_NK)
    close(decision.weight, wanted.weight)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "protocol",
    [TopK(2), CapacityTopK(k=2, capacity_factor=0.75), NoisyTopK(2), brt.protocols.Random()],
    ids=lambda protocol: protocol.name,
)
def test_checkpointing_takes_the_same_route(
    protocol: brt.protocols.Protocol, reentrant: bool, device: torch.device
) -> None:
    """Also where random numbers decide: torch's generator is restored for the second time."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 8 if protocol.name == "noisy-top-k" else 4)
            self.scatter = ScatterRouter(protocol, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.gather = GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, self.gate(x))
            rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
            return x + self.gather(rows, route)

    layer = Layer().to(device)
    routes = []
    layer.scatter.register_observer(lambda router, route, scores: routes.append(route))
    x = torch.randn(20, 4, device=device, requires_grad=True)
    torch.manual_seed(7)
    layer(x).square().sum().backward()
    wanted, wanted_x = grads(layer), x.grad.clone()
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(7)
    out = checkpoint(layer, x, use_reentrant=reentrant)
    torch.rand(100, device=device)  # something else draws in between
    out.square().sum().backward()
    assert len(routes) == 3
    for route in routes[1:]:
        for field in ("cell_R", "row_NK", "offsets_P1"):
            assert torch.equal(getattr(route, field), getattr(routes[0], field)), field
    close(x.grad, wanted_x, factor=3)
    for came, want in zip(grads(layer), wanted, strict=True):
        assert (came is None) == (want is None)
        if came is not None:
            close(came, want, factor=3)


@pytest.mark.dist
def test_data_parallel_without_find_unused_parameters(tmp_path: Path) -> None:
    """Each rank uses other experts; gradients are those of both ranks' batches together."""
    world = 2
    worker = Path(__file__).with_name("ddp_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    used = [
        model.scatter(batch(rank, 0), model.gate(batch(rank, 0)))[1].load_P > 0
        for rank in range(world)
    ]
    assert not torch.equal(*used), "the ranks must use other experts for this test to tell"
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(world):
            (model(batch(rank, step)).square().mean() / world).backward()
        for rank in range(world):
            for (name, parameter), grad in zip(
                model.named_parameters(), results[rank][0][step], strict=True
            ):
                close(grad, parameter.grad, f"{name} of rank {rank}, step {step}", factor=5)
        optimizer.step()
    for rank in range(world):
        for name, value in model.state_dict().items():
            close(results[rank][1][name], value, name, factor=5)


def test_gradcheck_of_whole_layers(device: torch.device) -> None:
    """Gate, protocol, scatter, experts and gather, in every parameter and the input."""
    x = torch.randn(1, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    for protocol in (
        TopK(2, softmax="before"),
        TopK(2, softmax="after"),
        TopK(2, softmax="before", renormalise=True),
    ):
        model = Tokens().to(device).double()
        model.scatter.protocol = protocol
        names = [name for name, _ in model.named_parameters()]

        def run(x: Tensor, *parameters: Tensor) -> Tensor:
            given = dict(zip(names, parameters, strict=True))  # noqa: B023
            return torch.func.functional_call(model, given, (x,))  # noqa: B023

        assert torch.autograd.gradcheck(run, (x, *model.parameters()))


def test_it_learns(device: torch.device) -> None:
    """Two experts tell two kinds of cells apart that no single linear layer fits."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.scatter = ScatterRouter(TopK(1, softmax="before"), 2)
            self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
            self.gather = GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, self.gate(x))
            return self.gather([e(p) for e, p in zip(self.experts, paths, strict=True)], route)

    x = torch.randn(256, 4, device=device)
    wanted = torch.where(x[:, :1] > 0, x[:, 1:2], -x[:, 1:2])
    model = Two().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7  # a single layer stays above 1


def test_convolutions_under_autocast(device: torch.device) -> None:
    model = Patches().to(device)
    x = torch.randn(1, 2, 7, 9, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None for b in model.branches for p in b.parameters())
