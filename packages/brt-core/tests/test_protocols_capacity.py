"""Switch and CapacityTopK against loops: choices, weights, and the capacity that they declare.

N cells, P paths, K choices of a cell, G groups of S cells.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from brt.errors import ProtocolError
from brt.protocols import CapacityTopK, Protocol, Switch, TopK

SHAPES = [(0, 3), (1, 1), (1, 4), (13, 5), (3, 6, 4), (2, 1, 3), (4, 0, 2), (0, 5, 2)]
FACTORS = [0.1, 0.29, 1.0, 1.1, 1.25, 2.0]


def exact(factor: float) -> Fraction:
    return Fraction(str(factor))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# Switch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_switch_is_the_loop(shape: tuple[int, ...], factor: float) -> None:
    scores, num_paths = torch.randn(shape), shape[-1]
    decision = Switch(factor)(scores, num_paths)
    choices, weights = [], []
    for row in scores.flatten(0, -2).tolist():
        exps = [math.exp(x) for x in row]
        choices.append([max(range(num_paths), key=lambda p: row[p])])
        weights.append([max(exps) / sum(exps)])
    assert decision.choice_NK is not None
    assert decision.choice_NK.tolist() == choices
    torch.testing.assert_close(decision.weight, torch.tensor(weights).view(-1, 1))
    assert decision.capacity == max(1, math.ceil(exact(factor) * shape[-2] / num_paths))
    assert decision.group_size == (max(1, shape[1]) if len(shape) == 3 else None)
    assert decision.priority_N is None


def test_switch_counts_capacity_in_rows_where_told() -> None:
    assert Switch(capacity=64)(torch.rand(2, 10, 4), 4).capacity == 64
    assert Switch(capacity=0)(torch.rand(10, 4), 4).capacity == 0
    assert Switch(None)(torch.rand(10, 4), 4).capacity is None
    assert Switch(1.0, min_capacity=4)(torch.rand(10, 4), 4).capacity == 4


def test_a_factor_of_one_drops_nothing_of_an_even_load() -> None:
    for num_cells, num_paths in itertools.product(range(1, 20), range(1, 6)):
        rows = Switch(1.0).rows_per_path(num_cells, num_paths)
        assert rows is not None
        assert rows >= math.ceil(num_cells / num_paths)


def test_switch_takes_probabilities_as_they_are_where_told() -> None:
    probs_NP = torch.randn(6, 4).softmax(-1)
    given, made = Switch(softmax=None)(probs_NP, 4), Switch()(probs_NP.log(), 4)
    assert torch.equal(given.choice_NK, made.choice_NK)
    torch.testing.assert_close(given.weight, made.weight)


def test_jitter_scales_the_scores() -> None:
    scores_NP = torch.randn(8, 4)
    decision = Switch(jitter=0.5, generator=generator())(scores_NP, 4)
    uniform_NP = torch.rand(8, 4, generator=generator())
    expected = Switch()(scores_NP * (0.5 + uniform_NP), 4)
    assert torch.equal(decision.choice_NK, expected.choice_NK)
    torch.testing.assert_close(decision.weight, expected.weight)


def test_switch_weights_differentiate() -> None:
    def weight(scores: Tensor) -> Tensor:
        made = Switch(jitter=0.1, generator=generator())(scores, 4).weight
        assert made is not None
        return made

    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight, scores)


# CapacityTopK


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("k", "least", "multiple"), [(1, 0, 1), (2, 1, 1), (2, 3, 8)])
def test_capacity_is_the_loop(
    shape: tuple[int, ...], factor: float, k: int, least: int, multiple: int
) -> None:
    num_paths = shape[-1]
    k = min(k, num_paths)
    decision = CapacityTopK(k, factor, multiple, least)(torch.rand(shape), num_paths)
    # Tutel: capacity = top_k * int(capacity_factor * samples_per_expert), then aligned
    rows = max(k * math.floor(exact(factor) * math.ceil(shape[-2] / num_paths)), least)
    while rows % multiple:
        rows += 1
    assert decision.capacity == rows
    assert decision.group_size == (max(1, shape[1]) if len(shape) == 3 else None)


@pytest.mark.parametrize(("factor", "rows"), [(0.29, 29), (1.1, 110), (1.005, 100), (1 / 3, 33)])
def test_a_factor_means_its_decimal_digits(factor: float, rows: int) -> None:
    # int(0.29 * 100) is 28
    assert CapacityTopK(1, factor).rows_per_path(1600, 16) == rows


def test_the_capacity_of_gshard() -> None:
    # GShard, top 2: 2 N / (G E) rows of each expert in each of G groups
    assert CapacityTopK(2)(torch.rand(4, 64, 16), 16).capacity == 2 * 64 // 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("softmax", "renormalise"),
    [(None, False), (None, True), ("before", False), ("before", True), ("after", False)],
)
def test_choices_and_weights_are_those_of_top_k(
    shape: tuple[int, ...], softmax: str | None, renormalise: bool
) -> None:
    num_paths, scores = shape[-1], torch.rand(shape)
    k = min(2, num_paths)
    decision = CapacityTopK(k, softmax=softmax, renormalise=renormalise)(scores, num_paths)
    expected = TopK(k, softmax, renormalise)(scores.flatten(0, -2), num_paths)
    assert torch.equal(decision.choice_NK, expected.choice_NK)
    assert torch.equal(decision.weight, expected.weight)


def test_all_choices_are_made() -> None:
    # Brainstorm's swin_moe keeps first choices only
    choice_NK = CapacityTopK(3)(torch.rand(10, 5), 5).choice_NK
    assert choice_NK is not None
    assert (choice_NK >= 0).all()
    assert choice_NK.shape == (10, 3)


@pytest.mark.parametrize("softmax", [None, "before", "after"])
def test_priority_is_the_best_score(softmax: str | None) -> None:
    scores = torch.randn(2, 5, 4, requires_grad=True)
    protocol = CapacityTopK(2, batch_prioritized=True, softmax=softmax)
    decision = protocol(scores, 4)
    seen = scores.softmax(-1) if softmax == "before" else scores
    assert decision.priority_N is not None
    torch.testing.assert_close(decision.priority_N, seen.detach().flatten(0, 1).amax(1))
    assert not decision.priority_N.requires_grad
    assert CapacityTopK(2)(scores, 4).priority_N is None


def test_no_factor_is_no_limit() -> None:
    assert CapacityTopK(2, None, alignment=8)(torch.rand(10, 4), 4).capacity is None


def test_noise_is_added_to_the_scores() -> None:
    scores_NP = torch.randn(8, 4)
    decision = CapacityTopK(2, softmax="before", noise_std=0.3, generator=generator())(scores_NP, 4)
    noisy_NP = scores_NP + 0.3 * torch.randn(8, 4, generator=generator())
    expected = TopK(2, "before")(noisy_NP, 4)
    assert torch.equal(decision.choice_NK, expected.choice_NK)
    torch.testing.assert_close(decision.weight, expected.weight)


def test_capacity_top_k_weights_differentiate() -> None:
    def weight(scores: Tensor) -> Tensor:
        protocol = CapacityTopK(
            2, softmax="before", renormalise=True, noise_std=0.1, generator=generator()
        )
        made = protocol(scores, 4).weight
        assert made is not None
        return made

    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight, scores)


# Both


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "protocol",
    [Switch(), Switch(jitter=0.1), CapacityTopK(2, softmax="before", noise_std=0.1)],
    ids=repr,
)
def test_arithmetic_is_float32(dtype: torch.dtype, protocol: Protocol) -> None:
    decision = protocol(torch.randn(5, 4).to(dtype), 4)
    assert decision.weight is not None
    assert decision.weight.dtype == torch.float32


@pytest.mark.parametrize("protocol", [Switch(jitter=0.1), CapacityTopK(2, noise_std=0.1)], ids=repr)
def test_without_noise_nothing_is_drawn(protocol: Protocol) -> None:
    quiet, scores = protocol.without_noise(), torch.rand(5, 4)
    assert protocol.stochastic
    assert not quiet.stochastic
    before = torch.get_rng_state()
    first, second = quiet(scores, 4), quiet(scores, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight)
    assert quiet.without_noise() == quiet


def test_capacity_is_symbolic_where_the_number_of_cells_is() -> None:
    class Capacity(torch.nn.Module):
        def forward(self, scores: Tensor) -> tuple[int | None, int | None]:
            return (
                Switch(1.1, min_capacity=2)(scores, 4).capacity,
                CapacityTopK(2, 1.1, 8)(scores, 4).capacity,
            )

    shapes = ({0: torch.export.Dim("G"), 1: torch.export.Dim("S")},)
    exported = torch.export.export(Capacity(), (torch.rand(2, 8, 4),), dynamic_shapes=shapes)
    for size in (1, 5, 40):
        scores = torch.rand(3, size, 4)
        assert tuple(exported.module()(scores)) == Capacity()(scores)


BAD = {
    "factor-0": (lambda: Switch(0.0), "capacity_factor must be a finite number > 0 or None, got 0"),
    "factor-nan": (lambda: CapacityTopK(2, math.nan), "capacity_factor .* got nan"),
    "factor-inf": (lambda: CapacityTopK(2, math.inf), "capacity_factor .* got inf"),
    "factor-text": (lambda: CapacityTopK(2, "1"), "capacity_factor .* got '1'"),
    "capacity": (lambda: Switch(capacity=-1), "capacity must be an integer >= 0, got -1"),
    "jitter": (lambda: Switch(jitter=1.0), r"jitter must be in \[0, 1\), got 1.0"),
    "softmax": (lambda: Switch(softmax="after"), "softmax must be None or 'before', got 'after'"),
    "noise": (lambda: CapacityTopK(1, noise_std=-1.0), "noise_std must be a finite .* got -1.0"),
    "alignment": (lambda: CapacityTopK(1, alignment=0), "alignment must be an integer >= 1"),
    "least": (lambda: CapacityTopK(1, min_capacity=-1), "min_capacity must be an integer >= 0"),
    "k": (lambda: CapacityTopK(0), "k must be an integer >= 1"),
    "k-paths": (lambda: CapacityTopK(3)(torch.rand(2, 2), 2), "k=3 paths, but there are 2"),
    "rank": (
        lambda: Switch()(torch.rand(1, 2, 3, 4), 4),
        r"\[N, P\] or \[G, S, P\], got shape \(1, 2, 3, 4\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call()
