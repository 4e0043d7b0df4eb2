"""Routing protocols: from scores to the paths each cell takes."""

from brt.protocols.base import Protocol
from brt.protocols.top_k import TopK

BUILTIN: list[type[Protocol]] = [TopK]

__all__ = ["BUILTIN", "Protocol", "TopK"]
