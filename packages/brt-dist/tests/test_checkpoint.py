"""What W ranks save by torch.distributed.checkpoint, others go on from as one process would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoint_cases as cases
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor

import brt_dist

pytestmark = pytest.mark.dist


def close(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(state) == list(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("branches", 1, 3), ("branches", 3, 2), ("both", 2, 4), ("both", 4, 1)],
)
def test_other_ranks_go_on(
    name: str, before: int, after: int, ranks_of: Callable[[int], Ranks], tmp_path: Path
) -> None:
    ranks_of(before).run(cases.saves, name, str(tmp_path))
    wanted = cases.in_one_process(name, 3)
    for state in ranks_of(after).run(cases.goes_on, name, str(tmp_path)):
        close(state, wanted)


@pytest.mark.parametrize("name", cases.MODELS)
def test_one_process_goes_on(name: str, ranks_of: Callable[[int], Ranks], tmp_path: Path) -> None:
    ranks_of(3).run(cases.saves, name, str(tmp_path))
    model = cases.made(name, 1)
    optimizer = cases.optimizer_of(model, 7.0)
    with pytest.warns(UserWarning, match="single process"):
        dcp.load({"train": brt_dist.Checkpoint(model, optimizer)}, checkpoint_id=tmp_path)
    cases.train(model, optimizer, [2])
    close(model.state_dict(), cases.in_one_process(name, 3))


def test_ranks_go_on_from_one_process(ranks_of: Callable[[int], Ranks], tmp_path: Path) -> None:
    model = cases.made("both", 0)
    optimizer = cases.optimizer_of(model, 0.1)
    cases.train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"train": brt_dist.Checkpoint(model, optimizer)}, checkpoint_id=tmp_path)
    for state in ranks_of(2).run(cases.goes_on, "both", str(tmp_path)):
        close(state, cases.in_one_process("both", 3))


def test_what_cannot_be_saved_says_why(ranks_of: Callable[[int], Ranks]) -> None:
    for early, words, used in ranks_of(2).run(cases.wrong):
        assert "that is not the model's: make it after parallelize(Both)" in early
        assert "SGD keeps 'words' as str" in words
        assert "for torch.distributed.checkpoint only" in used
