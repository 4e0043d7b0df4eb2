"""English text that every Python ships: the topics of its ``help()``, in three parts.

Topics quote each other, so that parts share no paragraph: what is held out stands nowhere else.
Other releases of Python word some paragraphs differently.
"""

from __future__ import annotations

import re
import zlib
from pydoc_data.topics import topics
from typing import Literal, get_args

import torch
from torch import Tensor

from brt.errors import BrtError

Part = Literal["train", "validation", "held-out"]

_BLANK = re.compile(r"\n\s*\n")
_TENTHS: dict[Part, range] = {
    "held-out": range(0, 1),
    "validation": range(1, 2),
    "train": range(2, 10),
}


def names(part: Part) -> tuple[str, ...]:
    """The topics of a part: a tenth of all names are held out, another tenth validates."""
    if part not in get_args(Part):
        raise BrtError(f"english.names: there are {', '.join(get_args(Part))}; got {part!r}")
    tenths = _TENTHS[part]
    return tuple(name for name in sorted(topics) if zlib.crc32(name.encode()) % 10 in tenths)


def text(part: Part) -> str:
    """The text of a part, each paragraph once, none of them part of what is more held out."""
    seen: set[str] = set()
    for other in _TENTHS:
        kept = [p for name in names(other) for p in _new_paragraphs(name, seen)]
        if other == part:
            return "\n\n".join(kept) + "\n"
    raise BrtError(f"english.text: there are {', '.join(get_args(Part))}; got {part!r}")


def ids(part: Part) -> Tensor:
    """The bytes of a part, int64."""
    return encoded(text(part))


def encoded(words: str) -> Tensor:
    """Text as the numbers of its UTF-8 bytes, int64."""
    return torch.tensor(list(words.encode()), dtype=torch.int64)


def decoded(ids_S: Tensor) -> str:
    """Bytes as text; those that are no UTF-8 become replacement characters."""
    return bytes(ids_S.tolist()).decode(errors="replace")


def _new_paragraphs(name: str, seen: set[str]) -> list[str]:
    """The paragraphs of a topic that are not in ``seen``, which gets them."""
    found = []
    for paragraph in _BLANK.split(topics[name].strip("\n")):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            found.append(paragraph.strip("\n"))
    return found
