"""The workload of loads that are no longer those of the plan."""

from __future__ import annotations

import pytest
import torch

from brt.errors import BrtError
from brt_models.workloads.drift import DRIFTED, PLANNED, drift

CPU = torch.device("cpu")


def test_loads_drift_and_every_row_is_right() -> None:
    workload = drift(CPU, torch.float32, num_paths=4, num_blocks=1, channels=4)
    (x_NCHW, label_N), assert_is = workload.sets[0], torch.testing.assert_close
    assert label_N.bincount().tolist() == [DRIFTED] * 4
    assert workload.reference is not None
    wanted = workload.reference(x_NCHW, label_N)
    with torch.no_grad():
        for variant in workload.variants:
            out = variant.make()(x_NCHW, label_N)
            if variant.kind == "part":
                assert len(out) == 2 * sum(PLANNED)
            else:
                assert_is(out.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_share_of_drifted_branches() -> None:
    workload = drift(CPU, torch.float32, num_paths=4, num_blocks=1, channels=4, drifted=0.25)
    assert workload.sets[0][1].bincount().tolist() == [DRIFTED, 27, 4, 27]
    assert workload.options["drifted"] == 0.25
    with pytest.raises(BrtError, match="drifted must be from 0 to 1, got 2"):
        drift(CPU, torch.float32, drifted=2.0)
