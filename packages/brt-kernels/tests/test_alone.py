"""The package by itself, as a torch user without brt would call it."""

from __future__ import annotations

import subprocess
import sys

import torch

from brt_kernels.ops import combine, compact, dispatch, route


def test_brt_is_not_imported() -> None:
    code = "import sys; from brt_kernels._load import load; load(); print('brt' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_cells_go_to_paths_and_back() -> None:
    choice_NK = torch.tensor([[0, 2], [2, -1], [0, 1]])
    cell_R, slot_R, row_NK, offsets_P1 = route.route(choice_NK, 3)
    assert cell_R.tolist() == [0, 2, 2, 0, 1, -1]
    assert slot_R.tolist() == [0, 4, 5, 1, 2, -1]
    assert row_NK.tolist() == [[0, 3], [4, -1], [1, 2]]
    assert offsets_P1.tolist() == [0, 2, 3, 5]
    x_ND = torch.arange(12.0).view(3, 4)
    rows_RD = dispatch.dispatch(x_ND, cell_R, row_NK)
    assert rows_RD[-1].tolist() == [0, 0, 0, 0]
    weight_R = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    out_ND = combine.combine(rows_RD, row_NK, cell_R, weight_R)
    assert torch.equal(out_ND, x_ND * torch.tensor([[5.0], [5.0], [5.0]]))


def test_cells_that_go_on() -> None:
    index_N, count_1 = compact.compact(torch.tensor([True, False, True]))
    assert index_N.tolist() == [0, 2, -1]
    assert count_1.tolist() == [2]
