"""A report from the JSON that `Report.to_json` gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brt.errors import BrtError
from brt.passes.base import Candidate, Left, Record
from brt.report.data import SCHEMA, GraphView, NodeView, RegionReport, Report, RouterView


def from_json(data: Any) -> Report:
    """The report of these plain values; guards keep the counts that they had when it was saved."""
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema is None:
        raise BrtError(
            "this is no report of brt: it has no schema; fast.report.to_json() makes one"
        )
    if schema != SCHEMA:
        raise BrtError(f"a report of schema {schema!r}; this brt reads {SCHEMA}")
    try:
        return _report(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrtError(f"a damaged report: {type(error).__name__}: {error}") from error


def _report(data: Mapping[str, Any]) -> Report:
    counts = {name: _Count(c["hits"], c["fallbacks"]) for name, c in data["guards"].items()}
    return Report(
        model=data["model"],
        num_parameters=data["num_parameters"],
        device=data["device"],
        regions=tuple(_region(region) for region in data["regions"]),
        passes=tuple(data["passes"]),
        versions=data["versions"],
        verified=data["verified"],
        max_error=data["max_error"],
        profile=data["profile"],
        stats=lambda: counts,
    )


class _Count:
    """What a guard counted."""

    def __init__(self, hits: int, fallbacks: int) -> None:
        self.hits, self.fallbacks = int(hits), int(fallbacks)


def _region(data: Mapping[str, Any]) -> RegionReport:
    return RegionReport(
        path=data["path"],
        type=data["type"],
        reason=data["reason"],
        before=_graph(data["before"]),
        after=_graph(data["after"]),
        records=tuple(_record(record) for record in data["records"]),
        routers=tuple(_router(router) for router in data["routers"]),
        closed=data.get("closed", {}),
        candidates=tuple(
            Candidate(tuple(one["passes"]), one["seconds"], one["kept"])
            for one in data.get("candidates", ())
        ),
    )


def _graph(data: Mapping[str, Any] | None) -> GraphView | None:
    if data is None:
        return None
    nodes = (
        NodeView(**(node | {"inputs": tuple(node["inputs"]), "users": tuple(node["users"])}))
        for node in data["nodes"]
    )
    return GraphView(tuple(nodes))


def _record(data: dict[str, Any]) -> Record:
    left = tuple(Left(one["what"], one["why"]) for one in data["left"])
    return Record(**(data | {"notes": tuple(data["notes"]), "left": left}))


def _router(data: dict[str, Any]) -> RouterView:
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    percentiles = {q: tuple(rows_P) for q, rows_P in data["rows_percentiles_P"].items()}
    return RouterView(**(data | lists | {"rows_percentiles_P": percentiles}))
