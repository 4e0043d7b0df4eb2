"""What a benchmark found: rows, the machine, and the JSON of both.

One file holds the results of one command (a sweep has several)::

    {
      "schema": "brt-bench/1",
      "results": [{
        "workload": str, "shapes": str, "dtype": "float32", "device": "cpu", "threads": int,
        "options": {name: value},
        "disturbed": bool,              # fewer clean rounds than wanted: not to be quoted
        "disturbances": [str],          # what was seen in the rounds that were thrown away
        "rounds": int,                  # clean rounds
        "rounds_rejected": int,
        "settings": {...},              # fields of brt.bench.Settings
        "machine": {
          "name": str,                  # of the GPU or the CPU
          "cores": int, "gemm_gflops": float, "copy_gbps": float, "cache_bytes": int,
          "load_average": float | null, "keeps_memory": bool,
          "versions": {"python": str, "torch": str, "brt-core": str, ...}
        },
        "rows": [{
          "variant": str, "kind": "eager" | "peer" | "brt" | "limit" | "oracle" | "part",
          "status": "ok" | "wrong" | "failed" | "skipped",
          "reason": str,                # why not ok
          "detail": str,
          "samples": int,
          "median_ms": float | null, "p95_ms": ..., "min_ms": ...,
          "ratio_to_eager": ...,        # eager's median over this one's: above 1 is faster
          "best_peer": str | null, "ratio_to_best_peer": ...,
          "limit": str | null, "limit_fraction": ...,   # the limit's median over this one's
          "gbps": ..., "gflops": ...,
          "error": ...,                 # largest, relative to the reference's largest magnitude
          "tolerance": float
        }]
      }]
    }

A number that there is not is null. A row that is not "ok" has no times and no ratios. Rows of kind
"part" are steps reported apart and have no ratios.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from brt.bench.workload import COMPETITORS, Kind
from brt.errors import BrtError
from brt.files import atomic_write

SCHEMA = "brt-bench/1"

Status = Literal["ok", "wrong", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant, as the module's docstring has it."""

    variant: str
    kind: Kind
    status: Status
    tolerance: float
    reason: str = ""
    detail: str = ""
    samples: int = 0
    median_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    ratio_to_eager: float | None = None
    best_peer: str | None = None
    ratio_to_best_peer: float | None = None
    limit: str | None = None
    limit_fraction: float | None = None
    gbps: float | None = None
    gflops: float | None = None
    error: float | None = None

    def with_times(
        self, milliseconds: Sequence[float], num_bytes: float | None, flops: float | None
    ) -> Row:
        """The row with what these samples (sorted) amount to."""
        if not milliseconds:
            return self
        median = statistics.median(milliseconds)

        def rate(amount: float | None) -> float | None:
            return None if amount is None or median <= 0 else amount / median / 1e6

        return replace(
            self,
            samples=len(milliseconds),
            median_ms=median,
            p95_ms=milliseconds[math.ceil(0.95 * len(milliseconds)) - 1],
            min_ms=milliseconds[0],
            gbps=rate(num_bytes),
            gflops=rate(flops),
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it ran: a number names its machine."""

    name: str
    cores: int
    gemm_gflops: float
    copy_gbps: float
    cache_bytes: int
    load_average: float | None
    keeps_memory: bool
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One workload, measured."""

    workload: str
    shapes: str
    dtype: str
    device: str
    threads: int
    machine: Machine
    rows: tuple[Row, ...]
    disturbed: bool
    rounds: int
    rounds_rejected: int
    disturbances: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Row, ...]:
        """Rows of our own variants that are wrong or failed."""
        return tuple(r for r in self.rows if r.kind == "brt" and r.status in ("wrong", "failed"))

    def row(self, variant: str) -> Row:
        """The row of a variant."""
        for row in self.rows:
            if row.variant == variant:
                return row
        names = ", ".join(row.variant for row in self.rows)
        raise BrtError(f"{self.workload!r} has no variant {variant!r}; it has: {names}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one entry of "results"."""
        return asdict(self)

    def __str__(self) -> str:
        from brt.bench.table import as_text

        return as_text(self)


def compared(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with their ratios; what is not "ok" takes no part."""
    timed = [row for row in rows if row.status == "ok" and row.median_ms]
    eager = next((row for row in timed if row.kind == "eager"), None)
    peers = [row for row in timed if row.kind in COMPETITORS]
    best = min(peers, key=_median, default=None)
    limits = [row for row in timed if row.kind == "limit"]
    limit = max(limits, key=_median, default=None)
    return tuple(
        replace(
            row,
            ratio_to_eager=_ratio(eager, row),
            best_peer=None if best is None else best.variant,
            ratio_to_best_peer=_ratio(best, row),
            limit=None if limit is None else limit.variant,
            limit_fraction=_ratio(limit, row),
        )
        if row in timed and row.kind != "part"
        else row
        for row in rows
    )


def as_json(results: Sequence[Result]) -> str:
    """The text of a file, as the module's docstring has it."""
    data = {"schema": SCHEMA, "results": [result.to_dict() for result in results]}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def save(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write results as JSON: the whole file or, where anything stops it, nothing."""
    text = as_json(results)
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def load(path: str | os.PathLike[str]) -> list[Result]:
    """Read what `save` wrote; `BrtError` where it is something else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = data.get("schema")
    except (OSError, ValueError, AttributeError) as error:
        raise BrtError(f"{path} holds no benchmark results: {error}") from error
    if schema != SCHEMA:
        raise BrtError(f"{path} has schema {schema!r}; this brt reads {SCHEMA!r}")
    try:
        return [_result(entry) for entry in data["results"]]
    except (KeyError, TypeError) as error:
        raise BrtError(f"{path} is damaged: {error}") from error


def _result(entry: dict[str, Any]) -> Result:
    rows = tuple(Row(**row) for row in entry["rows"])
    made = {"machine": Machine(**entry["machine"]), "rows": rows}
    return Result(**(entry | made | {"disturbances": tuple(entry["disturbances"])}))


def _median(row: Row) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _ratio(base: Row | None, row: Row) -> float | None:
    return None if base is None else _median(base) / _median(row)
