"""`brt.adapt`: other libraries' modules, replaced in place by the adapters on offer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import brt
from brt import plugins


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Ours(nn.Module):
    def __init__(self, theirs: Theirs) -> None:
        super().__init__()
        self.linear = theirs.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


class Plugin:
    def __init__(self, *names: str, adapt: type[nn.Module] = Ours) -> None:
        self.names, self.adapt = names, adapt

    @brt.hookimpl
    def brt_adapters(self) -> Iterator[brt.AdapterSpec]:
        for name in self.names:
            yield brt.AdapterSpec(
                name=name,
                summary="theirs to ours",
                matches=lambda module: isinstance(module, Theirs),
                adapt=self.adapt,
            )


def test_matching_modules_are_replaced_and_share_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Theirs()), Theirs())
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    before = model(x)
    with plugins.using(Plugin("acme-theirs")):
        adapted = brt.adapt(model)
    assert adapted.changed == (("1.0", "acme-theirs"), ("2", "acme-theirs"))
    assert isinstance(model[2], Ours)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
    assert torch.equal(model(x), before)
    assert "by acme-theirs" in str(adapted)


def test_no_adapter_says_so() -> None:
    with plugins.using():
        assert "nothing was adapted" in str(brt.adapt(nn.Sequential(Theirs())))


def test_two_adapters_of_one_module_are_an_error_that_names_both() -> None:
    model = nn.Sequential(Theirs())
    with (
        plugins.using(Plugin("acme-a", "acme-b")),
        pytest.raises(brt.PluginError, match=r"'acme-a' .* and 'acme-b'"),
    ):
        brt.adapt(model)
    assert isinstance(model[0], Theirs)


class Renamed(nn.Module):
    def __init__(self, theirs: Theirs) -> None:
        super().__init__()
        self.other = theirs.linear


def test_an_adapter_that_changes_names_changes_nothing() -> None:
    model = nn.Sequential(Theirs())
    with (
        plugins.using(Plugin("acme-a", adapt=Renamed)),
        pytest.raises(brt.PluginError, match=r"lost \['linear.bias', 'linear.weight'\]"),
    ):
        brt.adapt(model)
    assert isinstance(model[0], Theirs)
