"""What brt-dist offers to brt."""

from __future__ import annotations
