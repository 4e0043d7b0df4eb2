"""The demo of exits from weights to pictures, on few test images."""

from __future__ import annotations

import json
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import brt
from brt import plugins
from brt.cli import make_app
from brt_models import _plugin
from brt_models.demo import digit_pictures, digits
from brt_models.msdnet.budgets import Taken
from brt_models.picture_files import read

FILES = ["budgets.png", "exits.png", "report.html"]


def test_run_tells_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass = partial(brt.optimize, measure=False, passes=["fuse-vertical"])
    monkeypatch.setattr(brt, "optimize", one_pass)
    text = StringIO()
    console = Console(file=text, width=100)
    figures = digits.run(tmp_path / "out", compiled=False, seconds=0.0, console=console)
    assert json.loads(json.dumps(figures)) == figures
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert sorted(Path(file).name for file in figures["files"]) == FILES
    assert read(tmp_path / "out" / "exits.png").mean() < 0.99
    assert set(figures["milliseconds"]) == {"eager", "optimised"}
    assert [sum(row["left_K"]) for row in figures["budgets"]] == [500, 500, 500]
    assert all(row["share"] < row["budget"] + 0.03 for row in figures["budgets"])
    assert figures["accuracy"] > 0.97
    assert figures["difference_from_eager"] < 1e-4
    for said in ("500 handwritten digits", "all exits", "left at each exit", "optimised"):
        assert said in text.getvalue()


def test_wrong_images_come_first_and_others_from_sure_to_unsure() -> None:
    is_wrong_N = torch.zeros(200, dtype=torch.bool)
    is_wrong_N[[7, 9]] = True
    sure_N = torch.linspace(0.2, 1, 200)
    shown = digit_pictures._shown(torch.arange(200), is_wrong_N, sure_N).tolist()
    assert shown[:3] == [7, 9, 199]
    assert shown[-1] == 0
    assert len(set(shown)) == digit_pictures.ACROSS * digit_pictures.DOWN
    assert digit_pictures._shown(torch.tensor([7]), is_wrong_N, sure_N).tolist() == [7]


def test_an_exit_that_nobody_took_is_drawn(tmp_path: Path) -> None:
    from brt_models.digits import load

    test = load("test")
    taken = Taken(torch.ones(500, dtype=torch.int64), torch.eye(10)[test.labels])
    digit_pictures.draw_exits(test, taken, (1, 4), tmp_path / "exits.png")
    assert (tmp_path / "exits.png").stat().st_size > 10_000


def test_the_command_takes_no_source(tmp_path: Path) -> None:
    with plugins.using(_plugin):
        result = CliRunner().invoke(make_app(), ["demo", "digits", "mine.png"])
    assert "takes no 'mine.png'" in str(result.exception)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    with plugins.using(_plugin):
        result = CliRunner().invoke(
            make_app(), ["demo", "digits", "--json", "--out", str(tmp_path)]
        )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 500
