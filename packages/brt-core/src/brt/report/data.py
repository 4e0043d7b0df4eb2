"""What a report is made of: light values only, so that a report outlives its model.

Legend: P paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from brt.passes.base import Candidate, Record

SCHEMA = 1

Kind = Literal["input", "scatter", "gather", "router", "guard", "branch", "other", "output"]


@dataclass(frozen=True)
class RouterView:
    """What the profile saw of one router; what the report draws as loads.

    Attributes:
        key: ``module.path#call`` in the whole model, as in `brt.Profile`.
        num_paths: P.
        num_forwards: how many forwards were seen.
        num_cells: cells that were routed, over all forwards.
        share_P: mean share of the cells that took each path (top-2 shares add up to 2).
        rows_mean_P, rows_min_P, rows_max_P: rows of each path in one forward.
        rows_percentiles_P: percent -> rows of each path.
        always_P, never_P: paths that got every cell, or none, in every forward.
        num_dropped: choices that capacity dropped.
    """

    key: str
    num_paths: int
    num_forwards: int
    num_cells: int
    share_P: tuple[float, ...]
    rows_mean_P: tuple[float, ...]
    rows_min_P: tuple[float, ...]
    rows_max_P: tuple[float, ...]
    rows_percentiles_P: Mapping[str, tuple[float, ...]]
    always_P: tuple[bool, ...]
    never_P: tuple[bool, ...]
    num_dropped: int = 0


@dataclass(frozen=True)
class NodeView:
    """One node of a graph, in the order in which it runs.

    Attributes:
        name: unique in its graph.
        op: of `torch.fx`: placeholder, get_attr, call_function, call_method, call_module, output.
        target: what is called: a function's name, a method, or a module path in the region.
        type: class of the module that is called, or "".
        kind: how to draw it. "branch" is work on the rows of one path of a scatter, "guard" a
            module that a pass put in, "router" a router that is neither scatter nor gather.
        inputs, users: names of nodes.
        router: key of the router (`RouterView.key`) where the node is a scatter that was profiled.
        scatter, path: for a node on one path only: name of the (innermost) scatter node, and path.
        share: mean share of that scatter's cells that reach this node; None = not known.
    """

    name: str
    op: str
    target: str
    type: str
    kind: Kind
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    router: str | None = None
    scatter: str | None = None
    path: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class GraphView:
    """A graph as it was at one moment."""

    nodes: tuple[NodeView, ...]

    def __len__(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True)
class RegionReport:
    """What became of one region.

    Attributes:
        path: of its module; "" is the whole model.
        type: class of its module.
        reason: why it was left as it was; None where passes ran on it.
        before, after: its graph before the first and after the last pass; None where it has none.
        records: of the passes that ran on it, in that order.
        routers: what the profile knows of its routers.
        closed: {path: why} of its modules without routers that could not be traced: each stays one
            node, which passes do not look into.
        candidates: the forms of it that were measured on the sample; empty where none were.
    """

    path: str
    type: str
    reason: str | None
    before: GraphView | None
    after: GraphView | None
    records: tuple[Record, ...] = ()
    routers: tuple[RouterView, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()

    @property
    def kept_nothing(self) -> bool:
        """Whether other forms were measured, and the original was kept."""
        return bool(self.candidates) and not any(one.passes for one in self.candidates if one.kept)


def _no_stats() -> Mapping[str, Mapping[str, int]]:
    return {}


@dataclass(frozen=True)
class Report:
    """What `brt.optimize` did: print it, or see `to_json` and `to_html`.

    Attributes:
        model: class of the model.
        num_parameters: of the model.
        device: of its parameters, in words.
        regions: every region, also those left alone.
        passes: names of the passes, in the order in which they ran.
        versions: package -> version.
        verified: whether the outputs on the sample were compared with the original's.
        max_error: the largest difference between them; None where none were compared.
        profile: digest of the profile; None where there was none.
        stats: called for the counts of each guard so far (`Optimized.stats`).
    """

    model: str
    num_parameters: int
    device: str
    regions: tuple[RegionReport, ...]
    passes: tuple[str, ...]
    versions: Mapping[str, str]
    verified: bool
    max_error: float | None = None
    profile: str | None = None
    stats: Callable[[], Mapping[str, Any]] = field(default=_no_stats, repr=False, compare=False)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of all regions: pass by pass, region by region."""
        every = [record for region in self.regions for record in region.records]
        return tuple(sorted(every, key=lambda record: self.passes.index(record.name)))

    def guards(self) -> dict[str, dict[str, int]]:
        """Guard -> {"hits": ..., "fallbacks": ...}, as of now."""
        return {
            name: {"hits": count.hits, "fallbacks": count.fallbacks}
            for name, count in self.stats().items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, with the guards' counts as of now."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "num_parameters": self.num_parameters,
            "device": self.device,
            "passes": list(self.passes),
            "versions": dict(self.versions),
            "verified": self.verified,
            "max_error": self.max_error,
            "profile": self.profile,
            "regions": [asdict(region) for region in self.regions],
            "guards": self.guards(),
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; also written to ``path``, where one is given."""
        from brt.report.html import render

        page = render(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._passes(), *self._candidates(), *self._guards()])

    def _head(self) -> list[str]:
        lines = [f"{self.model}, {self.num_parameters:,} parameters, {self.device}"]
        worked = [region for region in self.regions if region.reason is None]
        lines.append(f"passes: {', '.join(self.passes) or 'none'}; regions: {len(worked)}")
        if self.verified:
            lines.append(f"verified on the sample: largest difference {self.max_error or 0.0:.3g}")
        else:
            lines.append("not verified: give sample= to compare the outputs with the original's")
        for region in self.regions:
            if region.reason is not None:
                name = region.path or "the model"
                lines.append(f"left alone: {name} ({region.type}): {region.reason}")
            lines += [f"one node: {path}: {why}" for path, why in region.closed.items()]
        return lines

    def _passes(self) -> list[str]:
        if not self.records:
            return []
        rows = [("pass", "region", "nodes", "ms", "error")]
        below: list[list[str]] = [[]]
        for record in self.records:
            nodes = f"{record.nodes_before} -> {record.nodes_after}"
            if record.refused is not None:
                nodes = "refused"
            elif not record.changed:
                nodes = "no change"
            error = "" if record.max_error is None else f"{record.max_error:.2g}"
            ms = f"{1e3 * record.seconds:.1f}"
            rows.append((record.name, record.region or "model", nodes, ms, error))
            notes = [f"    {note}" for note in record.notes]
            notes += [f"    left alone: {left.what}: {left.why}" for left in record.left]
            if record.refused is not None:
                notes.append(f"    {record.refused}")
            below.append(notes)
        lines = ["", *_table(rows)]
        out = lines[:1]
        for line, notes in zip(lines[1:], below, strict=True):
            out += [line, *notes]
        return out

    def _candidates(self) -> list[str]:
        rows = [("form", "region", "ms", "of the original", "")]
        for region in self.regions:
            for one in region.candidates:
                share = one.seconds / max(region.candidates[0].seconds, 1e-12)
                kept = "kept" if one.kept else ""
                name = region.path or "model"
                rows.append((one.name, name, f"{1e3 * one.seconds:.3f}", f"{share:.2f}", kept))
        if len(rows) == 1:
            return []
        nothing = [r.path or "the model" for r in self.regions if r.kept_nothing]
        why = [f"nothing was kept for {name}: no form is faster than it was" for name in nothing]
        return ["", *_table(rows), *why]

    def _guards(self) -> list[str]:
        guards = self.guards()
        if not guards:
            return []
        rows = [("guard", "hits", "fallbacks")]
        rows += [(name, str(c["hits"]), str(c["fallbacks"])) for name, c in guards.items()]
        return ["", *_table(rows)]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
