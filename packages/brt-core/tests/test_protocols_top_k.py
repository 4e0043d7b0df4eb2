"""TopK and NoisyTopK against loops.

N cells, P paths, K choices of a cell.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from brt.errors import ProtocolError
from brt.protocols import NoisyTopK, TopK
from brt.protocols.top_k import Softmax

SIZES = [(0, 3), (1, 1), (1, 4), (5, 2), (33, 7)]
WEIGHTS: list[tuple[Softmax, bool]] = [
    (None, False),
    (None, True),
    ("before", False),
    ("before", True),
    ("after", False),
]


def softmax_of(row: list[float]) -> list[float]:
    exps = [math.exp(x - max(row)) for x in row]
    return [x / sum(exps) for x in exps]


def top_k_of(
    scores: list[list[float]], k: int, softmax: Softmax, renormalise: bool
) -> tuple[list[list[int]], list[list[float]]]:
    """The choices and weights of every cell, by loops."""
    choices, weights = [], []
    for row in scores:
        seen = softmax_of(row) if softmax == "before" else row
        best = sorted(range(len(row)), key=lambda p: -row[p])[:k]
        weight = [seen[p] for p in best]
        if softmax == "after":
            weight = softmax_of(weight)
        if renormalise:
            weight = [w / sum(weight) for w in weight]
        choices.append(best)
        weights.append(weight)
    return choices, weights


def cases() -> list[tuple[int, int, int, Softmax, bool]]:
    return [
        (n, p, k, softmax, renormalise)
        for (n, p), (softmax, renormalise) in itertools.product(SIZES, WEIGHTS)
        for k in sorted({1, min(2, p), p})
    ]


@pytest.mark.parametrize(("n", "p", "k", "softmax", "renormalise"), cases())
def test_top_k_is_the_loop(n: int, p: int, k: int, softmax: Softmax, renormalise: bool) -> None:
    scores_NP = torch.rand(n, p) + 0.01
    decision = TopK(k, softmax, renormalise)(scores_NP, p)
    choices, weights = top_k_of(scores_NP.tolist(), k, softmax, renormalise)
    assert decision.choice_NK is not None
    assert decision.choice_NK.shape == (n, k)
    assert decision.choice_NK.tolist() == choices
    torch.testing.assert_close(decision.weight, torch.tensor(weights).view(n, k))


def test_the_weights_are_the_scores_given() -> None:
    scores_NP = torch.tensor([[0.25, -3.0, 7.0]])
    decision = TopK(2)(scores_NP, 3)
    assert decision.choice_NK is not None
    assert decision.weight is not None
    assert decision.choice_NK.tolist() == [[2, 0]]
    assert decision.weight.tolist() == [[7.0, 0.25]]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_go_to_different_paths(k: int) -> None:
    decision = TopK(k, "before")(torch.zeros(9, 4), 4)
    assert decision.choice_NK is not None
    for row in decision.choice_NK.tolist():
        assert len(set(row)) == k
    torch.testing.assert_close(decision.weight, torch.full((9, k), 0.25))


def test_all_cells_on_one_path() -> None:
    scores_NP = torch.rand(50, 8)
    scores_NP[:, 3] += 2
    choice_NK = TopK(1)(scores_NP, 8).choice_NK
    assert choice_NK is not None
    assert set(choice_NK.flatten().tolist()) == {3}


def test_a_path_ruled_out_by_minus_infinity_weighs_nothing() -> None:
    scores_NP = torch.tensor([[0.0, -math.inf, -math.inf]])
    for softmax in ("before", "after"):
        weight = TopK(2, softmax)(scores_NP, 3).weight
        assert weight is not None
        assert weight.tolist() == [[1.0, 0.0]]


def test_weights_that_are_all_zero_renormalise_to_zero() -> None:
    weight = TopK(2, renormalise=True)(torch.zeros(3, 4), 4).weight
    assert torch.equal(weight, torch.zeros(3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("softmax", "renormalise"), WEIGHTS)
def test_dtypes(dtype: torch.dtype, softmax: Softmax, renormalise: bool) -> None:
    # Numbers that every dtype holds exactly
    scores_NP = (torch.rand(20, 6).argsort(dim=1) + 1).to(dtype)
    decision = TopK(3, softmax, renormalise)(scores_NP, 6)
    choices, weights = top_k_of(scores_NP.tolist(), 3, softmax, renormalise)
    assert decision.choice_NK is not None
    assert decision.weight is not None
    assert decision.choice_NK.tolist() == choices
    picked = softmax is None and not renormalise
    assert decision.weight.dtype == (dtype if picked or dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(decision.weight.double(), torch.tensor(weights).double())


def test_arithmetic_is_float32_under_autocast() -> None:
    scores_NP = torch.rand(8, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        weight = TopK(2, "before", renormalise=True)(scores_NP, 4).weight
    torch.testing.assert_close(weight, TopK(2, "before", True)(scores_NP.float(), 4).weight)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("softmax", "renormalise"), WEIGHTS)
def test_weights_differentiate(k: int, softmax: Softmax, renormalise: bool) -> None:
    def weight(scores: Tensor) -> Tensor:
        made = TopK(k, softmax, renormalise)(scores, 4).weight
        assert made is not None
        return made

    scores_NP = torch.rand(5, 4, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(weight, scores_NP)


BAD_OPTIONS = {
    "k0": ({"k": 0}, "k must be an integer >= 1, got 0"),
    "k-float": ({"k": 2.0}, "k must be an integer >= 1, got 2.0"),
    "softmax": ({"k": 1, "softmax": "both"}, "softmax must be None, 'before' or 'after'"),
    "twice": ({"k": 1, "softmax": "after", "renormalise": True}, "leave out renormalise"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        TopK(**options)  # type: ignore[arg-type]


def test_more_paths_than_there_are_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="to take k=5 paths, but there are 4; lower k or raise"):
        TopK(5)(torch.rand(3, 4), 4)


def test_negative_weights_do_not_renormalise() -> None:
    with pytest.raises(ProtocolError, match="needs scores that are not negative"):
        TopK(2, renormalise=True)(torch.tensor([[0.5, -0.1]]), 2)


# NoisyTopK


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize(("n", "p"), SIZES)
@pytest.mark.parametrize("noise", [False, True])
def test_noisy_top_k_is_the_loop(n: int, p: int, noise: bool) -> None:
    scores = torch.randn(n, 2 * p)
    k = min(2, p)
    decision = NoisyTopK(k, noise, generator())(scores, p)
    normal = torch.randn(n, p, generator=generator()).tolist()
    seen = [
        [
            row[i] + (normal[j][i] * math.log1p(math.exp(row[p + i])) if noise else 0)
            for i in range(p)
        ]
        for j, row in enumerate(scores.tolist())
    ]
    choices, weights = top_k_of(seen, k, "after", renormalise=False)
    assert decision.choice_NK is not None
    assert decision.choice_NK.tolist() == choices
    torch.testing.assert_close(decision.weight, torch.tensor(weights).view(n, k))


def test_noisy_weights_differentiate_in_scores_and_noise_sizes() -> None:
    def weight(scores: Tensor) -> Tensor:
        made = NoisyTopK(2, generator=generator())(scores, 3).weight
        assert made is not None
        return made

    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight, scores)
    (gradient,) = torch.autograd.grad(weight(scores).square().sum(), scores)
    assert gradient[:, 3:].abs().sum() > 0


def test_noisy_top_k_without_noise_ignores_the_noise_sizes() -> None:
    protocol = NoisyTopK(2).without_noise()
    assert not protocol.stochastic
    scores = torch.randn(6, 8)
    quiet, plain = protocol(scores, 4), TopK(2, "after")(scores[:, :4], 4)
    assert torch.equal(quiet.choice_NK, plain.choice_NK)
    torch.testing.assert_close(quiet.weight, plain.weight)


def test_noisy_top_k_needs_a_noise_size_for_each_path() -> None:
    with pytest.raises(ProtocolError, match=r"\(3, 4\) came for 4 paths; the last dim must be 8"):
        NoisyTopK(2)(torch.rand(3, 4), 4)
