"""`brt.fuse`: modules side by side as one, by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import brt
from brt.fuse import How

DIM, OUT = 12, 5
LOADS: dict[str, Sequence[int]] = {
    "as sampled": (3, 9, 1, 4),
    "one path": (0, 20, 0, 0),
    "none": (0, 0, 0, 0),
    "all": (1, 1, 1, 1),
}


def mlp(width: int, act: nn.Module | None = None, depth: int = 1, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(DIM if i == 0 else width, width, bias), act or nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, OUT, bias))


def conv(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1)
    )


KINDS: dict[str, list[nn.Module]] = {
    "alike": [mlp(8) for _ in range(4)],
    "widths": [mlp(width, nn.SiLU()) for width in (4, 8, 6, 1)],
    "no bias": [mlp(8, bias=False) for _ in range(4)],
    "depths and activations": [mlp(8), mlp(6, nn.ReLU(), 2), mlp(4, nn.ReLU(), 2), mlp(3)],
}


def inputs(loads: Sequence[int]) -> list[Tensor]:
    return [torch.randn(load, DIM) for load in loads]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["auto", "loop", "padded", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_what_the_modules_give(kind: str, how: How) -> None:
    modules = KINDS[kind]
    if (kind, how) == ("depths and activations", "padded"):
        with pytest.raises(brt.PassError, match="'padded' cannot be: modules of several kinds"):
            brt.fuse(modules, inputs(LOADS["all"]), how)
        return
    fused = brt.fuse(modules, inputs(LOADS["as sampled"]), how)
    assert fused.how == how or how == "auto"
    for loads in LOADS.values():
        rows_P = inputs(loads)
        wanted = [module(rows) for module, rows in zip(modules, rows_P, strict=True)]
        same(fused(rows_P), wanted)
    parameters = [*fused.parameters()]
    found = []
    for outs in (fused(rows_P), wanted):
        found.append(torch.autograd.grad(sum(out.sin().sum() for out in outs), parameters))
    same(*found)


def test_auto_says_what_it_measured() -> None:
    modules = KINDS["alike"]
    fused = brt.fuse(modules, inputs((8, 8, 8, 8)))
    assert [one.how for one in fused.tried] == ["loop", "padded", "grouped", "chain"]
    times = {one.how: one.seconds for one in fused.tried if one.seconds is not None}
    assert fused.how == min(times, key=times.__getitem__)
    assert set(times) == {"loop", "padded", "grouped"}
    assert "which no step of a conv chain does" in fused.report
    assert f"{fused.how}: " in fused.report


def test_chains() -> None:
    modules = [conv(width) for width in (4, 8)]
    rows_P = [torch.randn(n, 3, 6, 6) for n in (2, 3)]
    fused = brt.fuse(modules, rows_P, "chain")
    assert fused.how == "chain"
    same(fused(rows_P), [module(rows) for module, rows in zip(modules, rows_P, strict=True)])
    assert "padded: module 0" in brt.fuse(modules, rows_P).report


def test_it_is_a_module_like_others() -> None:
    modules = [copy.deepcopy(module) for module in KINDS["alike"]]
    rows_P = inputs((2, 3, 4, 5))
    fused = brt.fuse(modules, rows_P, "grouped")
    assert set(fused.state_dict()) == {
        f"modules_P.{p}.{name}" for p in range(4) for name in modules[0].state_dict()
    }
    with torch.no_grad():
        fused(rows_P)
        next(iter(modules[0].parameters())).add_(1.0)  # stacked weights follow
        same(fused(rows_P), [module(rows) for module, rows in zip(modules, rows_P, strict=True)])
        twin = copy.deepcopy(fused).double()
        wide_P = [rows.double() for rows in rows_P]
        same([out.float() for out in twin(wide_P)], fused(rows_P))
        before = fused(rows_P)
        for parameter in twin.parameters():
            parameter.zero_()
        assert all(bool((out == 0).all()) for out in twin(wide_P))
        same(fused(rows_P), before)


def test_wrong_use() -> None:
    modules, rows_P = KINDS["alike"], inputs((1, 1, 1, 1))
    with pytest.raises(brt.PassError, match="how must be one of auto, loop"):
        brt.fuse(modules, rows_P, "best")  # type: ignore[arg-type]
    with pytest.raises(brt.PassError, match="4 modules and 1 sample inputs"):
        brt.fuse(modules, rows_P[:1])
    with pytest.raises(brt.PassError, match=r"must be an nn\.Module and a tensor"):
        brt.fuse([torch.relu], rows_P[:1])  # type: ignore[list-item]
    with pytest.raises(brt.PassError, match="'chain' cannot be: module 0"):
        brt.fuse(modules, rows_P, "chain")
    with pytest.raises(brt.PassError, match="1 inputs for 4 modules"):
        brt.fuse(modules, rows_P, "loop")(rows_P[:1])
    with pytest.raises(brt.PassError, match="inputs are not alike"):
        brt.fuse(modules, [*rows_P[:3], torch.randn(1, 2)], "grouped")
    different = [mlp(8), nn.Linear(DIM, OUT + 1)]
    with pytest.raises(brt.PassError, match="take and give different sizes"):
        brt.fuse(different, rows_P[:2], "grouped")
