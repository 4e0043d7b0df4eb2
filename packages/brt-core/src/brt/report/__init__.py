"""The report of an optimisation: data, text, JSON and one page of HTML."""

from brt.report.data import (
    GraphView,
    Kind,
    NodeView,
    RegionReport,
    Report,
    RouterView,
)

__all__ = ["GraphView", "Kind", "NodeView", "RegionReport", "Report", "RouterView"]
