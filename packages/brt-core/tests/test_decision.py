"""Decision: its checks, its conversions against loops, and its life in graphs.

N cells, P paths, K choices of a cell, C cells of a path.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from brt.decision import Decision
from brt.errors import ProtocolError

CHOICE = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1]])
MASK = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
CELL = torch.tensor([[0, -1], [1, 3], [3, 0]])

FORMS: dict[str, Decision] = {
    "choice": Decision(3, choice_NK=CHOICE),
    "mask": Decision(3, mask_NP=MASK),
    "cell": Decision(3, cell_PC=CELL, num_cells=4),
    "choice-weighted": Decision(3, choice_NK=CHOICE, weight=torch.rand(4, 2)),
    "mask-weighted": Decision(3, mask_NP=MASK, weight=torch.rand(4, 3)),
    "cell-weighted": Decision(3, cell_PC=CELL, weight=torch.rand(3, 2), num_cells=4),
    "no-cells": Decision(
        3, choice_NK=torch.zeros(0, 2, dtype=torch.int64), weight=torch.rand(0, 2)
    ),
    "no-cells-mask": Decision(3, mask_NP=torch.zeros(0, 3, dtype=torch.bool)),
    "no-cells-taken": Decision(2, cell_PC=torch.zeros(2, 0, dtype=torch.int64), num_cells=3),
    "no-choices": Decision(2, choice_NK=torch.zeros(3, 0, dtype=torch.int64)),
    "one-path": Decision(1, choice_NK=torch.tensor([[0], [-1]]), weight=torch.rand(2, 1)),
}

each_form = pytest.mark.parametrize("decision", FORMS.values(), ids=FORMS.keys())


def weight_of_pair(decision: Decision) -> dict[tuple[int, int], float]:
    """(cell, path) -> weight, by loops."""
    form = "choice" if decision.choice_NK is not None else "mask"
    form = "cell" if decision.cell_PC is not None else form
    named = {"choice": decision.choice_NK, "mask": decision.mask_NP, "cell": decision.cell_PC}[form]
    pairs: dict[tuple[int, int], float] = {}
    for i, row in enumerate(named.tolist()):
        for j, entry in enumerate(row):
            if entry is False or (form != "mask" and entry == -1):
                continue
            pair = {"choice": (i, entry), "mask": (i, j), "cell": (entry, i)}[form]
            assert pair not in pairs
            pairs[pair] = 1.0 if decision.weight is None else decision.weight[i, j].item()
    return pairs


@each_form
@pytest.mark.parametrize("convert", [Decision.to_mask, Decision.to_choice], ids=["mask", "choice"])
def test_conversions_keep_every_pair(
    decision: Decision, convert: Callable[[Decision], Decision]
) -> None:
    converted = convert(decision)
    assert weight_of_pair(converted) == weight_of_pair(decision)
    assert (converted.num_cells, converted.num_paths) == (decision.num_cells, decision.num_paths)
    assert (converted.weight is None) == (decision.weight is None)


@each_form
def test_conversions_round_trip(decision: Decision) -> None:
    mask = decision.to_mask()
    again = mask.to_choice().to_mask()
    assert mask.mask_NP is not None
    assert again.mask_NP is not None
    assert torch.equal(mask.mask_NP, again.mask_NP)


def test_a_form_converts_to_itself() -> None:
    mask, choice = FORMS["mask"], FORMS["choice"]
    assert mask.to_mask() is mask
    assert choice.to_choice() is choice


def test_mask_weights_are_zero_where_the_mask_is_false() -> None:
    mask = FORMS["choice-weighted"].to_mask()
    assert mask.weight is not None
    assert mask.mask_NP is not None
    assert (mask.weight[~mask.mask_NP] == 0).all()


def test_conversions_keep_what_is_declared() -> None:
    priority_N = torch.rand(4)
    decision = Decision(
        3, choice_NK=CHOICE, capacity=(1, 2, 3), priority_N=priority_N, group_size=2
    )
    for converted in (decision.to_mask(), decision.to_mask().to_choice()):
        assert converted.capacity == (1, 2, 3)
        assert converted.priority_N is priority_N
        assert converted.group_size == 2


@pytest.mark.parametrize("form", ["choice", "cell"])
def test_conversions_differentiate(form: str) -> None:
    decision = FORMS[form]
    shape = (CHOICE if form == "choice" else CELL).shape

    def mask_weight(weight: Tensor) -> Tensor:
        made = dataclasses.replace(decision, weight=weight).to_mask().weight
        assert made is not None
        return made

    weight = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mask_weight, weight)


def test_num_cells_is_read_off_the_tensor() -> None:
    assert FORMS["choice"].num_cells == 4
    assert FORMS["mask"].num_cells == 4
    assert FORMS["cell"].num_cells == 4


BAD: dict[str, tuple[dict[str, object], str]] = {
    "none": ({}, "exactly one of choice_NK, mask_NP and cell_PC, got 0"),
    "two": ({"choice_NK": CHOICE, "mask_NP": MASK}, "exactly one .* got 2"),
    "int32": ({"choice_NK": CHOICE.int()}, r"choice_NK must be torch.int64 \[N, K\], got .*int32"),
    "rank": ({"choice_NK": CHOICE[0]}, r"choice_NK must be .* got .* of shape \(2,\)"),
    "int-mask": ({"mask_NP": MASK.long()}, "mask_NP must be torch.bool"),
    "mask-paths": ({"mask_NP": MASK[:, :2]}, r"num_paths=3, .* shape \(4, 2\) has 2"),
    "cell-paths": ({"cell_PC": CELL[:2], "num_cells": 4}, r"num_paths=3, .* has 2"),
    "cell-alone": ({"cell_PC": CELL}, "needs num_cells"),
    "weight-shape": (
        {"choice_NK": CHOICE, "weight": torch.rand(4, 3)},
        r"weight must be floats of shape \(4, 2\), .* of shape \(4, 3\)",
    ),
    "weight-dtype": (
        {"choice_NK": CHOICE, "weight": CHOICE},
        "weight must be floats of .* got torch.int64",
    ),
    "weight-device": (
        {"choice_NK": CHOICE, "weight": torch.rand(4, 2, device="meta")},
        "weight is on meta, but the choices are on cpu",
    ),
    "priority-shape": (
        {"choice_NK": CHOICE, "priority_N": torch.rand(3)},
        r"priority_N must be one number for each of 4 cells, got shape \(3,\)",
    ),
    "priority-device": (
        {"choice_NK": CHOICE, "priority_N": torch.rand(4, device="meta")},
        "priority_N is on meta",
    ),
    "capacity": ({"choice_NK": CHOICE, "capacity": (1, 2)}, "capacity has 2 entries for 3 paths"),
    "group": ({"choice_NK": CHOICE, "group_size": 0}, "group_size must be at least 1, got 0"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD.keys())
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Decision(3, **fields)  # type: ignore[arg-type]


def test_copies_and_tree_utilities_take_it() -> None:
    decision = FORMS["choice-weighted"]
    assert weight_of_pair(copy.deepcopy(decision)) == weight_of_pair(decision)
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone(), decision)
    assert isinstance(moved, Decision)
    assert weight_of_pair(moved) == weight_of_pair(decision)
    assert torch.utils._pytree.tree_map(lambda _: None, decision.num_paths) is None


class _Decides(nn.Module):
    """Makes a decision with everything in it that a model may return."""

    def forward(self, scores: Tensor) -> tuple[Decision, Decision]:
        weight_NK, choice_NK = scores.topk(2)
        decision = Decision(
            scores.shape[1],
            choice_NK=choice_NK,
            weight=weight_NK,
            capacity=scores.shape[0] // 2,
            priority_N=weight_NK[:, 0],
            group_size=3,
        )
        return decision, decision.to_mask()


def _check_same(got: tuple[Decision, Decision], scores: Tensor) -> None:
    expected = _Decides()(scores)
    for a, b in zip(got, expected, strict=True):
        assert weight_of_pair(a) == weight_of_pair(b)
        assert (a.num_cells, a.num_paths) == (b.num_cells, b.num_paths)
        assert (a.capacity, a.group_size) == (b.capacity, b.group_size)


def test_a_compiled_model_returns_it() -> None:
    compiled = torch.compile(_Decides(), fullgraph=True, backend="aot_eager")
    for num_cells in (6, 9, 12):
        scores = torch.rand(num_cells, 4)
        _check_same(compiled(scores), scores)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_model_returns_it(strict: bool) -> None:
    shapes = ({0: torch.export.Dim("N")},)
    exported = torch.export.export(
        _Decides(), (torch.rand(6, 4),), dynamic_shapes=shapes, strict=strict
    )
    scores = torch.rand(9, 4)
    _check_same(exported.module()(scores), scores)


@pytest.mark.parametrize("form", ["choice", "mask", "cell"])
def test_an_exported_model_takes_it(form: str) -> None:
    decision = dataclasses.replace(
        FORMS[f"{form}-weighted"], capacity=(1, 2, 3), priority_N=torch.rand(4), group_size=2
    )

    class Takes(nn.Module):
        def forward(self, decision: Decision) -> Tensor:
            mask = decision.to_mask().weight
            assert mask is not None
            return mask

    exported = torch.export.export(Takes(), (decision,))
    assert torch.equal(exported.module()(decision), Takes()(decision))
