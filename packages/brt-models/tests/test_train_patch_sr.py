"""The training script: its patches, its prices, and that one seed gives one set of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from brt.errors import BrtError
from brt_models import patch_sr, weight_files
from brt_models.patch_sr import PatchSRConfig
from brt_models.resampling import enlarge, shrink
from brt_models.train import patch_sr as training
from brt_models.train.crops import ZOOMS, Crops
from brt_models.train.log import Log


def crops(seed: int = 0) -> Crops:
    photo_CHW = torch.rand(3, 100, 130, generator=torch.Generator().manual_seed(1))
    return Crops([photo_CHW], 4, 12, torch.Generator().manual_seed(seed))


def test_pairs_are_the_photo_shrunk_and_what_it_lacks() -> None:
    made = crops()
    assert len(made.pairs) == len(ZOOMS)
    for pair in made.pairs:
        high_BCHW = enlarge(pair.low_CHW[None], 4) + pair.residual_CHW
        torch.testing.assert_close(shrink(high_BCHW, 4)[0], pair.low_CHW, atol=1.01 / 255, rtol=0)


def test_patches_keep_what_belongs_together() -> None:
    made = crops()
    low_NCHW, residual_NCHW = made.draw(8)
    assert low_NCHW.shape == (8, 3, 12, 12)
    assert residual_NCHW.shape == (8, 3, 48, 48)
    # A turned or recoloured patch and its residual still shrink to the patch, away from borders
    again_NCHW = shrink(enlarge(low_NCHW, 4) + residual_NCHW, 4)
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(again_NCHW[inside], low_NCHW[inside], atol=1.01 / 255, rtol=0)


def test_one_seed_draws_the_same_patches() -> None:
    (one, _), (same, _), (other, _) = (crops(seed).draw(4) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_recipes_that_fit_nothing() -> None:
    with pytest.raises(BrtError, match="one number a path"):
        training.Recipe(branch_steps=(1, 2))
    config = PatchSRConfig(channels=(4,), blocks=(0,))
    with pytest.raises(BrtError, match="the recipe is for 4 paths, the config has 1"):
        training.train(
            training.Recipe.quick(), config, Log(Console(quiet=True), "loss", "gain", "dB")
        )


@pytest.mark.slow
def test_the_script_writes_the_same_weights_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = ["--quick", "--threads", "1", "--out", str(tmp_path / name)]
        result = CliRunner().invoke(training.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "curves.png",
            "figures.json",
            "patch_sr.safetensors",
        ]
    one, two = (tmp_path / name / "patch_sr.safetensors" for name in ("one", "two"))
    weights, again = load_file(one), load_file(two)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    assert weight_files.record_of(one) == weight_files.record_of(two)
    assert patch_sr.load(one).config == PatchSRConfig()
