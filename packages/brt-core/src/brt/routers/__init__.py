"""Routers: where cells part, and where they meet again."""

from brt.routers.base import Router
from brt.routers.exit import EarlyExit
from brt.routers.experts import ExpertRouter
from brt.routers.gather import GatherRouter
from brt.routers.loop import LoopRouter
from brt.routers.scatter import ScatterRouter

__all__ = ["EarlyExit", "ExpertRouter", "GatherRouter", "LoopRouter", "Router", "ScatterRouter"]
