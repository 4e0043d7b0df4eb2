"""The demo from photo to figures, on small cuts of its photos."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from brt import plugins
from brt.cli import make_app
from brt.errors import BrtError
from brt_models import _plugin, photos
from brt_models.demo import parts, pictures, timing
from brt_models.demo import patch_sr as demo
from brt_models.picture_files import read, write

FILES = ["comparison.png", "report.html", "routing.png", "upscaled.png"]


@pytest.fixture
def small_photos(monkeypatch: pytest.MonkeyPatch) -> Callable[[photos.Photo], Tensor]:
    """Every photo of the table is a small cut of it, and the profile sees two."""
    load, split = photos.load, photos.split

    def cut(photo: photos.Photo) -> Tensor:
        return load(photo)[:, 100:200, 100:228]

    monkeypatch.setattr(photos, "load", cut)
    monkeypatch.setattr(photos, "split", lambda which: split(which)[:1])
    return cut


@pytest.mark.usefixtures("small_photos")
def test_run_tells_and_writes(tmp_path: Path) -> None:
    text = StringIO()
    console = Console(file=text, width=100)
    figures = demo.run(None, tmp_path / "out", compiled=False, seconds=0.0, console=console)
    assert json.loads(json.dumps(figures)) == figures
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert sorted(Path(file).name for file in figures["files"]) == FILES
    assert read(tmp_path / "out" / "upscaled.png").shape == (3, 400, 512)
    assert set(figures["milliseconds"]) == {"eager", "optimised"}
    assert sum(path["patches"] for path in figures["paths"]) == 4 * 5
    assert 0 < figures["compute_share"] <= 1
    assert figures["difference_from_eager"] < 1e-4
    assert figures["psnr"]["rgb"] > figures["psnr"]["rgb_bicubic"]
    for said in ("china: 128x100 -> 512x400", "optimised", "PSNR", "16 channels, 2 blocks"):
        assert said in text.getvalue()


@pytest.mark.usefixtures("small_photos")
def test_a_photo_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(torch.rand(3, 90, 37), tmp_path / "tall [1].png")
    monkeypatch.setattr(demo, "MAX_PIXELS", 2000)
    text = StringIO()
    figures = demo.run(
        tmp_path / "tall [1].png",
        tmp_path,
        compiled=False,
        seconds=0.0,
        console=Console(file=text, width=100),
    )
    assert figures["photo"] == "tall [1]"
    assert figures["size"] == [69, 32]
    assert "the photo has 37x90 pixels; the demo shrinks it to 32x69 first" in text.getvalue()
    assert "tall [1]: 32x69" in text.getvalue()


def test_photos_that_do_not_do(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    write(torch.rand(3, 31, 100), tmp_path / "x.png")
    with pytest.raises(BrtError, match="the photo has 100x31 pixels; it takes 32 each way"):
        demo.run(tmp_path / "x.png", tmp_path / "out", console=quiet)
    with pytest.raises(BrtError, match="no such file"):
        demo.run(tmp_path / "none.png", tmp_path / "out", console=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_photos")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.run, "__kwdefaults__", demo.run.__kwdefaults__ | {"seconds": 0.0})
    with plugins.using(_plugin):
        result = CliRunner().invoke(
            make_app(), ["demo", "--no-compile", "--json", "--out", str(tmp_path)]
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["photo"] == "china"
        missing = CliRunner().invoke(make_app(), ["demo", "livesr"])
        assert "no 'livesr' among brt_demos" in str(missing.exception)
        photo = tmp_path / "mine.png"
        write(torch.rand(3, 4, 4), photo)
        nameless = CliRunner().invoke(make_app(), ["demo", str(photo)])
        assert f"brt demo patch-sr {photo}" in str(nameless.exception)
        listed = CliRunner().invoke(make_app(), ["demo", "--list", "--json"])
        rows = {row["name"]: row["takes"] for row in json.loads(listed.stdout)}
        assert rows["patch-sr"] == "a photo"
    with plugins.using():
        nothing = CliRunner().invoke(make_app(), ["demo"])
        assert "no installed package brings a demo" in str(nothing.exception)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_variant_that_does_not_compile_is_left_out() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            raise ValueError("cannot [do] this\nfor reasons")

    text = StringIO()
    found = parts.compiled(Broken(), torch.rand(1, 3, 4, 4), Console(file=text))
    assert found == {}
    assert "torch.compile does not run here: cannot [do] this" in text.getvalue()


def test_alternate_takes_turns() -> None:
    calls: list[str] = []

    def variant(name: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            calls.append(name)
            return x

        return call

    found = timing.alternate({"a": variant("a"), "b": variant("b")}, torch.zeros(1), 0.0, 3)
    assert calls == ["a", "b"] * 4
    assert set(found) == {"a", "b"}
    assert min(found.values()) >= 0


def test_the_most_detailed_square() -> None:
    x_CHW = torch.zeros(3, 64, 96)
    x_CHW[:, 32:64, 48:80] = torch.rand(3, 32, 32)
    assert pictures.most_detailed(x_CHW, 32) == (32, 48, 32)
    assert pictures.most_detailed(x_CHW, 1000) == (0, pytest.approx(16, abs=16), 64)
