"""Optimised random networks against their originals, on inputs inside and outside the profile."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from random_networks import RandomNetwork, batches, steer
from torch import Tensor, nn

import brt
from brt.optimize import optimize
from brt.passes import BatchExits, DeferOperations, DropDeadPaths, FoldPermanentPaths, Pass
from brt.profile import profile

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.15}


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.dtype == wanted.dtype, what
    assert found.shape == wanted.shape, what
    bound = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, msg=lambda m: f"{what}: {m}")


def gradients(module: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor | None] | None:
    """Of the input and of every parameter; None where a branch writes to what it may not."""
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    try:
        module(leaf).sin().sum().backward()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return None
    return [leaf.grad, *(parameter.grad for parameter in model.parameters())]


def check(seed: int, device: str = "cpu") -> tuple[int, int]:
    """One random network, profile and list of passes; (hits, fallbacks) of its guards."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float64] * 6 + [torch.float32] * 3 + [torch.bfloat16])
    model = RandomNetwork(seed).to(device, dtype)
    sizes = tuple(rng.choice([1, 2, 5, 9]) for _ in range(3))
    inside = [x.to(device) for x in batches(seed, sizes, dtype)]
    drawn: tuple[Pass, ...] = (
        DropDeadPaths(), FoldPermanentPaths(), BatchExits(), DeferOperations(),
    )  # fmt: skip
    passes = [one for one in drawn if rng.random() < 0.7]
    rng.shuffle(passes)
    sample = rng.choice([*inside, None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", brt.PluginWarning)
        fast = optimize(model, profile(model, inside), passes=passes, sample=sample)
    assert list(fast.state_dict()) == list(model.state_dict())
    if rng.random() < 0.2:
        fast = copy.deepcopy(fast)
        steered = [model, fast]
    else:
        steered = [model]
    outside = [x.to(device) for x in batches(seed + 1, (0, 1, 7), dtype)]
    for again in range(3):
        for x in (*inside, *outside):
            what = f"seed {seed}, {passes}, steered {again} times, {dtype}, N={len(x)}"
            given = x.clone()
            with torch.no_grad():
                same(fast(x), model(x), what)
            assert torch.equal(x, given), f"{what}: input changed"
        if dtype == torch.float64 and steered == [model]:
            for x in (inside[0], outside[0]):
                what = f"seed {seed}, steered {again} times, N={len(x)}"
                expected = gradients(model, model, x)
                if expected is None:
                    continue
                came = gradients(fast, model, x)
                assert came is not None, what
                for found, wanted in zip(came, expected, strict=True):
                    assert (found is None) == (wanted is None), f"{what}: gradient missing"
                    if found is not None and wanted is not None:
                        same(found, wanted, f"{what}: gradient")
        for one in steered:
            steer(one, seed + again)
    counts = fast.stats.values()
    return sum(c.hits for c in counts), sum(c.fallbacks for c in counts)


@pytest.mark.parametrize("seed", range(60))
def test_random_network(seed: int) -> None:
    check(seed)


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(20))
def test_random_network_on_cuda(seed: int) -> None:
    check(seed, "cuda")


@pytest.mark.slow
def test_two_thousand_random_networks() -> None:
    hits = fallbacks = 0
    for seed in range(1000, 3000):
        counts = check(seed)
        hits, fallbacks = hits + counts[0], fallbacks + counts[1]
    assert hits > 0
    assert fallbacks > 0
