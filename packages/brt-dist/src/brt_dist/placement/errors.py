"""What placement raises for its users."""

from __future__ import annotations

from brt.errors import BrtError


class PlacementError(BrtError):
    """A placement cannot be planned, read or applied; the message says what to do."""
