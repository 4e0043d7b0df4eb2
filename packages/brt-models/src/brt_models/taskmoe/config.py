"""The shape of a TaskMoE."""

from __future__ import annotations

from dataclasses import dataclass

from brt.errors import BrtError


@dataclass(frozen=True)
class TaskMoEConfig:
    """Shape of the decoder; the defaults are what Brainstorm measured (its figure 17).

    ``seed`` draws the two experts of each task; with ``placement_aware`` they are neighbours.
    """

    num_tasks: int = 16
    num_layers: int = 6
    hidden_size: int = 512
    num_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 50358
    max_positions: int = 512
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    seed: int = 0
    placement_aware: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_tasks", "num_layers", "hidden_size", "num_heads", "intermediate_size",
            "vocab_size", "max_positions",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise BrtError(
                    f"TaskMoEConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.hidden_size % self.num_heads:
            raise BrtError(
                f"TaskMoEConfig: {self.num_heads} heads do not share hidden_size="
                f"{self.hidden_size} evenly"
            )
        if not 0 <= self.dropout < 1:
            raise BrtError(f"TaskMoEConfig: dropout must be from 0 to below 1, got {self.dropout}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise BrtError(
                f"TaskMoEConfig: pad_token_id={self.pad_token_id} is none of {self.vocab_size} "
                "tokens"
            )
