"""batch-exits: what goes on is moved, what nobody reaches does not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exit_models import ConvExits, check_everywhere, check_gradients, conv_exits, images
from torch import Tensor, nn

import brt
from brt.passes import BatchExits
from brt.passes.batch_exits import ExitGather, ExitScatter
from brt.protocols import BinaryThreshold, Threshold, TopK
from brt.testing import check_pass


def optimised(model: nn.Module, *, sample: Tensor | None = None, others: Any = ()) -> Any:
    passes = [*others, BatchExits()]
    return brt.optimize(model, passes=passes, sample=sample, measure=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_original_everywhere(dtype: torch.dtype) -> None:
    model = conv_exits(dtype)
    check_everywhere(optimised(model, sample=images(5, 1, dtype)), model, dtype)


def test_keeps_the_rules_of_passes() -> None:
    check_pass(BatchExits(), conv_exits(), [(images(5),), (images(1),)])


def test_gradients() -> None:
    model = conv_exits()
    check_gradients(optimised(model), model)


def test_stages_that_nobody_reaches_do_not_run() -> None:
    model = conv_exits()
    fast = optimised(model, sample=images(4))
    ran: list[tuple[int, int]] = []
    for i, stage in enumerate(fast.stages):
        stage.down.register_forward_hook(lambda m, args, out, i=i: ran.append((i, len(out))))
    x = images(32)
    with torch.no_grad():
        fast(x)
        assert [i for i, _ in ran] == [0, 1, 2]
        assert 32 == ran[0][1] > ran[1][1] > ran[2][1] > 0
        fast.exits[0].protocol = BinaryThreshold(0.0)
        fast(x)  # it learns what the stages give for no rows
        ran.clear()
        out = fast(x)
    assert ran == [(0, 32)]
    with torch.no_grad():
        model.exits[0].protocol = BinaryThreshold(0.0)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_moves_only_what_is_read_and_lends_what_all_take() -> None:
    model = conv_exits()
    fast = optimised(model, sample=images(4))
    exits = [m for m in fast.inserted.values() if isinstance(m, ExitScatter)]
    assert [m.reads for m in exits] == [((2,), (0, 1))] * 2
    flows = (torch.randn(3, 2), torch.randn(3, 4), torch.randn(3, 3))
    with torch.no_grad():
        exits[0].router.protocol = BinaryThreshold(2.0)
        (left, stay), route = exits[0](flows, flows[2])
    assert route.sizes == (0, 3)
    assert left[2].shape == (0, 3)
    assert left[:2] == (None, None)
    assert stay[0] is flows[0]
    assert stay[2] is None


def test_rows_that_are_written_to_are_copied() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter, self.gather = brt.ScatterRouter(TopK(1), 2), brt.GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            (a, b), route = self.scatter(x, x)
            out = self.gather([a.relu_(), b * 2], [route[0], route[1]])
            return out + x

    model = Writes().eval()
    fast, x = optimised(model), torch.tensor([[1.0, -3.0], [2.0, -1.0]])
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_with_other_passes_on_channels_last_features() -> None:
    model = conv_exits()
    fast = optimised(model, sample=images(8), others=["defer-operations", "fuse-vertical"])
    check_everywhere(fast, model, torch.float32)
    check_gradients(fast, model)


@pytest.mark.slow
def test_compiled() -> None:
    model = conv_exits()
    fast = optimised(model, sample=images(8), others=["defer-operations", "fuse-vertical"])
    compiled = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(6)), model(images(6)), rtol=1e-4, atol=1e-5)


def test_unions_are_skipped_without_rows() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter = brt.ScatterRouter(TopK(1), 3)
            self.union, self.gather = brt.GatherRouter(result="union"), brt.GatherRouter()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            (a, b, c), route = self.scatter(x, x)
            rows, cells = self.union([a, b], [route[0], route[1]])
            return self.gather([self.linear(rows).tanh(), c], [cells, route[2]])

    model = Cell().eval()
    fast, ran = optimised(model), []
    fast.linear.register_forward_hook(lambda m, args, out: ran.append(len(out)))
    x = torch.tensor([[0.0, 0.0, 9.0], [0.0, 1.0, 2.0]])
    with torch.no_grad():
        fast(x)
        ran.clear()
        torch.testing.assert_close(fast(x), model(x))
        assert ran == []
        torch.testing.assert_close(fast(-x), model(-x))
        assert ran == [2]


def test_a_single_cell_is_added_up() -> None:
    class Merge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter = brt.ScatterRouter(Threshold(0.0), 3)
            self.union, self.gather = brt.GatherRouter(result="union"), brt.GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            (a, b, c), route = self.scatter(x, x)
            rows, cells = self.union([a * 2, b.tanh()], [route[0], route[1]])
            return self.gather([rows + 1, c], [cells, route[2]])

    model = Merge().eval()
    fast = optimised(model)
    assert sum(isinstance(m, ExitGather) for m in fast.inserted.values()) == 2
    with torch.no_grad():
        for scores in ((1.0, 2.0, 3.0), (1.0, -1.0, -1.0), (-1.0, -1.0, 2.0), (-1.0, -1.0, -1.0)):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.tensor([scores], dtype=dtype)
                torch.testing.assert_close(fast(x), model(x))
        x = torch.randn(6, 3)
        torch.testing.assert_close(fast(x), model(x))


def test_refusals() -> None:
    with pytest.warns(brt.PluginWarning, match="refused every region: the model is in training"):
        optimised(ConvExits().train(), sample=images(4))


def test_a_gather_of_all_paths_is_no_exit() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scatter, self.gather = brt.ScatterRouter(TopK(1), 2), brt.GatherRouter()

        def forward(self, x: Tensor) -> Tensor:
            paths, route = self.scatter(x, x)
            return self.gather([paths[0] * 2, paths[1].tanh()], route)

    (record,) = optimised(Experts().eval()).report.regions[0].records
    assert not record.changed
