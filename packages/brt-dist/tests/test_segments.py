"""Segments of rows in another sequence, copied by segments or by rows."""

from __future__ import annotations

import pytest
import torch

from brt_dist import segments
from brt_dist.segments import Reorder

CPU = torch.device("cpu")
CASES = {
    "few": ([3, 0, 2, 4], [2, 0, 3, 1]),
    "empty first": ([0, 2, 0, 3], [3, 2, 1, 0]),
    "in order": ([3, 2, 1], [0, 1, 2]),
    "in order but for an empty one": ([3, 0, 1], [1, 0, 2]),
    "nothing": ([0, 0], [1, 0]),
}


@pytest.mark.parametrize("longest", [1, 10**9])
@pytest.mark.parametrize("case", CASES)
def test_moves_segments(case: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LONG", longest)
    sizes, sequence = CASES[case]
    rows = torch.arange(2.0 * sum(sizes)).view(-1, 2).double().requires_grad_()
    parts = rows.split(sizes)
    wanted = torch.cat([parts[s] for s in sequence])
    reorder = Reorder.of(torch.tensor(sizes), torch.tensor(sequence), CPU)
    assert torch.equal(reorder.apply(rows), wanted)
    assert torch.equal(reorder.undo(reorder.apply(rows)), rows)
    scale = torch.rand_like(rows)
    (reorder.apply(rows) * scale).sum().backward()
    assert torch.equal(reorder.undo(scale), rows.grad)
    assert (reorder.sizes_S is None) == (not case.startswith(("few", "empty")))


def test_transposes() -> None:
    sizes_AB = torch.tensor([[1, 2], [0, 3]])
    rows = torch.tensor([1, 2, 2, 4, 4, 4])  # named by their segments
    moved = Reorder.transposing(sizes_AB, CPU).apply(rows)
    assert moved.tolist() == [1, 2, 2, 4, 4, 4]
    sizes_AB = torch.tensor([[1, 2], [2, 0]])
    moved = Reorder.transposing(sizes_AB, CPU).apply(torch.tensor([1, 2, 2, 3, 3]))
    assert moved.tolist() == [1, 3, 3, 2, 2]
