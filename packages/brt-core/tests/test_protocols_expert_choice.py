"""ExpertChoice against loops.

N cells, P paths, C cells of a path, G groups of S cells.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from brt.errors import ProtocolError
from brt.protocols import ExpertChoice

SHAPES = [(0, 3), (1, 2), (1, 4), (13, 5), (3, 6, 4), (2, 1, 3), (4, 0, 2), (0, 5, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.25, 2.0])
def test_expert_choice_is_the_loop(shape: tuple[int, ...], factor: float) -> None:
    scores, num_paths = torch.randn(shape), shape[-1]
    decision = ExpertChoice(factor)(scores, num_paths)
    groups = (scores if len(shape) == 3 else scores.unsqueeze(0)).tolist()
    num_taken = math.ceil(Fraction(str(factor)) * shape[-2] / num_paths)
    cells: list[list[int]] = [[] for _ in range(num_paths)]
    weights: list[list[float]] = [[] for _ in range(num_paths)]
    for g, group in enumerate(groups):
        for p in range(num_paths):
            best = sorted(range(len(group)), key=lambda s: -group[s][p])[:num_taken]
            cells[p] += [g * len(group) + s for s in best]
            weights[p] += [group[s][p] for s in best]
    assert decision.cell_PC is not None
    assert decision.cell_PC.tolist() == cells
    assert decision.weight is not None
    assert decision.weight.tolist() == weights
    assert decision.num_cells == scores[..., 0].numel()
    assert decision.capacity is None


def test_all_loads_are_equal_and_no_path_names_a_cell_twice() -> None:
    decision = ExpertChoice(2.0)(torch.zeros(3, 10, 4), 4)
    assert decision.cell_PC is not None
    for row in decision.cell_PC.tolist():
        assert len(set(row)) == len(row) == 3 * 5


def test_every_path_takes_every_cell_at_most() -> None:
    mask_NP = ExpertChoice(4.0)(torch.rand(7, 4), 4).to_mask().mask_NP
    assert mask_NP is not None
    assert mask_NP.all()


def test_the_softmax_is_over_the_paths() -> None:
    scores_NP = torch.randn(9, 3)
    made = ExpertChoice(1.0, "before")(scores_NP, 3)
    given = ExpertChoice(1.0)(scores_NP.softmax(-1), 3)
    assert torch.equal(made.cell_PC, given.cell_PC)
    torch.testing.assert_close(made.weight, given.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    scores_NP = torch.randn(9, 3).to(dtype)
    assert ExpertChoice()(scores_NP, 3).weight.dtype == dtype
    made = ExpertChoice(softmax="before")(scores_NP, 3)
    torch.testing.assert_close(
        made.weight, ExpertChoice(2.0, "before")(scores_NP.float(), 3).weight
    )


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3)], ids=str)
def test_weights_differentiate(shape: tuple[int, ...]) -> None:
    def weight(scores: Tensor) -> Tensor:
        made = ExpertChoice(1.5, "before")(scores, 3).weight
        assert made is not None
        return made

    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight, scores)


BAD = {
    "factor": (lambda: ExpertChoice(0.0), "capacity_factor must be a finite number > 0"),
    "none": (lambda: ExpertChoice(None), "capacity_factor must be a number, got None"),
    "softmax": (lambda: ExpertChoice(softmax="after"), "must be None or 'before', got 'after'"),
    "more": (
        lambda: ExpertChoice(3.0)(torch.rand(5, 2), 2),
        "capacity_factor=3.0 each of 2 paths is to take more cells than there are; at most 2",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call()
