"""Threshold, ResidualThreshold and BinaryThreshold against loops.

N cells, P paths, C classes.
"""

from __future__ import annotations

import math

import pytest
import torch

from brt.errors import ProtocolError
from brt.protocols import BinaryThreshold, ResidualThreshold, Threshold
from brt.protocols.threshold import Confidence

SIZES = [(0, 3), (1, 1), (1, 4), (40, 2), (33, 7)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(("n", "p"), SIZES)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 9.0])
@pytest.mark.parametrize("residual", [False, True])
def test_threshold_is_the_loop(n: int, p: int, threshold: float, residual: bool) -> None:
    scores_NP = torch.randn(n, p)
    path = p - 1 if residual else None
    decision = Threshold(threshold, path)(scores_NP, p)
    expected = []
    for row in scores_NP.tolist():
        mask = [score > threshold for score in row]
        if residual and not any(mask):
            mask[p - 1] = True
        expected.append(mask)
    assert decision.mask_NP is not None
    assert decision.mask_NP.tolist() == expected
    assert decision.weight is scores_NP


def test_threshold_is_strict() -> None:
    mask_NP = Threshold(0.5)(torch.tensor([[0.5, 0.75]]), 2).mask_NP
    assert mask_NP is not None
    assert mask_NP.tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_threshold_is_not_rounded_to_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    # 0.3 is a little above its neighbour in half precision, or a little below
    scores_NP = torch.tensor([[0.3]], dtype=dtype)
    assert Threshold(0.3)(scores_NP, 1).mask_NP.item() == (scores_NP.item() > 0.3)
    up = torch.nextafter(scores_NP, torch.ones_like(scores_NP))
    for score in (scores_NP, up):
        hit = BinaryThreshold(0.3, selected_path=1, confidence="score")(score, 2).choice_NK
        assert hit.item() == int(score.item() >= 0.3)


@pytest.mark.parametrize("residual_path", [0, 1])
@pytest.mark.parametrize(("n", "c"), SIZES)
@pytest.mark.parametrize("threshold", [-9.0, 0.0, 0.8])
def test_residual_threshold_is_the_loop(
    n: int, c: int, threshold: float, residual_path: int
) -> None:
    scores_NC = torch.randn(n, c)
    decision = ResidualThreshold(threshold, residual_path)(scores_NC, 2)
    expected = [
        [residual_path if math.fsum(row) < threshold else 1 - residual_path]
        for row in scores_NC.tolist()
    ]
    assert decision.choice_NK is not None
    assert decision.choice_NK.tolist() == expected
    assert decision.weight is None


def test_a_sum_at_the_threshold_is_not_low() -> None:
    scores_NC = torch.tensor([[0.25, 0.25], [0.25, 0.125]])
    assert ResidualThreshold(0.5, residual_path=1)(scores_NC, 2).choice_NK.tolist() == [[0], [1]]


def confident(row: list[float], confidence: Confidence, threshold: float) -> bool:
    if confidence == "score":
        return row[0] >= threshold
    exps = [math.exp(x - max(row)) for x in row]
    probs = [x / sum(exps) for x in exps]
    if confidence == "max-softmax":
        return max(probs) >= threshold
    return -math.fsum(p * math.log(p) for p in probs if p > 0) < threshold


@pytest.mark.parametrize("selected_path", [0, 1])
@pytest.mark.parametrize("confidence", ["max-softmax", "entropy", "score"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "c"), [(0, 3), (1, 1), (64, 2), (64, 10)])
def test_binary_threshold_is_the_loop(
    n: int, c: int, dtype: torch.dtype, confidence: Confidence, selected_path: int
) -> None:
    scores_NC = (3 * torch.randn(n, 1 if confidence == "score" else c)).to(dtype)
    decision = BinaryThreshold(0.6, selected_path, confidence)(scores_NC, 2)
    expected = [
        [selected_path if confident(row, confidence, 0.6) else 1 - selected_path]
        for row in scores_NC.tolist()
    ]
    assert decision.choice_NK is not None
    assert decision.choice_NK.tolist() == expected
    assert decision.weight is None


def test_the_least_confidence_is_still_reached() -> None:
    logits_NC = torch.zeros(1, 2)
    assert BinaryThreshold(0.5)(logits_NC, 2).choice_NK.item() == 0
    assert BinaryThreshold(math.log(2), confidence="entropy")(logits_NC, 2).choice_NK.item() == 1


def test_a_class_ruled_out_has_no_entropy() -> None:
    logits_NC = torch.tensor([[0.0, -math.inf]])
    assert BinaryThreshold(1e-6, confidence="entropy")(logits_NC, 2).choice_NK.item() == 0


def test_decisions_between_two_hold_no_graph() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    for protocol in (ResidualThreshold(), BinaryThreshold(0.5)):
        assert not protocol(scores, 2).choice_NK.requires_grad


def test_threshold_weights_differentiate() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    decision = Threshold(0.0, residual_path=1)(scores, 4)
    (decision.weight * decision.mask_NP).sum().backward()
    assert torch.equal(scores.grad, decision.mask_NP.float())


BAD = {
    "three-paths": (lambda: BinaryThreshold(0.5)(torch.rand(2, 3), 3), "between 2 paths, .* is 3"),
    "residual-3": (lambda: ResidualThreshold()(torch.rand(2, 3), 3), "between 2 paths, .* is 3"),
    "no-class": (lambda: BinaryThreshold(0.5)(torch.rand(2, 0), 2), "at least one column"),
    "rank": (lambda: BinaryThreshold(0.5)(torch.rand(2), 2), r"must be \[N, C\] .* shape \(2,\)"),
    "scores": (
        lambda: BinaryThreshold(0.5, confidence="score")(torch.rand(2, 3), 2),
        r"one score a cell, \[N, 1\], got shape \(2, 3\)",
    ),
    "nan": (lambda: BinaryThreshold(0.5)(torch.full((2, 3), math.nan), 2), "6 of 6"),
    "nan-sum": (lambda: ResidualThreshold()(torch.full((2, 3), math.nan), 2), "hold NaN"),
    "threshold": (lambda: Threshold(math.nan), "threshold must be a number, got nan"),
    "text": (lambda: ResidualThreshold("0.5"), "threshold must be a number, got '0.5'"),
    "confidence": (lambda: BinaryThreshold(0.5, confidence="margin"), "got 'margin'"),
    "selected": (lambda: BinaryThreshold(0.5, 2), "selected_path must be 0 or 1, got 2"),
    "residual": (lambda: ResidualThreshold(0.5, -1), "residual_path must be 0 or 1, got -1"),
    "residual-path": (lambda: Threshold(0.5, -1), "residual_path must be an integer >= 0, got -1"),
    "residual-far": (lambda: Threshold(0.5, 4)(torch.rand(2, 3), 3), "=4 is none of 3 paths"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call()
