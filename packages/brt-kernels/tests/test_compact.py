from __future__ import annotations

import pytest
import torch

from brt import reference
from brt_kernels.ops.compact import compact


@pytest.mark.parametrize("num_cells", [0, 1, 2, 31, 1023, 1024, 1025, 5000, 70000])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_equals_the_reference(num_cells: int, dtype: torch.dtype, device: torch.device) -> None:
    for share in (0.0, 0.5, 1.0):
        keep = (torch.rand(num_cells) < share).to(dtype)
        for a, b in zip(compact(keep.to(device)), reference.compact(keep), strict=True):
            assert torch.equal(a.cpu(), b)


def test_fake_agrees_with_the_schema() -> None:
    torch.library.opcheck(torch.ops.brt_kernels.compact.default, (torch.tensor([True, False]),))


def test_bad_input_is_an_exception() -> None:
    with pytest.raises(RuntimeError, match="1-D"):
        compact(torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="bool or integers"):
        compact(torch.zeros(2))
