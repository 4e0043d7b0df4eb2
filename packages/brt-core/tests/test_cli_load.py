"""`brt load` and `brt models show`: what they say of good and of bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import brt
from brt import cli, plugins
from brt.cli import router_tree
from brt.errors import BrtError, CheckpointError


@dataclass(frozen=True)
class Config:
    """Shape of the model below."""

    width: int = 4
    kinds: tuple[str, ...] = ("[a]",)


class Two(nn.Module):
    """A model with one scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.gate = nn.Linear(4, 2)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), num_paths=2)
        self.gather = brt.GatherRouter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        return self.gather([paths[0] + 1, paths[1] * 2], route)


def load_two(path: Path, layer: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    if path.name == "misfit.pth":
        raise CheckpointError("two: misfit.pth", ("missing: [a]", "not of this model: b"))
    if path.name == "damaged.pth":
        raise BrtError(f"cannot read {path}: it is cut off")
    model = Two().to(dtype).eval()
    model.layer = layer  # type: ignore[assignment]
    return model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process, among two models: (exit code, out, err)."""
    module = ModuleType("acme")

    @brt.hookimpl
    def brt_models() -> list[brt.ModelSpec]:
        about: dict[str, Any] = {"factory": Two, "sample": lambda seed=0: (torch.randn(5, 4),)}
        return [
            brt.ModelSpec(name="acme-two", summary="two [experts]", load=load_two, **about),
            brt.ModelSpec(name="acme-none", summary="has no loader", **about),
        ]

    module.brt_models = brt_models  # type: ignore[attr-defined]

    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["brt", *args])
        with pytest.raises(SystemExit) as ended, plugins.using(module):
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


Run = Callable[..., tuple[int, str, str]]


def made(folder: Path, name: str) -> str:
    (folder / name).write_bytes(b"12345")
    return str(folder / name)


def test_load_says_what_was_found(run: Run, tmp_path: Path) -> None:
    path = made(tmp_path, "good.pth")
    code, out, _ = run("load", "acme-two", "--checkpoint", path)
    assert code == 0
    for part in ("tensors", "width=4", "('[a]',)", "float32", "bytes"):
        assert part in out
    code, out, _ = run("load", "acme-two", "--checkpoint", path, "--json", "--option",
                       "dtype=bfloat16")  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["loaded"]
    assert (found["parameters"], found["tensors"], found["routers"]) == (10, 2, 2)
    assert (found["dtypes"], found["bytes"], found["complaints"]) == (["bfloat16"], 5, [])
    assert found["config"] == {"width": 4, "kinds": ["[a]"]}
    folder = run("load", "acme-two", "--checkpoint", str(tmp_path), "--json")[1]
    assert json.loads(folder)["files"] == 1


def test_load_lists_what_does_not_fit(run: Run, tmp_path: Path) -> None:
    path = made(tmp_path, "misfit.pth")
    code, out, err = run("load", "acme-two", "--checkpoint", path)
    assert (code, out) == (2, "")
    assert "2 complaints:\n  missing: [a]\n  not of this model: b" in err
    code, out, _ = run("load", "acme-two", "--checkpoint", path, "--json")
    found = json.loads(out)
    assert (code, found["loaded"]) == (2, False)
    assert found["complaints"] == ["missing: [a]", "not of this model: b"]
    damaged = made(tmp_path, "damaged.pth")
    code, out, _ = run("load", "acme-two", "--checkpoint", damaged, "--json")
    assert (code, json.loads(out)["complaints"]) == (2, [f"cannot read {damaged}: it is cut off"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("acme-none",), "acme-none loads no checkpoints; there are loaders of: acme-two"),
        (("acme-too",), "no 'acme-too' among brt_models"),
        (("acme-two", "--option", "layer"), "expected NAME=VALUE"),
        (("acme-two", "--option", "depth=3"), "no option 'depth'; there are: layer, dtype"),
        (("acme-two", "--option", "layer=x"), "layer=x: expected an integer"),
        (("acme-two", "--option", "dtype=int8"), "dtype=int8: expected float32"),
    ],
    ids=str,
)
def test_load_of_what_there_is_not(
    run: Run, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    code, _, err = run("load", *args, "--checkpoint", made(tmp_path, "good.pth"))
    assert code == 2
    assert message in err


def test_load_of_no_file(run: Run) -> None:
    code, _, err = run("load", "acme-two", "--checkpoint", "nothing.pth")
    assert code == 2
    assert "does not exist" in err


def test_show_writes_a_page(run: Run, tmp_path: Path) -> None:
    page, picture = tmp_path / "two.html", tmp_path / "two.svg"
    code, out, _ = run("models", "show", "acme-two", "--html", str(page), "--svg", str(picture))
    assert code == 0
    drawn = ElementTree.parse(picture).getroot()
    boxes = [node.get("data-name") for node in drawn.iter() if node.get("data-name")]
    assert "scatter" in boxes
    assert "gather" in boxes
    assert "ScatterRouter" in out
    text = page.read_text()
    assert "<svg" in text
    assert "scatter" in text


def test_what_is_alike_is_drawn_once() -> None:
    places = {f"blocks.{i}.mlp.scatter": "TopK(1)" for i in (1, 2, 3, 5)}
    places |= {"blocks.7.mlp.scatter": "TopK(2)", "loop": "max_steps=3", "loop.netlet.gate": "[x]"}
    routers = [{"place": p, "router": "Router", "what": what} for p, what in places.items()]
    tree = router_tree.drawn("Title", "a [summary]", routers)
    lines = []
    for child in tree.children:
        lines.append(str(child.label))
        lines += [str(inner.label) for inner in child.children]
    assert lines == [
        "[cyan]blocks[/]",
        r"[cyan]{1-3, 5}.mlp.scatter[/] Router [dim]TopK(1)[/]",
        r"[cyan]7.mlp.scatter[/] Router [dim]TopK(2)[/]",
        "[cyan]loop[/] Router [dim]max_steps=3[/]",
        r"[cyan]netlet.gate[/] Router [dim]\[x][/]",
    ]
