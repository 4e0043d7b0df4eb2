"""Profiles: which cells went where, over sample inputs; what passes specialise a model to."""

from brt.profile.data import Loads, Profile, RouterProfile, signature
from brt.profile.measure import overhead
from brt.profile.record import Recorder, profile

__all__ = [
    "Loads",
    "Profile",
    "Recorder",
    "RouterProfile",
    "overhead",
    "profile",
    "signature",
]
