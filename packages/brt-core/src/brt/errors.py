"""What brt raises for its users. An `AssertionError` is a bug of ours instead."""

from __future__ import annotations


class BrtError(ValueError):
    """Something that the caller can mend; the message says what came and what to do."""


class ProtocolError(BrtError):
    """A protocol, or the scores it was given, cannot make a decision."""


class RouteError(BrtError):
    """Cells, a route or the rows of a router do not fit together."""


class TraceError(BrtError):
    """A module cannot be traced."""


class ProfileError(BrtError):
    """A profile is missing, damaged or of another model."""


class PassError(BrtError):
    """A pass cannot take this graph, or failed on it."""


class PluginError(BrtError):
    """A plugin breaks the rules, two of them clash, or a name is not offered by any."""


class KernelError(BrtError):
    """No kernel takes these arguments, the one named refuses them, or one met a bad index."""


class CheckpointError(BrtError):
    """A checkpoint does not fit: ``complaints`` are all that ``what``, a model or a file, has."""

    def __init__(self, what: str, complaints: tuple[str, ...]) -> None:
        super().__init__(what, complaints)
        self.what, self.complaints = what, complaints

    def __str__(self) -> str:
        count = f"{len(self.complaints)} complaint{'s' if len(self.complaints) > 1 else ''}"
        return f"{self.what} does not fit, {count}:\n  " + "\n  ".join(self.complaints)


class PluginWarning(UserWarning):
    """A plugin was left out, or something that it was asked to do was skipped."""
