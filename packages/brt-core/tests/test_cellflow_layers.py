"""Layers that are known give what following them operator by operator gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brt.cellflow import dry, layers
from brt.cellflow.dry import DryRun

IMAGES, TOKENS, SERIES = (4, 3, 9, 8), (4, 5, 6), (4, 6)

Case = tuple[nn.Module, tuple[int, ...]]

KNOWN: list[Case] = [
    (nn.Conv2d(3, 5, 3), IMAGES),
    (nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=3), IMAGES),
    (nn.Conv2d(3, 5, 1, bias=False, padding_mode="zeros"), IMAGES),
    (nn.Conv1d(5, 4, 3, padding=2), TOKENS),
    (nn.Conv3d(2, 3, 2), (4, 2, 4, 4, 4)),
    (nn.BatchNorm2d(3), IMAGES),
    (nn.BatchNorm1d(6), SERIES),
    (nn.BatchNorm1d(5, affine=False), TOKENS),
    (nn.LayerNorm(6), TOKENS),
    (nn.LayerNorm((5, 6)), TOKENS),
    (nn.Linear(6, 7), SERIES),
    (nn.Linear(6, 7, bias=False), TOKENS),
    (nn.Flatten(), IMAGES),
    (nn.MaxPool2d(2), IMAGES),
    (nn.MaxPool2d(3, 1, 1, 2), IMAGES),
    (nn.AvgPool2d((3, 2), (2, 1), (1, 0)), IMAGES),
    (nn.AdaptiveAvgPool2d(1), IMAGES),
    (nn.AdaptiveAvgPool2d((2, None)), IMAGES),
    (nn.Dropout(0.5), IMAGES),
    *((kind(), IMAGES) for kind in layers.ELEMENTWISE),
    (nn.ReLU(inplace=True), IMAGES),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), IMAGES),
    (nn.Sequential(), IMAGES),
]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, out: out.sum(0, keepdim=True))
    return layer


FOLLOWED: list[Case] = [
    (nn.Conv2d(3, 5, 3), IMAGES[1:]),  # one image: its rows are channels
    (nn.Conv2d(3, 5, 3, padding="same"), IMAGES),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), IMAGES),
    (nn.Conv2d(4, 5, 3), IMAGES),  # raises
    (nn.Conv2d(3, 5, 12), IMAGES),  # raises
    (nn.Conv2d(3, 5, 3).double(), IMAGES),  # raises
    (nn.BatchNorm2d(3).train(), IMAGES),
    (nn.BatchNorm2d(3, track_running_stats=False), IMAGES),
    (nn.Dropout(0.5).train(), IMAGES),
    (nn.Linear(4, 4), (4,)),
    (nn.LayerNorm(4), (4,)),
    (nn.LayerNorm((4, 6)), SERIES),
    (nn.Flatten(0), IMAGES),
    (nn.Flatten(2), IMAGES),
    (nn.MaxPool2d(2, ceil_mode=True), IMAGES),
    (nn.MaxPool2d(2, return_indices=True), IMAGES),
    (nn.Softmax(0), SERIES),
    (Doubled(6, 6), SERIES),
    (hooked(), SERIES),
    (nn.Sequential(nn.Linear(6, 6), nn.Softmax(0)), SERIES),
]


def named(case: Any) -> str:
    return str(case).replace("\n", "") if isinstance(case, nn.Module) else ""


def found(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The flow, and what the layer gives, in words."""
    run = DryRun()
    x = run.like(torch.empty(shape))
    with dry.quiet():
        flow, value = run.call(layer, (x,), {}, [x])
    if not isinstance(value, Tensor):
        return flow, type(value), run.fixed
    sizes = [(size if type(size) is int else str(size)) for size in value.shape]
    form = (sizes, value.stride()[1:], value.dtype, value.device, value.is_contiguous())
    return flow, form, run.fixed


@pytest.mark.parametrize(("layer", "shape"), KNOWN, ids=named)
def test_known_layers_are_as_if_followed(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer.eval()
    run = DryRun()
    assert layers.shape_of(layer, run.like(torch.empty(shape))) is not None
    quick = found(layer, shape)
    monkeypatch.setattr(dry, "shape_of", lambda layer, x: None)
    assert quick == found(layer, shape)
    assert quick[0].kind == "keeps"


@pytest.mark.parametrize(("layer", "shape"), FOLLOWED, ids=named)
def test_what_is_not_certain_is_followed(layer: nn.Module, shape: tuple[int, ...]) -> None:
    run = DryRun()
    assert layers.shape_of(layer, run.like(torch.empty(shape))) is None


def test_rows_that_lie_in_another_way_are_followed() -> None:
    run = DryRun()
    x = run.like(torch.empty(IMAGES).to(memory_format=torch.channels_last))
    layer = nn.Conv2d(3, 5, 3)
    assert layers.shape_of(layer, x) is None
    plain = run.like(torch.empty(IMAGES))
    assert layers.shape_of(layer, plain) == (5, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers.shape_of(layer, plain) is None
    assert layers.shape_of(layer.to(memory_format=torch.channels_last), plain) is None


def test_known_layers_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[nn.Module] = []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda layer, x: ran.append(layer))
    run = DryRun()
    x = run.like(torch.empty(IMAGES))
    run.call(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (x,), {}, [x])
    assert not ran
