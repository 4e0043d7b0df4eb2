"""What brt-dist raises for its users."""

from __future__ import annotations

from brt import BrtError


class ExchangeError(BrtError):
    """Ranks disagree about an exchange, one of them was called wrongly, or one is gone."""


class ParallelError(BrtError):
    """A model, or a placement of its experts, cannot be spread over these ranks."""
