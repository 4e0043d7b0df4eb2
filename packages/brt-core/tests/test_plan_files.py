"""Plans as files: the same optimised model again, nothing measured, and no other model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import brt
from brt import plugins
from brt.passes import Context, DropDeadPaths, FuseHorizontal, Pass
from brt.passes.fusion import Fusion
from brt.protocols import TopK

DIM = 6


class Layer(nn.Module):
    def __init__(self, num_paths: int = 3, width: int = 9) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_paths)
        self.scatter = brt.ScatterRouter(TopK(1), num_paths)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, width), nn.ReLU(), nn.Linear(width, DIM))
            for _ in range(num_paths)
        )
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        return self.gather([e(p) for e, p in zip(self.experts, paths, strict=True)], route)


def inserted(fast: Any) -> list[str]:
    return sorted(type(module).__name__ for module in fast.inserted.values())


def optimised(model: nn.Module, x: Tensor, **changed: Any) -> Any:
    return brt.optimize(model, brt.profile(model, [x]), sample=x, **{"measure": False} | changed)


@pytest.mark.parametrize("worth", [True, False])
def test_the_same_again_without_measuring(
    worth: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fusion, "_measure", lambda self, graph, ctx: worth)
    model, x = Layer().eval(), torch.randn(20, DIM)
    fast = optimised(model, x)
    assert ("GroupedLevels" in inserted(fast)) is worth
    fast.save(tmp_path / "plan.safetensors")

    def measure(*args: Any) -> bool:
        raise AssertionError("measured again")

    monkeypatch.setattr(Fusion, "_measure", measure)
    other = Layer().eval()  # other weights
    again = brt.load(tmp_path / "plan.safetensors", other, sample=x)
    assert inserted(again) == inserted(fast)
    assert again.report.passes == fast.report.passes
    assert again.report.profile == fast.report.profile
    with torch.no_grad():
        torch.testing.assert_close(again(x), other(x), rtol=1e-5, atol=1e-6)
    if worth:
        assert "as it was measured before" in str(again.report)


def test_options_and_no_profile(tmp_path: Path) -> None:
    model, x = Layer().eval(), torch.randn(20, DIM)
    fast = brt.optimize(model, passes=[FuseHorizontal()], sample=x)
    fast.save(tmp_path / "plan.safetensors")
    again = brt.load(tmp_path / "plan.safetensors", model)
    assert again.report.passes == ("fuse-horizontal",)
    assert again.report.profile is None
    with_options = optimised(model, x, passes=[DropDeadPaths()])
    with_options.save(tmp_path / "plan.safetensors")
    assert brt.load(tmp_path / "plan.safetensors", model).report.passes == ("drop-dead-paths",)


def test_another_machine_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Layer().eval(), torch.randn(20, DIM)
    optimised(model, x).save(tmp_path / "plan.safetensors")
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with pytest.warns(brt.PluginWarning, match=r"torch 9.9.0: measuring again"):
        again = brt.load(tmp_path / "plan.safetensors", model, sample=x)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)


def test_other_models_and_modes_are_refused(tmp_path: Path) -> None:
    model, x = Layer().eval(), torch.randn(20, DIM)
    path = tmp_path / "plan.safetensors"
    optimised(model, x).save(path)
    with pytest.raises(brt.PassError, match=r"experts.0.0.weight: float32\[9, 6\] there, .*more"):
        brt.load(path, Layer(width=8).eval())
    with pytest.raises(brt.PassError, match="of another model: a Layer, and this is a Linear"):
        brt.load(path, nn.Linear(2, 2).eval())
    with pytest.raises(brt.PassError, match=r"call model.eval\(\) first"):
        brt.load(path, Layer().train())
    with pytest.raises(brt.PassError, match="float32"):
        brt.load(path, Layer().double().eval())


def test_bad_files(tmp_path: Path) -> None:
    model, x = Layer().eval(), torch.randn(20, DIM)
    path, bad = tmp_path / "plan.safetensors", tmp_path / "bad.safetensors"
    optimised(model, x).save(path)
    with pytest.raises(brt.PassError, match="cannot be read"):
        brt.load(tmp_path / "none", model)
    bad.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(brt.PassError, match=r"cannot be read|damaged"):
        brt.load(bad, model)
    brt.profile(model, [x]).save(bad)
    with pytest.raises(brt.PassError, match="is no plan"):
        brt.load(bad, model)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, bad, metadata | {"schema": "7"})
    with pytest.raises(brt.PassError, match="has schema 7, this brt reads 2"):
        brt.load(bad, model)
    plan = json.loads(metadata["plan"])
    save_file(tensors, bad, metadata | {"plan": json.dumps(plan | {"training": True})})
    with pytest.raises(brt.PassError, match="is damaged"):
        brt.load(bad, model)


@dataclass(frozen=True)
class Unnamed(Pass):
    """A pass that no hook offers."""

    name: ClassVar[str] = "acme-unnamed"

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        return False


class Offers:
    @brt.hookimpl
    def brt_passes(self) -> Iterator[brt.PassSpec]:
        yield brt.PassSpec(name="acme-unnamed", summary="nothing", factory=Unnamed)


def test_passes_come_by_their_names(tmp_path: Path) -> None:
    model, path = Layer().eval(), tmp_path / "plan.safetensors"
    fast = brt.optimize(model, passes=[Unnamed()])
    with pytest.raises(brt.PassError, match="cannot be named in a file"):
        fast.save(path)
    assert not path.exists()
    with plugins.using(Offers()):
        fast.save(path)
        assert brt.load(path, model).report.passes == ("acme-unnamed",)
    with pytest.raises(brt.PluginError, match="acme-unnamed"):
        brt.load(path, model)
