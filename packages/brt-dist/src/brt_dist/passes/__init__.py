"""Passes on models whose experts are spread over ranks; every rank optimises alike."""

from brt_dist.passes.overlap_exchange import OverlapExchange
from brt_dist.passes.place_experts import PlaceExperts

__all__ = ["OverlapExchange", "PlaceExperts"]
