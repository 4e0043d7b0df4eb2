"""The page of a report: which boxes, where they lie, and HTML that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import brt
from brt.cli import report as cli
from brt.errors import BrtError
from brt.passes.base import Left, Record
from brt.report import GraphView, NodeView, RegionReport, Report, RouterView
from brt.report.charts import load_chart
from brt.report.collapse import MOST_PATHS, Drawing, collapse, level_for
from brt.report.graph_svg import draw
from brt.report.layout import Place, lay_out
from brt.report.load import from_json

VOID = {"meta", "link", "path", "line", "rect", "polygon", "br"}
PANEL = 1178  # pixels of the page that a graph may take before it scrolls


def node(name: str, kind: Any = "other", inputs: Sequence[str] = (), **fields: Any) -> NodeView:
    given = {"op": "call_module", "target": name.replace("_", "."), "type": ""} | fields
    return NodeView(name=name, kind=kind, inputs=tuple(inputs), users=(), **given)


def item(name: str, inputs: Sequence[str], **fields: Any) -> NodeView:
    given = {"op": "call_function", "target": "operator.getitem"} | fields
    return node(name, given.pop("kind", "other"), inputs, **given)


def graph(nodes: Iterable[NodeView]) -> GraphView:
    nodes = list(nodes)
    users: dict[str, list[str]] = {}
    for one in nodes:
        for name in one.inputs:
            users.setdefault(name, []).append(one.name)
    return GraphView(tuple(replace(n, users=tuple(users.get(n.name, ()))) for n in nodes))


def branches(num_paths: int, share: Sequence[float] | None, depth: int = 3) -> list[NodeView]:
    """Items and layers of every path of "scatter": item_0, experts_0_0, experts_0_1, ..."""
    made = []
    for p in range(num_paths):
        on = {"scatter": "scatter", "path": p, "share": None if share is None else share[p]}
        made.append(item(f"item_{p}", ["rows"], kind="branch", **on))
        last = f"item_{p}"
        for i in range(depth):
            made.append(node(f"experts_{p}_{i}", "branch", [last], type="Linear", **on))
            last = f"experts_{p}_{i}"
    return made


def mixture(num_paths: int, share: Sequence[float] | None = None, depth: int = 3) -> GraphView:
    """Gate, scatter, branches, gather, with all the unpacking that a trace has."""
    lasts = [f"experts_{p}_{depth - 1}" if depth else f"item_{p}" for p in range(num_paths)]
    return graph(
        [
            node("x", "input", op="placeholder"),
            node("weight", op="get_attr"),
            item("shape", ["x"], target="builtins.getattr"),
            item("size", ["shape"]),
            item("twice", ["size"], target="operator.mul"),
            node("gate", inputs=["x", "weight"], type="Linear"),
            node("scatter", "scatter", ["x", "gate"], type="ScatterRouter", router="scatter#0"),
            item("rows", ["scatter"]),
            item("route", ["scatter"]),
            *branches(num_paths, share, depth),
            node("gather", "gather", [*lasts, "route"], type="GatherRouter"),
            item("checks", ["gather"]),
            item("crop", ["gather", "twice"]),
            node("output", "output", ["crop"], op="output"),
        ]
    )


def router(share: Sequence[float], **fields: Any) -> RouterView:
    rows = tuple(100 * s for s in share)
    given: dict[str, Any] = {
        "key": "scatter#0", "num_paths": len(share), "num_forwards": 5, "num_cells": 500,
        "share_P": tuple(share), "rows_mean_P": rows, "rows_min_P": rows, "rows_max_P": rows,
        "rows_percentiles_P": {str(q): rows for q in (5, 25, 50, 75, 95)},
        "always_P": tuple(s == 1 for s in share), "never_P": tuple(s == 0 for s in share),
    }  # fmt: skip
    return RouterView(**(given | fields))


def report(*regions: RegionReport, **fields: Any) -> Report:
    given: dict[str, Any] = {
        "model": "Toy", "num_parameters": 1234, "device": "cpu (abacus)", "regions": regions,
        "passes": ("drop-dead-paths",), "versions": {"torch": "2"}, "verified": True,
        "max_error": 1e-7,
    }  # fmt: skip
    return Report(**(given | fields))


def region(before: GraphView | None = None, after: GraphView | None = None, **fields: Any) -> Any:
    given: dict[str, Any] = {"path": "", "type": "Toy", "reason": None} | fields
    return RegionReport(before=before, after=after, **given)


def spilled() -> GraphView:
    """`mixture` of four, of whose paths the third moved into a spill."""
    share = [0.6, 0.3, 0.0, 0.1]
    nodes = []
    for one in mixture(4, share).nodes:
        if one.path == 2 and one.op == "call_module":
            if one.name == "experts_2_2":
                spill = {"name": "brt_spill_0", "target": "brt_spill_0", "type": "Spill"}
                nodes.append(replace(one, kind="guard", inputs=("item_2",), **spill))
        else:
            inputs = (n.replace("experts_2_2", "brt_spill_0") for n in one.inputs)
            nodes.append(replace(one, inputs=tuple(inputs)))
    return graph(nodes)


class Page(HTMLParser):
    """Reads a page; `problems` are tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def edges(drawing: Drawing) -> set[tuple[str, str]]:
    return {(edge.source, edge.target) for edge in drawing.edges}


def test_boxes_of_a_mixture():
    drawing = collapse(mixture(3, [0.5, 0.5, 0.0]), 0)
    names = [box.name for box in drawing.boxes]
    assert names == [
        "x", "gate", "scatter", "experts_0_0", "experts_1_0", "experts_2_0", "gather", "crop",
        "output",
    ]  # fmt: skip
    assert [len(box.nodes) for box in drawing.fan("scatter")] == [3, 3, 3]
    assert [box.share for box in drawing.fan("scatter")] == [0.5, 0.5, 0.0]
    # parameters, sizes, unpacking, what nobody needs and the route are not drawn
    assert edges(drawing) == {
        ("x", "gate"), ("x", "scatter"), ("gate", "scatter"), ("gather", "crop"),
        ("crop", "output"),
        *(("scatter", f"experts_{p}_0") for p in range(3)),
        *((f"experts_{p}_0", "gather") for p in range(3)),
    }  # fmt: skip


def test_paths_without_work_are_boxes_too():
    drawing = collapse(mixture(2, [0.5, 0.5], depth=0), 0)
    fan = drawing.fan("scatter")
    assert [(box.path, box.is_identity) for box in fan] == [(0, True), (1, True)]
    assert {(box.name, "gather") for box in fan} <= edges(drawing)


def test_each_is_drawn_as_its_calls():
    items = branches(3, [0.2, 0.8, 0.0], depth=0)
    modules = [node(f"experts_{p}", op="get_attr") for p in range(3)]
    drawing = collapse(
        graph(
            [
                node("x", "input", op="placeholder"),
                node("scatter", "scatter", ["x"]),
                item("rows", ["scatter"]),
                item("route", ["scatter"]),
                *items,
                *modules,
                item("each", [n.name for n in (*modules, *items)], target="brt.grouped.each"),
                *(item(f"out_{p}", ["each"]) for p in range(3)),
                node("gather", "gather", ["out_0", "out_1", "out_2", "route"]),
                node("output", "output", ["gather"], op="output"),
            ]
        ),
        0,
    )
    fan = drawing.fan("scatter")
    assert [(box.nodes[0].target, box.share) for box in fan] == [
        ("experts.0", 0.2), ("experts.1", 0.8), ("experts.2", 0.0),
    ]  # fmt: skip
    assert {(box.name, "gather") for box in fan} <= edges(drawing)


def test_rows_of_all_paths_in_one_operator():
    view = graph(
        [
            node("x", "input", op="placeholder"),
            node("scatter", "scatter", ["x"], router="scatter#0"),
            item("rows", ["scatter"]),
            item("route", ["scatter"]),
            node("chains", inputs=["rows", "route"], type="ConvChains"),
            node("gather", "gather", ["chains", "route"]),
            node("output", "output", ["gather"], op="output"),
        ]
    )
    drawing = collapse(view, 0)
    assert drawing.packed == {"chains": "scatter"}
    assert ("scatter", "gather") not in edges(drawing)
    svg = draw(drawing, {"scatter#0": router([0.7, 0.3, 0.0])}, "").text
    assert svg.count('data-from="scatter" data-to="chains"') == 3
    assert svg.count('data-from="chains" data-to="gather"') == 3


def test_nested_routes():
    outer = {"scatter": "outer", "path": 1, "share": 0.4}
    inner = [{"scatter": "inner", "path": p, "share": 0.5} for p in range(2)]
    drawing = collapse(
        graph(
            [
                node("x", "input", op="placeholder"),
                node("outer", "scatter", ["x"]),
                item("rows", ["outer"]),
                item("route", ["outer"]),
                item("first", ["rows"], kind="branch", scatter="outer", path=0, share=0.6),
                item("second", ["rows"], kind="branch", **outer),
                item("cells", ["route"]),
                item("cells_0", ["route"]),
                node("inner", "scatter", ["second", "cells"], **outer),
                item("inner_rows", ["inner"], **outer),
                item("inner_route", ["inner"], **outer),
                *(item(f"i{p}", ["inner_rows"], kind="branch", **inner[p]) for p in range(2)),
                *(item(f"c{p}", ["inner_route"], kind="branch", **outer) for p in range(2)),
                node("work", "branch", ["i0"], **inner[0]),
                node("gather", "gather", ["first", "work", "i1", "cells_0", "c0", "c1"]),
                node("output", "output", ["gather"], op="output"),
            ]
        ),
        0,
    )
    identities = {(b.scatter, b.path) for b in drawing.boxes if b.is_identity}
    assert identities == {("outer", 0), ("inner", 1)}
    assert ("outer", "inner") in edges(drawing)
    assert ("inner", "gather") not in edges(drawing)


def deep(num_layers: int) -> GraphView:
    """A chain of residual mixtures."""
    nodes = [node("x", "input", op="placeholder")]
    last = "x"
    for i in range(num_layers):
        on = [{"scatter": f"s{i}", "path": p, "share": 0.5} for p in range(2)]
        nodes += [
            *(
                node(f"l{i}_{j}", inputs=[last if j == 0 else f"l{i}_{j - 1}"], type="Linear")
                for j in range(6)
            ),
            node(f"s{i}", "scatter", [f"l{i}_5", f"l{i}_3"]),
            item(f"rows{i}", [f"s{i}"]),
            *(item(f"p{i}_{p}", [f"rows{i}"], kind="branch", **on[p]) for p in range(2)),
            *(node(f"e{i}_{p}", "branch", [f"p{i}_{p}"], **on[p]) for p in range(2)),
            node(f"g{i}", "gather", [f"e{i}_0", f"e{i}_1"]),
            item(f"add{i}", [f"g{i}", last], target="operator.add"),
        ]
        last = f"add{i}"
    return graph([*nodes, node("output", "output", [last], op="output")])


def test_hundreds_of_nodes_collapse():
    view = deep(40)
    assert len(view) > 500
    assert level_for(view) == 2
    drawing = collapse(view, level_for(view))
    assert len(drawing.boxes) < 250
    names = {node.name for box in drawing.boxes for node in box.nodes}
    assert {f"l{i}_{j}" for i in range(40) for j in range(6)} <= names


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(mixture(1), id="one path"),
        pytest.param(mixture(5, [0.2] * 5), id="five paths"),
        pytest.param(mixture(64, [1 / 64] * 64), id="64 paths"),
        pytest.param(spilled(), id="spilled"),
        pytest.param(deep(5), id="deep"),
        pytest.param(graph([node("output", "output", op="output")]), id="output only"),
        pytest.param(graph([]), id="nothing"),
    ],
)
def test_boxes_lie_apart_and_edges_go_down(view: GraphView, level: int):
    drawing = collapse(view, level)
    svg = draw(drawing, {}, "it").text
    shapes = [
        [float(v) for v in re.findall(r'="(-?[\d.]+)"', found)][:4]
        for found in re.findall(r"<rect [^>]*>", svg)
    ]
    assert svg.count('class="box ') == len(drawing.boxes)
    for i, (x, y, w, h) in enumerate(shapes):
        for x2, y2, w2, h2 in shapes[i + 1 :]:
            apart = x + w <= x2 + 0.2 or x2 + w2 <= x + 0.2 or y + h <= y2 or y2 + h2 <= y
            assert apart, f"boxes at {x}, {y} and {x2}, {y2}"
    for path in re.findall(r'd="M([^"]+)"', svg):
        heights = [float(v) for v in re.findall(r"-?[\d.]+", path)][1::2]
        assert heights == sorted(heights)


def test_long_edges_are_straight_beside_boxes():
    boxes = [Place(name, 60.0, 20.0, rank=(i,)) for i, name in enumerate("abcd")]
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    layout = lay_out(boxes, edges, {})
    bends = layout.bends["a", "d"]
    assert len(bends) == 2
    assert len({round(bend.x, 3) for bend in bends}) == 1
    assert all(abs(bend.x - layout.places["b"].x) > 30 for bend in bends)
    tops = [layout.places[name].top for name in "abcd"]
    assert tops == sorted(tops)


def test_widths_by_load_and_what_is_dead():
    svg = draw(collapse(mixture(3, [0.8, 0.2, 0.0]), 0), {}, "it").text
    look = dict(re.findall(r'<path (class="[^>]*?) data-from="scatter" data-to="(\w+)"', svg))
    widths = {
        name: float(re.search(r"stroke-width:([\d.]+)", css)[1])  # type: ignore[index]
        for css, name in look.items()
        if "stroke-width" in css
    }
    assert widths["experts_0_0"] > 2 * widths["experts_1_0"]
    dead = next(css for css, name in look.items() if name == "experts_2_0")
    assert "dead" in dead
    assert re.search(r'class="box branch dead"[^>]*data-name="experts_2_0"', svg)


def test_spilled_paths_are_marked_and_say_what_is_inside():
    before = mixture(4, [0.6, 0.3, 0.0, 0.1])
    svg = draw(collapse(spilled(), 0), {}, "it", before).text
    found = re.search(r'<g class="([^"]*)"[^>]*data-name="brt_spill_0" data-tip="([^"]*)"', svg)
    assert found is not None
    assert {"guard", "inserted", "dead"} <= set(found[1].split())
    assert "checked at each call" in found[2]
    assert "experts.2.1 (Linear)" in found[2]


def test_very_many_paths_are_drawn_in_part():
    num_paths = 4 * MOST_PATHS
    share = [1 / (p + 2) for p in range(num_paths)]
    drawing = collapse(mixture(num_paths, share), 0)
    merged = [box for box in drawing.boxes if box.path == -1]
    assert len(merged) == 1
    assert len(drawing.fan("scatter")) - 1 + merged[0].num_paths == num_paths
    assert merged[0].share == pytest.approx(sum(share[-merged[0].num_paths :]))
    for paths in (1, 4, 8, 16, 33, MOST_PATHS, num_paths):
        svg = draw(collapse(mixture(paths, share[:paths]), 0), {}, "it")
        assert svg.width <= PANEL, paths


def test_loads_chart():
    view = router([1.0, 0.5, 0.0, 0.25], num_dropped=3)
    chart = load_chart(view)
    assert chart.count('class="mean"') == 3
    assert '<g class="load always"' in chart
    assert '<g class="load never"' in chart
    assert "path 1: 50.0 % of the cells" in chart
    for share in ([0.0], [0.0] * 300, [1.0], [1e-9, 0.3], [0.1] * 256):
        assert Page(load_chart(router(share))).problems == []


def record(**fields: Any) -> Record:
    given: dict[str, Any] = {
        "name": "drop-dead-paths", "region": "", "seconds": 0.0123, "nodes_before": 27,
        "nodes_after": 25, "changed": True, "notes": ("path 2 moved",),
        "left": (Left("path 3", "it is <b>used</b>"),), "max_error": 1e-7,
    }  # fmt: skip
    return Record(**(given | fields))


def whole() -> Report:
    class Count:
        hits, fallbacks = 9, 1

    share = [0.6, 0.3, 0.0, 0.1]
    return report(
        region(mixture(4, share), spilled(), records=(record(),), routers=(router(share),)),
        region(path="decoder", type="Decoder", reason="it is <i>closed</i>"),
        stats=lambda: {"drop-dead-paths:scatter[2]": Count()},
        profile="0123456789abcdef",
    )


CASES = {
    "whole": whole(),
    "nothing": report(passes=(), verified=False, max_error=None),
    "left alone": report(region(reason="why")),
    "no profile": report(region(mixture(3), mixture(3), records=(record(changed=False),))),
    "refused": report(region(mixture(3), mixture(3), records=(record(refused="no <profile>"),))),
    "no graph": report(region()),
    "many notes": report(region(records=(record(notes=tuple(map(str, range(50)))),))),
    "hostile names": report(region(path="<script>alert(1)</script>"), model='"><script>x</script>'),
}


@pytest.mark.parametrize("case", CASES)
def test_page_is_whole_and_needs_nothing_else(case: str):
    text = CASES[case].to_html()
    page = Page(text)
    assert page.problems == []
    assert text.startswith("<!doctype html>")
    assert text.isascii()
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not re.search(r"https?://|@import|url\(|//cdn", text)
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "data:").startswith("data:"), tag


def test_page_tells_everything():
    text = Page(CASES["whole"].to_html()).text
    for words in (
        "Toy", "1,234 parameters on cpu (abacus)", "0123456789ab",
        "within 1e-07 of the original", "27 \u2192 25", "12.3 ms", "path 2 moved", "left alone",
        "path 3: it is <b>used</b>", "drop-dead-paths:scatter[2]", "1 of 10",
        "500 cells in 5 forwards", "1 never used", "it is <i>closed</i>", "torch 2",
    ):  # fmt: skip
        assert words in text, words
    assert "not verified" in Page(CASES["nothing"].to_html()).text
    assert "refused" in Page(CASES["refused"].to_html()).text
    assert "No profile" in Page(CASES["no profile"].to_html()).text
    assert "50 decisions" in Page(CASES["many notes"].to_html()).text
    assert "which no pass changed" in Page(CASES["no profile"].to_html()).text


def test_narrow_graphs_stand_side_by_side():
    assert 'class="graphs beside"' in CASES["whole"].to_html()
    wide = report(region(mixture(40), mixture(39), records=(record(),)))
    assert 'class="views"' in wide.to_html()


def test_json_and_back():
    before = whole()
    data = json.loads(json.dumps(before.to_json()))
    after = from_json(data)
    assert after.regions == before.regions
    assert after.guards() == before.guards()
    assert after.to_html() == before.to_html()
    assert str(after) == str(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [], "it has no schema"),
        (lambda data: {}, "it has no schema"),
        (lambda data: data | {"schema": 99}, "schema 99; this brt reads"),
        (lambda data: data | {"regions": [{}]}, "damaged report: KeyError"),
        (lambda data: data | {"guards": 3}, "damaged report"),
    ],
)
def test_json_of_something_else(change: Callable[[Any], Any], message: str):
    with pytest.raises(BrtError, match=message):
        from_json(change(whole().to_json()))


@pytest.fixture
def command() -> Callable[..., Any]:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register(app)
    return lambda *args: CliRunner().invoke(app, ["report", *map(str, args)])


def test_command(command: Callable[..., Any], tmp_path: Path):
    saved, page = tmp_path / "report.json", tmp_path / "new" / "report.html"
    saved.write_text(json.dumps(whole().to_json()))
    assert "drop-dead-paths" in command(saved).output
    assert json.loads(command(saved, "--json").stdout) == json.loads(saved.read_text())
    result = command(saved, "--html", page)
    assert result.exit_code == 0, result.output
    assert page.read_text() == whole().to_html()
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_command_on_something_else(command: Callable[..., Any], tmp_path: Path):
    saved = tmp_path / "report.json"
    for text, message in (("{", "is not JSON"), ("{}", "it has no schema")):
        saved.write_text(text)
        with pytest.raises(BrtError, match=message):
            raise command(saved, "--html", tmp_path / "page.html").exception
    assert command(tmp_path / "absent.json").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


class SparseMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(2), num_paths=6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6))
        self.gather = brt.GatherRouter()
        with torch.no_grad():
            self.gate.bias[[1, 4]] = -100.0

    def forward(self, x_ND: Tensor) -> Any:
        paths, route = self.scatter(x_ND, self.gate(x_ND).softmax(-1))
        return self.gather([e(p) for e, p in zip(self.experts, paths, strict=True)], route)


def test_a_real_report():
    model = SparseMLP().eval()
    batches = [torch.randn(32, 8) for _ in range(3)]
    fast = brt.optimize(
        model, brt.profile(model, batches), passes=["drop-dead-paths"], sample=batches[0]
    )
    fast(batches[1])
    text = fast.report.to_html()
    page = Page(text)
    assert page.problems == []
    assert "drop-dead-paths:scatter[1]" in page.text
    spills = [a for _, a in page.tags if "guard inserted dead" in (a.get("class") or "")]
    assert len(spills) == 2
    assert all("inside it now:\nexperts." in (a["data-tip"] or "") for a in spills)
    assert from_json(json.loads(json.dumps(fast.report.to_json()))).to_html() == text
