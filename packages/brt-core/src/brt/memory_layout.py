"""Where weights live, and where they lie in a copy of what is there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brt.errors import BrtError

PAGE = 4096
"""What reads past the system's cache begin and end at; also in a copy."""
_MADV_PAGEOUT = 21
_GAP = 256  # bytes between tensors that are copied along rather than start another copy


@dataclass(frozen=True, eq=False)
class Home:
    """Memory that weights live in.

    Attributes:
        flat: uint8, all of it: page-locked, or a file that is mapped, from its first byte.
        file: the file.
    """

    flat: Tensor
    file: Path | None = None

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor that lies at a place."""
        return _view(self.flat, offset, dtype, shape)

    def drop_pages(self) -> None:
        """Let the system forget what it has of a file; pages that were written to stay."""
        if self.file is None:
            return
        libc: Any = ctypes.CDLL(None)
        at, size = ctypes.c_void_p(self.flat.data_ptr()), ctypes.c_size_t(len(self.flat))
        libc.madvise(at, size, _MADV_PAGEOUT)  # or they are in use; an older kernel keeps them
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, eq=False)
class Place:
    """Where in a home a weight lives.

    Attributes:
        home, offset, num_bytes: the place.
        version: the weight's version when its file was read; at another version, or -1, what lies
            at home is no longer what the file says.
        loaded: (version, address) when `brt.memory.load` brought it elsewhere; None = it is here.
    """

    home: Home
    offset: int
    num_bytes: int
    version: int
    loaded: tuple[int, int] | None = None

    def view(self, like: Tensor) -> Tensor | None:
        """The tensor that lies there, of the form of another; None where it would not fit."""
        if like.nbytes > self.num_bytes:
            return None
        return self.home.view(self.offset, like.dtype, like.shape)

    def __deepcopy__(self, memo: Any) -> Place:
        """Itself, which the copy of a tensor is not in: see `is_at_home`."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # what is pickled lives nowhere


def set_home(tensor: Tensor, place: Place) -> None:
    """Note on a weight where it lives. A copy of it lives nowhere."""
    tensor._brt_place = place  # type: ignore[attr-defined]


def home_of(tensor: Tensor) -> Home | None:
    """The home of a weight, also while it is elsewhere."""
    place: Place | None = getattr(tensor, "_brt_place", None)
    return None if place is None else place.home


def is_at_home(tensor: Tensor) -> bool:
    """Whether a weight has a home and lies in it."""
    place: Place | None = getattr(tensor, "_brt_place", None)
    return (
        place is not None
        and tensor.data_ptr() == place.home.flat.data_ptr() + place.offset
        and tensor.is_contiguous()
    )


@dataclass(frozen=True)
class Piece:
    """Bytes of a home that are copied at once: ``[start, stop)`` there, from ``at`` on here."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Weights of one home, and where they lie in a copy of as few pieces of it as there are.

    Attributes:
        home: theirs.
        pieces: what is copied.
        num_bytes: of the copy, which begins at a page.
        views: (offset in the copy, dtype, shape) of each weight.
        versions: of each weight, for which the file holds.
    """

    home: Home
    pieces: tuple[Piece, ...]
    num_bytes: int
    views: tuple[tuple[int, torch.dtype, torch.Size], ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """Of weights that are at home, all in the same; raises `BrtError` where they are not."""
        places: list[Place] = [getattr(t, "_brt_place", None) for t in tensors]  # type: ignore[misc]
        if not all(map(is_at_home, tensors)) or len({id(p.home) for p in places}) != 1:
            raise BrtError(
                "memory: these weights have no common home; brt.memory.pin(module) gives them one"
            )
        spans = sorted(
            (p.offset, p.offset + t.nbytes) for p, t in zip(places, tensors, strict=True)
        )
        joined = [list(spans[0])]
        for start, stop in spans[1:]:
            if start <= joined[-1][1] + _GAP:
                joined[-1][1] = max(stop, joined[-1][1])
            else:
                joined.append([start, stop])
        # Each piece lies as far behind a page here as there, so that it can be read into place
        sizes = [-(-stop // PAGE) * PAGE - start // PAGE * PAGE for start, stop in joined]
        begins = [0, *accumulate(sizes)]
        pieces = tuple(
            Piece(start, stop, begin + start % PAGE)
            for (start, stop), begin in zip(joined, begins, strict=False)
        )
        views = tuple(
            (_at(pieces, place.offset), tensor.dtype, tensor.shape)
            for place, tensor in zip(places, tensors, strict=True)
        )
        versions = tuple(place.version for place in places)
        return cls(places[0].home, pieces, begins[-1], views, versions)

    def fill(self, buffer: Tensor, non_blocking: bool = False) -> None:
        """Copy what lies at home into memory of any device."""
        for piece in self.pieces:
            size = piece.stop - piece.start
            source = self.home.flat[piece.start : piece.stop]
            buffer[piece.at : piece.at + size].copy_(source, non_blocking=non_blocking)

    def read(self, buffer: Tensor, descriptor: int) -> int:
        """Read the file into memory of the CPU; returns the number of bytes read."""
        memory: Any = memoryview(buffer.numpy())  # type: ignore[arg-type]
        total = 0
        for piece in self.pieces:
            first, last = piece.start // PAGE * PAGE, -(-piece.stop // PAGE) * PAGE
            begin, done = piece.at - piece.start % PAGE, 0
            while first + done < piece.stop:
                got = os.preadv(
                    descriptor, [memory[begin + done : begin + last - first]], first + done
                )
                if not got:
                    raise BrtError(f"memory: {self.home.file} is shorter than it was")
                done += got
            total += done
        return total

    def tensors(self, buffer: Tensor) -> list[Tensor]:
        """The weights as they lie in a copy."""
        return [_view(buffer, at, dtype, shape) for at, dtype, shape in self.views]


def open_past_cache(file: Path) -> int:
    """A descriptor whose reads leave no pages in the system's cache, where that can be had."""
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # such as one in memory
        return os.open(file, os.O_RDONLY)


def page_aligned(num_bytes: int) -> Tensor:
    """New memory of the CPU that begins at a page; nothing is touched yet."""
    pages = mmap.mmap(-1, num_bytes + PAGE)
    flat = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -flat.data_ptr() % PAGE
    return flat[begin : begin + num_bytes]


def pages_in_memory(at: int, num_bytes: int) -> list[bool]:
    """Which pages of a mapping are in memory, from the one that holds ``at`` on."""
    first, last = at // mmap.PAGESIZE, (at + num_bytes - 1) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * (last - first + 1))()
    libc: Any = ctypes.CDLL(None, use_errno=True)
    where, size = first * mmap.PAGESIZE, (last - first + 1) * mmap.PAGESIZE
    if libc.mincore(ctypes.c_void_p(where), ctypes.c_size_t(size), found):
        raise OSError(ctypes.get_errno(), "mincore")
    return [bool(one & 1) for one in found]


def _at(pieces: Sequence[Piece], offset: int) -> int:
    piece = next(p for p in pieces if p.start <= offset < p.stop)
    return piece.at + offset - piece.start


def _view(flat: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return flat[offset : offset + count * dtype.itemsize].view(dtype).view(shape)
