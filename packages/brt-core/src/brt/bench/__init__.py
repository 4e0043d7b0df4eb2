"""Benchmarks: variants of one workload, measured side by side on a machine that is left alone."""

from brt.bench.probe import cache_bytes, num_sets_beyond_cache
from brt.bench.result import Machine, Result, Row, load, save
from brt.bench.run import make_workload, run
from brt.bench.settings import Instruments, Settings
from brt.bench.workload import Unavailable, Variant, Workload

__all__ = [
    "Instruments",
    "Machine",
    "Result",
    "Row",
    "Settings",
    "Unavailable",
    "Variant",
    "Workload",
    "cache_bytes",
    "load",
    "make_workload",
    "num_sets_beyond_cache",
    "run",
    "save",
]
