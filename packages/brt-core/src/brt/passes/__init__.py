"""Passes: rewrites of traced graphs, driven by a profile and kept right by guards."""

from brt.passes.base import Left, Record

__all__ = ["Left", "Record"]
