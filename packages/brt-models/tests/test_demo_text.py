"""The demo of experts: what is written, and that its page escapes everything."""

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
from brt.errors import BrtError
from brt_models import _plugin, english
from brt_models.demo import text as demo
from brt_models.demo.passages import COLOURS, Passage, letters
from brt_models.demo.text_page import page
from brt_models.switch_text import narrow

FILES = ["experts.html", "report.html"]


def test_run_tells_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MEASURED", 1024)
    monkeypatch.setattr(brt, "optimize", partial(brt.optimize, measure=False))
    text = StringIO()
    console = Console(file=text, width=100)
    figures = demo.run(
        "A [list] <is>", tmp_path, compiled=False, seconds=0.0, num_bytes=12, console=console
    )
    assert json.loads(json.dumps(figures)) == figures
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert sorted(Path(file).name for file in figures["files"]) == FILES
    assert figures["text"].startswith("A [list] <is>")
    assert len(figures["text"].encode()) >= 13 + 12
    assert figures["held_out_bits_per_byte"] < 4
    assert figures["difference_from_eager"] < 1e-3
    for rows in figures["experts"]:
        assert sum(row["share"] for row in rows) == pytest.approx(1)
    for said in ("A [list] <is>", "typical bytes", "optimised", "dense"):
        assert said in text.getvalue()
    with pytest.raises(BrtError, match="must have a letter"):
        demo.run("", tmp_path)


def test_experts_are_those_of_the_routers() -> None:
    model = narrow()
    ids_S = english.ids("validation")[:300]  # a window and a part
    loads: list[list[int]] = []
    router = model.blocks[1].mlp.scatter
    handle = router.register_observer(lambda r, route, s: loads.append(route.load_P.tolist()))
    found_LN = demo.experts(model, ids_S)
    handle.remove()
    assert found_LN.shape == (2, 300)
    counts = [sum(load) for load in zip(*loads, strict=True)]
    assert torch.bincount(found_LN[0], minlength=4).tolist() == counts


def test_page_escapes_what_it_shows() -> None:
    raw = b'<b>"&</b>\xff\n'
    found = Passage("<i>title", raw, ((0,) * (len(raw) - 1) + (1,),), 4)
    rows = [{"expert": i, "share": 0.5, "typical": ["<", "&", "\\n"]} for i in range(2)]
    html = page([found], [rows])
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;i&gt;title" in html
    assert "&amp;" in html
    assert "\ufffd" in html
    assert html.count("<tr>") == 3
    assert ">&lt;b&gt;&quot;</span>" in html
    assert html.count(" class=new") == 2
    assert COLOURS[1] in html


def test_letters_of_several_bytes() -> None:
    raw = "a\u20acb".encode() + b"\xe2"
    assert letters(Passage("", raw, (), 0)) == [
        ("a", 0),
        ("\u20ac", 1),
        ("b", 4),
        ("\ufffd", 5),
    ]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    with plugins.using(_plugin):
        result = CliRunner().invoke(
            make_app(), ["demo", "text", "The list", "--json", "--out", str(tmp_path)]
        )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"].startswith("The list")
