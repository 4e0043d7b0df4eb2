"""Random networks and random lists of all passes, against the originals.

Passes are drawn from all that brt-core offers, so that a new one takes part by itself. Messages
print the seed; `check(seed)` repeats what failed.
"""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from random_networks import RandomNetwork, batches, steer

import brt
from brt import plugins
from brt.optimize import optimize
from brt.passes import Pass, PinCapacities
from brt.profile import profile

NUM_LISTS = 4
NUM_INPUTS = 3
BOUND = 1e-9  # of float64


def drawn(rng: random.Random) -> list[Pass]:
    """Some of the passes that are registered, in any order, some with other options."""
    found = plugins.collect("passes")
    passes = [spec.factory() for spec, _ in found.values() if rng.random() < 0.35]
    if rng.random() < 0.5:
        passes = [PinCapacities(50.0) if p.name == PinCapacities.name else p for p in passes]
    rng.shuffle(passes)
    return passes


def network(seed: int) -> RandomNetwork:
    """One block of a random network: nested scatters, shared branches, flows, exits, loops."""
    while True:
        model = RandomNetwork(seed).double()
        model.blocks = model.blocks[:1]
        if any(isinstance(m, (brt.ScatterRouter, brt.LoopRouter)) for m in model.modules()):
            return model
        seed += 1_000_000  # a single exit decides nothing


def check(seed: int) -> int:
    """One network and profile with several lists of passes; how many cases that is.

    A case is a network, a profile, a list of passes and an input. Inputs are one of the profile's,
    one of another size that may be empty, and one whose cells are sent elsewhere.
    """
    rng = random.Random(seed)
    model = network(seed)
    inside = batches(seed, (rng.choice([1, 3]), 5), torch.float64)
    outside = batches(seed + 1, (rng.choice([0, 1, 2, 7]), rng.choice([4, 9])), torch.float64)
    profiled = profile(model, inside, progress=False)
    lists = [drawn(rng) for _ in range(NUM_LISTS)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", brt.PluginWarning)
        made = []
        for passes in lists:
            try:
                made.append(optimize(model, profiled, passes=passes, sample=inside[0]))
            except Exception as error:
                raise AssertionError(f"seed {seed}, {passes}: {error}") from error
        for at, x in enumerate((inside[1], *outside)):
            if at == NUM_INPUTS - 1:
                steer(model, seed + 1)  # in place: all share the weights
            wanted = model(x)
            for fast, passes in zip(made, lists, strict=True):
                what = f"seed {seed}, {passes}, input {at}, N={len(x)}"
                try:
                    torch.testing.assert_close(fast(x), wanted, rtol=BOUND, atol=BOUND)
                except Exception as error:
                    raise AssertionError(f"{what}: {error}") from error
    return NUM_INPUTS * len(made)


@pytest.mark.parametrize("start", range(0, 170, 10))
def test_two_thousand_cases(start: int) -> None:
    assert sum(check(seed) for seed in range(start, start + 10)) == 120  # 17 times: 2,040


@pytest.mark.slow
def test_thousands_of_cases() -> None:
    assert sum(check(seed) for seed in range(10_000, 12_000)) == 24_000
