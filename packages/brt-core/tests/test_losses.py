"""The auxiliary losses against loops, and where their values are known.

N cells, P paths, K choices of a cell, G groups of S cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.losses import importance, load_balance, router_z_loss
from brt.protocols import CapacityTopK, ExpertChoice, TopK


def load_balance_of(choices: list[list[int]], probs: list[list[float]], num_paths: int) -> float:
    """P * sum of f * m over one group, by loops."""
    taken = [path for row in choices for path in row if path >= 0]
    total = 0.0
    for p in range(num_paths):
        share = taken.count(p) / len(taken) if taken else 0.0
        total += share * math.fsum(row[p] for row in probs) / max(len(probs), 1)
    return num_paths * total


@pytest.mark.parametrize(("n", "p", "k"), [(1, 1, 1), (1, 4, 2), (17, 5, 1), (17, 5, 3)])
@pytest.mark.parametrize("first", [False, True])
def test_load_balance_is_the_loop(n: int, p: int, k: int, first: bool) -> None:
    probs_NP = torch.randn(n, p).softmax(-1)
    decision = TopK(k)(probs_NP, p)
    assert decision.choice_NK is not None
    choices = decision.choice_NK[:, : 1 if first else k].tolist()
    loss = load_balance(decision, probs_NP, first_choice_only=first)
    assert loss.item() == pytest.approx(load_balance_of(choices, probs_NP.tolist(), p), rel=1e-5)


def test_load_balance_of_groups_is_the_mean_of_theirs() -> None:
    probs_GSP = torch.randn(3, 4, 5).softmax(-1)
    decision = CapacityTopK(2)(probs_GSP, 5)
    assert decision.choice_NK is not None
    choices = decision.choice_NK.view(3, 4, 2).tolist()
    expected = sum(load_balance_of(choices[g], probs_GSP[g].tolist(), 5) for g in range(3)) / 3
    assert load_balance(decision, probs_GSP).item() == pytest.approx(expected, rel=1e-5)
    flat = load_balance(decision, probs_GSP.flatten(0, 1), group_size=4)
    assert flat.item() == pytest.approx(expected, rel=1e-5)
    assert load_balance(decision, probs_GSP.flatten(0, 1)).item() != pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_routing_is_one(k: int) -> None:
    choice_NK = (torch.arange(8).unsqueeze(1) + torch.arange(k)) % 4
    even = Decision(4, choice_NK=choice_NK)
    assert load_balance(even, torch.full((8, 4), 0.25)).item() == pytest.approx(1.0)
    assert load_balance(even, torch.randn(8, 4).softmax(-1)).item() == pytest.approx(1.0)
    assert load_balance(
        ExpertChoice()(torch.rand(8, 4), 4), torch.rand(8, 4).softmax(-1)
    ).item() == (pytest.approx(1.0))


def test_all_on_one_path_is_the_number_of_paths() -> None:
    probs_NP = torch.tensor([[0.0, 1.0, 0.0]]).repeat(6, 1)
    assert load_balance(TopK(1)(probs_NP, 3), probs_NP).item() == pytest.approx(3.0)


def test_nothing_routed_is_zero() -> None:
    none = Decision(3, choice_NK=torch.full((4, 1), -1))
    assert load_balance(none, torch.rand(4, 3)).item() == 0
    empty = Decision(3, choice_NK=torch.zeros(0, 1, dtype=torch.int64))
    assert load_balance(empty, torch.rand(0, 3)).item() == 0
    assert importance(empty).item() == 0
    assert router_z_loss(torch.rand(0, 3)).item() == 0


def test_load_balance_takes_a_route() -> None:
    @dataclass(frozen=True)
    class Route:
        carried_out: Decision

        def decision(self) -> Decision:
            return self.carried_out

    probs_NP = torch.randn(6, 3).softmax(-1)
    dropped = Decision(3, choice_NK=torch.tensor([[0], [1], [-1], [-1], [2], [0]])).to_mask()
    expected = load_balance_of([[0], [1], [], [], [2], [0]], probs_NP.tolist(), 3)
    assert load_balance(Route(dropped), probs_NP).item() == pytest.approx(expected, rel=1e-5)


def importance_of(gates: list[list[float]], num_paths: int) -> float:
    sums = [math.fsum(row[p] for row in gates) for p in range(num_paths)]
    mean = math.fsum(sums) / num_paths
    return math.fsum((s - mean) ** 2 for s in sums) / num_paths / mean**2


@pytest.mark.parametrize(("n", "p", "k"), [(1, 1, 1), (1, 4, 2), (17, 5, 1), (17, 5, 3)])
def test_importance_is_the_loop(n: int, p: int, k: int) -> None:
    decision = TopK(k, "before")(torch.randn(n, p), p)
    dense_NP = decision.to_mask().weight
    assert dense_NP is not None
    expected = pytest.approx(importance_of(dense_NP.tolist(), p), rel=1e-5, abs=1e-9)
    assert importance(decision).item() == expected
    assert importance(dense_NP).item() == expected


def test_importance_ignores_the_weights_of_paths_not_taken() -> None:
    mask_NP = torch.tensor([[True, False], [False, True]])
    decision = Decision(2, mask_NP=mask_NP, weight=torch.tensor([[1.0, 5.0], [-7.0, 1.0]]))
    assert importance(decision).item() == 0


def test_importance_where_it_is_known() -> None:
    assert importance(torch.full((6, 4), 0.25)).item() == 0
    assert importance(torch.tensor([[0.0, 2.0, 0.0]]).repeat(6, 1)).item() == pytest.approx(2.0)
    assert importance(Decision(2, choice_NK=torch.tensor([[0], [0], [0]]))).item() == 1


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 5, 3)], ids=str)
def test_router_z_loss_is_the_loop(shape: tuple[int, ...]) -> None:
    scores = 3 * torch.randn(shape)
    rows = scores.flatten(0, -2).tolist()
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in rows) / len(rows)
    assert router_z_loss(scores).item() == pytest.approx(expected, rel=1e-5)


def test_router_z_loss_where_it_is_known() -> None:
    assert router_z_loss(torch.zeros(5, 8)).item() == pytest.approx(math.log(8) ** 2)
    assert router_z_loss(torch.full((2, 4), 300.0)).item() == pytest.approx(
        (300 + math.log(4)) ** 2
    )


def test_losses_differentiate() -> None:
    scores = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    protocol = TopK(2, "before")

    def losses(scores: Tensor) -> tuple[Tensor, ...]:
        decision = protocol(scores, 3)
        return (
            load_balance(decision, scores.softmax(-1)),
            importance(decision),
            router_z_loss(scores),
        )

    assert torch.autograd.gradcheck(losses, scores)


def test_losses_are_float32() -> None:
    scores = torch.randn(64, 4).half()
    decision = TopK(2, "before")(scores, 4)
    for loss in (
        load_balance(decision, scores.softmax(-1)),
        importance(scores.softmax(-1)),
        router_z_loss(scores),
    ):
        assert loss.dtype == torch.float32
        assert loss.shape == ()


def test_losses_compile() -> None:
    protocol = CapacityTopK(2, softmax="before")

    def losses(scores: Tensor) -> Tensor:
        decision = protocol(scores, 3)
        balance = load_balance(decision, scores.softmax(-1), first_choice_only=True)
        return balance + importance(decision) + router_z_loss(scores)

    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    for num_cells in (4, 7, 9):
        scores = torch.randn(2, num_cells, 3)
        torch.testing.assert_close(compiled(scores), losses(scores))


CHOICE = Decision(3, choice_NK=torch.zeros(4, 1, dtype=torch.int64))
BAD = {
    "cells": (lambda: load_balance(CHOICE, torch.rand(5, 3)), "about 4 cells .* about 5 and 3"),
    "paths": (lambda: load_balance(CHOICE, torch.rand(4, 2)), "4 cells and 3 paths, .* 4 and 2"),
    "rank": (lambda: load_balance(CHOICE, torch.rand(4)), r"\[N, P\] or \[G, S, P\], got"),
    "int": (lambda: load_balance(CHOICE, torch.ones(4, 3).long()), "must be floats .* torch.int64"),
    "device": (
        lambda: load_balance(CHOICE, torch.rand(4, 3, device="meta")),
        "the decision is on cpu, the probabilities on meta",
    ),
    "groups": (lambda: load_balance(CHOICE, torch.rand(4, 3), group_size=3), "not groups of"),
    "first": (
        lambda: load_balance(CHOICE.to_mask(), torch.rand(4, 3), first_choice_only=True),
        "first_choice_only needs a decision with choice_NK",
    ),
    "gates": (lambda: importance(torch.rand(4)), r"importance: gates must be .* shape \(4,\)"),
    "logits": (lambda: router_z_loss(torch.ones(4, 3).int()), "router_z_loss: .* got torch.int32"),
    "logits-rank": (lambda: router_z_loss(torch.ones(4)), r"of shape \(4,\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call()
