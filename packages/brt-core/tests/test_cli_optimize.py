"""`brt optimize`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from dynamic_models import Mixture, Residual, to_paths
from torch import nn

import brt
from brt import cli, plugins
from brt.profile import profile

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["brt", "optimize", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture(autouse=True)
def zoo() -> Iterator[None]:
    def trained() -> nn.Module:
        model = Residual()
        nn.init.ones_(model.head.bias)
        return model

    module = ModuleType("acme")
    spec = brt.ModelSpec(
        name="acme-residual",
        summary="a mixture",
        factory=Residual,
        pretrained=trained,
        sample=lambda seed=0: (to_paths([0, 1] * (seed + 1)),),
    )
    module.brt_models = brt.hookimpl(lambda: [spec])  # type: ignore[attr-defined]
    module.brt_models.__name__ = "brt_models"  # type: ignore[attr-defined]
    with plugins.using(module):
        yield


def test_a_report_as_text_and_files(run: Run, tmp_path: Path) -> None:
    html, saved = tmp_path / "page" / "report.html", tmp_path / "report.json"
    code, out, err = run(
        "acme-residual", "--batches", "3", "--html", str(html), "--report", str(saved),
        "--passes", "drop-dead-paths,fold-permanent-paths",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "path 2 of mixture.scatter: no cell of 12 took it in 3 forwards" in out
    assert "verified on the sample" in out
    assert f"wrote {html}" in out
    assert "<html" in html.read_text()
    data = json.loads(saved.read_text())
    assert data["passes"] == ["drop-dead-paths", "fold-permanent-paths"]


def test_json_and_a_profile_from_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "profile.safetensors"
    found = profile(Residual(), [to_paths([0, 1])])
    found.save(file)
    code, out, _ = run("acme-residual", "--profile", str(file), "--json")
    assert code == 0
    data = json.loads(out)
    assert data["profile"] == found.digest()
    assert data["verified"]


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["acme-residual"], "--batches 8"),
        (["acme-residul", "--batches", "1"], "did you mean 'acme-residual'"),
        (["acme-residual", "--batches", "1", "--passes", "drop-ded-paths"], "drop-dead-paths"),
        (["acme-residual", "--profile", "nowhere.safetensors"], "nowhere"),
    ],
)
def test_what_a_user_can_mend(run: Run, args: list[str], what: str) -> None:
    code, out, err = run(*args)
    assert code == 2
    assert what in err.replace("\n", " ")
    assert not out


def test_a_profile_of_another_model(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    profile(Mixture(4), [to_paths([0, 1])]).save(file)
    code, _, err = run("acme-residual", "--profile", str(file))
    assert code == 2
    assert "does not fit the model" in err
