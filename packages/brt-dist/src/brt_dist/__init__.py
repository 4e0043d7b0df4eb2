"""Experts on several ranks: sparse exchange, expert parallelism and placement."""

from brt_dist import reference
from brt_dist.errors import ExchangeError, ParallelError
from brt_dist.exchange import Exchange, Handle, reverse_all_to_all, sparse_all_to_all

__all__ = [
    "Exchange",
    "ExchangeError",
    "Handle",
    "ParallelError",
    "reference",
    "reverse_all_to_all",
    "sparse_all_to_all",
]
