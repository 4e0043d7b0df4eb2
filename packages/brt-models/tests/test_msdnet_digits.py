"""Handwritten digits: the parts, the shipped network at its budgets, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from brt.errors import BrtError
from brt_models import digits, msdnet, weight_files
from brt_models.digits import Digits
from brt_models.msdnet import MSDNet, exits_of
from brt_models.msdnet.budgets import accuracy, at_budgets, run
from brt_models.msdnet.files import BUDGETS, DIGITS
from brt_models.msdnet.thresholds import taken_exits
from brt_models.train import msdnet_digits as training


@pytest.fixture(scope="module")
def parts() -> dict[str, Digits]:
    return {part: digits.load(part) for part in ("train", "validation", "test")}  # type: ignore


def test_parts_are_apart_and_stay_what_they_are(parts: dict[str, Digits]) -> None:
    assert [len(part.labels) for part in parts.values()] == [997, 300, 500]
    assert sorted(p for part in digits.PARTS.values() for p in part) == list(range(1797))
    assert sorted(digits._order(1797)) == list(range(1797))
    assert parts["test"].labels[:12].tolist() == [9, 4, 4, 7, 6, 6, 0, 7, 3, 0, 7, 1]
    for part in parts.values():
        assert part.images.shape[1:] == (3, 8, 8)
        assert torch.equal(part.images[:, 0], part.images[:, 2])
        assert 0 <= digits.shades(part.images).min() < digits.shades(part.images).max() <= 1
    assert abs(parts["train"].images.mean()) < 0.02
    assert abs(parts["train"].images.std() - 1) < 0.02


def test_unknown_part() -> None:
    with pytest.raises(BrtError, match="there are train, validation, test; got 'held-out'"):
        digits.load("held-out")  # type: ignore[arg-type]


def test_shipped_weights_reach_what_their_record_says(parts: dict[str, Digits]) -> None:
    model = msdnet.pretrained_digits()
    quality = weight_files.record_of(weight_files.shipped(DIGITS))["quality"]
    points = at_budgets(model, BUDGETS, parts["validation"], parts["test"])
    assert [point.budget for point in points] == [row["budget"] for row in quality["budgets"]]
    for point, row in zip(points, quality["budgets"], strict=True):
        assert point.accuracy == pytest.approx(row["accuracy"], abs=0.004), row
        assert point.macs == pytest.approx(row["macs"], rel=0.02), row
    logits_KNC = exits_of(model, [parts["test"].images])
    assert accuracy(logits_KNC[-1], parts["test"].labels) == pytest.approx(
        quality["accuracy"], abs=0.004
    )
    assert quality["accuracy"] > 0.97
    assert points[1].accuracy > quality["accuracy"] - 0.01
    assert points[1].macs < 0.25 * quality["macs"]
    assert model.thresholds == points[1].thresholds


def test_images_leave_where_thresholds_say(parts: dict[str, Digits]) -> None:
    model = MSDNet(thresholds=(0.13, 0.2)).eval()
    images = parts["test"].images[:60]
    logits_KNC = exits_of(model, [images])
    sure_N = logits_KNC[0].double().softmax(1).amax(1).sort().values
    model.set_thresholds((float(sure_N[29:31].mean()), 0.2))
    taken = run(model, images)
    assert torch.equal(taken.exit_N, taken_exits(model.thresholds, logits_KNC))
    assert int((taken.exit_N == 0).sum()) == 30
    there_NC = logits_KNC[taken.exit_N, torch.arange(60)]
    torch.testing.assert_close(taken.logits_NC, there_NC)


def test_points_keep_the_models_thresholds_and_count_costs(parts: dict[str, Digits]) -> None:
    model = MSDNet(thresholds=(0.5, 0.6)).eval()
    small = Digits(parts["validation"].images[:80], parts["validation"].labels[:80])
    (point,) = at_budgets(model, [0.6], small, small)
    cost_K = model.macs_K(small.images)
    assert model.thresholds == (0.5, 0.6)
    assert sum(point.left_K) == 80
    assert point.macs == sum(n * c for n, c in zip(point.left_K, cost_K, strict=True)) / 80
    assert point.macs <= 0.6 * cost_K[-1]


def test_counting_costs_changes_nothing() -> None:
    model = MSDNet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost_K = model.macs_K(torch.randn(2, 3, 32, 32))
    assert model.training
    assert list(cost_K) == sorted(cost_K)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_save_and_load(tmp_path: Path) -> None:
    model = MSDNet(msdnet.digits_config(), (0.5, 0.6, 0.7)).eval()
    msdnet.save(model, tmp_path / "m.safetensors", {"recipe": {"seed": 3}})
    again = msdnet.load(tmp_path / "m.safetensors")
    assert (again.config, again.thresholds) == (model.config, model.thresholds)
    assert weight_files.record_of(tmp_path / "m.safetensors") == {"recipe": {"seed": 3}}
    with pytest.raises(BrtError, match=r"msdnet.load: cannot read"):
        msdnet.load(tmp_path / "none.safetensors")
    with pytest.raises(BrtError, match="no record"):
        weight_files.record_of(tmp_path / "none.safetensors")


def test_plain_networks_spend_what_they_may(parts: dict[str, Digits]) -> None:
    images = parts["test"].images
    plain = training.Plain.within(70_000, images)
    width = plain.net[0].net[0].out_channels
    assert plain.macs(images) <= 70_000 < training.Plain(width + 1).macs(images)


def test_moved_images_are_those_that_stay_where_nothing_moves(parts: dict[str, Digits]) -> None:
    images = parts["train"].images[:4]
    still = training.Recipe(turn=0, shear=0, zoom=0, shift=0)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(
        training.moved(images, still, generator), images, atol=1e-5, rtol=1e-5
    )
    aside = training.moved(images, training.Recipe(), generator)
    assert 0.1 < (aside - images).abs().mean() < 1
    with pytest.raises(BrtError, match="epochs, batch and measure_every"):
        training.Recipe(epochs=0)


@pytest.mark.slow
def test_the_script_writes_the_same_weights_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = ["--quick", "--threads", "1", "--out", str(tmp_path / name)]
        result = CliRunner().invoke(training.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "curves.png",
            "figures.json",
            DIGITS,
        ]
    one, two = (tmp_path / name / DIGITS for name in ("one", "two"))
    weights, again = load_file(one), load_file(two)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    assert weight_files.record_of(one) == weight_files.record_of(two)
    # Two epochs: far from trained, and far from a guess
    figures = json.loads((tmp_path / "one" / "figures.json").read_text())
    assert figures["quality"]["budgets"][0]["plain_accuracy"] > 0.5
    assert figures["quality"]["accuracy"] > 0.2
