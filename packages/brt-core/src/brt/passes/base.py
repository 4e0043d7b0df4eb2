"""What a pass is: a rewrite of a traced graph, with the record of what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Left:
    """Something that a pass looked at and left alone."""

    what: str
    why: str


@dataclass(frozen=True)
class Record:
    """What one pass did to one region.

    Attributes:
        name: of the pass.
        region: module path of the region; "" is the whole model.
        seconds: that `run` and the clean-up after it took.
        nodes_before, nodes_after: of the region's graph.
        changed: whether the graph is another one now.
        notes: what it decided, and why; a sentence each.
        left: what it left alone, and why.
        refused: why the pass did not take this region; None where it did.
        max_error: the largest difference from the original's output on the sample, after this
            pass; None where nothing was compared.
    """

    name: str
    region: str
    seconds: float
    nodes_before: int
    nodes_after: int
    changed: bool
    notes: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    refused: str | None = None
    max_error: float | None = None

    def __str__(self) -> str:
        where = self.region or "model"
        if self.refused is not None:
            return f"{self.name} on {where}: refused: {self.refused}"
        what = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.changed else "no change"
        return f"{self.name} on {where}: {what}, {1e3 * self.seconds:.1f} ms"

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "name": self.name,
            "region": self.region,
            "seconds": self.seconds,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "changed": self.changed,
            "notes": list(self.notes),
            "left": [{"what": left.what, "why": left.why} for left in self.left],
            "refused": self.refused,
            "max_error": self.max_error,
        }
