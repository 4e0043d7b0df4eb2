"""`brt.ops.compact` against a loop."""

from __future__ import annotations

import pytest
import torch
from core_cases import NUM_CELLS
from torch import Tensor

import brt
from brt import ops


def keeps(num_cells: int, how: str) -> Tensor:
    made = torch.Generator().manual_seed(num_cells)
    fraction = {"none": 0.0, "few": 0.02, "half": 0.5, "all": 1.1}[how]
    return torch.rand(num_cells, generator=made) < fraction


@pytest.mark.parametrize("how", ["none", "few", "half", "all"])
@pytest.mark.parametrize("num_cells", NUM_CELLS)
def test_sizes(num_cells: int, how: str, device: torch.device) -> None:
    keep = keeps(num_cells, how)
    kept = [n for n, yes in enumerate(keep.tolist()) if yes]
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        index, count = ops.compact(keep.to(device, dtype))
        assert index.dtype == count.dtype == torch.int64
        assert index.tolist() == kept + [-1] * (num_cells - len(kept)), f"{num_cells=} {dtype}"
        assert count.tolist() == [len(kept)]


def test_other_layouts_and_aliases(device: torch.device) -> None:
    keep = keeps(40, "half").to(device)
    first, second = ops.compact(keep), ops.compact(keep.repeat_interleave(2)[::2])
    assert torch.equal(first[0], second[0])
    assert len({t.untyped_storage().data_ptr() for t in (*first, *second)}) == 4


@pytest.mark.parametrize("num_cells", [0, 1, 9])
def test_opcheck(num_cells: int, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.brt.compact, (keeps(num_cells, "half").to(device),))


def test_compiles(device: torch.device) -> None:
    compiled = torch.compile(ops.compact, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_cells in (5, 9, 0):
        keep = keeps(num_cells, "half").to(device)
        for came, wanted in zip(compiled(keep), ops.compact(keep), strict=True):
            assert torch.equal(came, wanted)


def test_bad_arguments() -> None:
    with pytest.raises(brt.RouteError, match=r"keep must be bool \[N\], got torch.float32\[3\]"):
        ops.compact(torch.zeros(3))
    with pytest.raises(brt.RouteError, match=r"torch.bool\[3, 1\]"):
        ops.compact(torch.zeros(3, 1, dtype=torch.bool))
