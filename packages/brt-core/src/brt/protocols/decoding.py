"""Decoding: sequences that have ended leave the loop.

N cells (sequences).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import Protocol, check_at_least, check_id_form, check_two_paths


@dataclass(frozen=True)
class GreedyDecoding(Protocol):
    """A sequence takes path 1 once its last token ends it, path 0 while it goes on. No weights.

    Takes int64 tokens ``[N]``, the last of each sequence. A token ends a sequence if it is one of
    ``eos``, or ``pad``, which a sequence that ended before repeats. Brainstorm's
    ``decoder_greedy_search`` (F21) means the same but does not run; its skipping of the test until
    an expected length saves nothing here and is left out.
    """

    name: ClassVar[str] = "greedy-decoding"
    paper: ClassVar[str] = (
        "Cui et al. 2023, Optimizing Dynamic Neural Networks with Brainstorm, OSDI 2023"
    )

    eos: int | tuple[int, ...]
    pad: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.eos == ():
            raise ProtocolError(f"{self.name}: eos must name at least one token")
        for token in self._last_tokens():
            check_at_least(self.name, "a token of eos or pad", token, 0)

    def _last_tokens(self) -> tuple[int, ...]:
        eos = self.eos if isinstance(self.eos, tuple) else (self.eos,)
        return eos if self.pad is None else (*eos, self.pad)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are int64 tokens ``[N]``, and P = 2."""
        check_two_paths(self.name, num_paths)
        check_id_form(self.name, scores)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        first, *others = self._last_tokens()
        ended_N = scores == first
        for token in others:
            ended_N = ended_N | (scores == token)
        return Decision(num_paths, choice_NK=ended_N.to(torch.int64).unsqueeze(1))

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N."""
        return num_cells
