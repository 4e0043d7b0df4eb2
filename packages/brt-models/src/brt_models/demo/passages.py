"""Texts whose bytes were routed, and the colours of experts.

Legend: N bytes, L sparse layers.
"""

from __future__ import annotations

from dataclasses import dataclass

# Light enough for black letters, and apart for eyes that see no difference of red and green
COLOURS = (
    "#8ec8f0", "#f6b26b", "#a7d8a0", "#f4a6b8", "#c9b6e8", "#e8dc7a", "#9fe0d8", "#d2b79c",
)  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A text and the expert of each byte.

    Attributes:
        title: what the text is.
        raw: its bytes.
        expert_LN: of each byte, in each sparse layer.
        num_given: bytes that the model did not write.
    """

    title: str
    raw: bytes
    expert_LN: tuple[tuple[int, ...], ...]
    num_given: int


def letters(found: Passage) -> list[tuple[str, int]]:
    """Characters, each with the place of its first byte."""
    text, place = [], 0
    for letter in found.raw.decode(errors="surrogateescape"):
        size = len(letter.encode(errors="surrogateescape"))
        is_broken = "\udc80" <= letter <= "\udcff"
        text.append(("\ufffd" if is_broken else letter, place))
        place += size
    return text
