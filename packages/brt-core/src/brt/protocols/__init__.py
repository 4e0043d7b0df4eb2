"""Routing protocols: from scores to the paths each cell takes."""

from brt.protocols.base import Protocol
from brt.protocols.capacity import CapacityTopK, Switch
from brt.protocols.decoding import GreedyDecoding
from brt.protocols.expert_choice import ExpertChoice
from brt.protocols.ids import Hash, Label, Task
from brt.protocols.synthetic import MissHit, Random, Uniform
from brt.protocols.threshold import BinaryThreshold, ResidualThreshold, Threshold
from brt.protocols.top_k import NoisyTopK, TopK

BUILTIN: list[type[Protocol]] = [
    TopK,
    NoisyTopK,
    Threshold,
    ResidualThreshold,
    BinaryThreshold,
    Label,
    Task,
    Hash,
    Switch,
    CapacityTopK,
    ExpertChoice,
    GreedyDecoding,
    Random,
    Uniform,
    MissHit,
]

__all__ = [
    "BUILTIN",
    "BinaryThreshold",
    "CapacityTopK",
    "ExpertChoice",
    "GreedyDecoding",
    "Hash",
    "Label",
    "MissHit",
    "NoisyTopK",
    "Protocol",
    "Random",
    "ResidualThreshold",
    "Switch",
    "Task",
    "Threshold",
    "TopK",
    "Uniform",
]
