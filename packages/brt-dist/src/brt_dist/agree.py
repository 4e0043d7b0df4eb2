"""Ranks agree on an exchange before rows move: counts travel with a header that all compare.

Every rank sees every header, so that what is wrong on one rank is the same error on all of them,
and nobody waits for rows that never come. The first message has one size whatever it says.

Legend: W ranks, C columns of counts, B words of a message.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from brt import BrtError
from brt_dist.errors import ExchangeError
from brt_dist.groups import Group, global_rank, host_device, naming_failures

Words = NDArray[np.int64]

MAGIC = 0x627274_64697374  # "brtdist"
VERSION = 2

# A message: these words, the text, the first columns of counts.
_MAGIC, _VERSION, _IS_PROBLEM, _NUM_COLUMNS, _GRAD_MODE, _LENGTH, _CHECKSUM = range(7)
_TEXT, _TEXT_BYTES = 7, 448
# From here on ranks may differ
_OWN = _TEXT + _TEXT_BYTES // 8
_GRAD_FLOWS, _COUNTS = _OWN, _OWN + 1
_NUM_WORDS = 128
_NUM_FIRST = _NUM_WORDS - _COUNTS


@dataclass(frozen=True, eq=False)
class Agreed:
    """What the ranks told one another.

    Attributes:
        received_WC: int64 on the host, the counts that each rank sent to this one.
        grad_flows: bit i is set where some rank needs the gradient of flow i.
    """

    received_WC: Tensor
    grad_flows: int


def agree(
    what: str, signature: str, counts_WC: Tensor, group: Group, *, grad_flows: int = 0
) -> Agreed:
    """Send row w of the counts to rank w, if all ranks have the same signature and columns.

    ``signature`` says in words what is exchanged. A rank that differs, or that reported a problem
    of its own (`telling`), is an `ExchangeError` on every rank.
    """
    # numpy: of so few numbers, torch would take several times as long
    own_WC, num_columns = counts_WC.numpy(), counts_WC.shape[1]
    message_WB = _message(group, signature, num_columns)
    message_WB[:, _GRAD_FLOWS] = grad_flows
    message_WB[:, _COUNTS : _COUNTS + num_columns] = own_WC[:, :_NUM_FIRST]
    headers_WB = _swap(what, message_WB, group)
    if not np.array_equal(headers_WB[:, :_OWN], message_WB[:, :_OWN]):
        _raise_difference(what, headers_WB, group)
    received_WC = headers_WB[:, _COUNTS : _COUNTS + num_columns]
    if num_columns > _NUM_FIRST:
        rest_WC = _swap(what, np.ascontiguousarray(own_WC[:, _NUM_FIRST:]), group)
        received_WC = np.concatenate([received_WC, rest_WC], 1)
    needed = int(np.bitwise_or.reduce(headers_WB[:, _GRAD_FLOWS]))
    return Agreed(torch.from_numpy(received_WC), needed)


@contextmanager
def telling(what: str, group: Group) -> Iterator[None]:
    """An error inside, on this rank, is one on every rank: they learn it in place of a header."""
    try:
        yield
    except (BrtError, IndexError, TypeError, ValueError, RuntimeError) as error:
        tell(what, str(error), group, error)


def tell(what: str, problem: str, group: Group, cause: Exception | None = None) -> NoReturn:
    """Report a problem of this rank to all, in place of `agree`, and raise it as what it was."""
    message_WB = _message(group, problem, 0)
    message_WB[:, _IS_PROBLEM] = 1
    headers_WB = _swap(what, message_WB, group)
    try:
        _raise_difference(what, headers_WB, group)
    except ExchangeError as error:
        kind = type(cause) if isinstance(cause, BrtError) else ExchangeError
        raise kind(str(error)) from cause


def _message(group: Group, text: str, num_columns: int) -> Words:
    message_WB = np.zeros((dist.get_world_size(group), _NUM_WORDS), np.int64)
    message_WB[:, :_OWN] = _header(text)
    message_WB[:, _NUM_COLUMNS] = num_columns
    message_WB[:, _GRAD_MODE] = torch.is_grad_enabled()
    return message_WB


@functools.lru_cache(maxsize=256)
def _header(text: str) -> Words:
    data = text.encode()
    shown = data[:_TEXT_BYTES]
    words = np.zeros(_OWN, np.int64)
    words[_MAGIC], words[_VERSION] = MAGIC, VERSION
    words[_LENGTH], words[_CHECKSUM] = len(shown), zlib.crc32(data)
    words[_TEXT:] = np.frombuffer(shown.ljust(_TEXT_BYTES, b"\0"), np.int64)
    return words


def _swap(what: str, words_WB: Words, group: Group) -> Words:
    """Row w of each rank goes to rank w."""
    sent = torch.from_numpy(words_WB).to(host_device(group))
    received = torch.empty_like(sent)
    with naming_failures(what, group):
        dist.all_to_all_single(received, sent, group=group)
    swapped: Words = received.cpu().numpy()
    return swapped


def _text(header_B: Words) -> str:
    data = header_B[_TEXT:_OWN].tobytes()[: int(header_B[_LENGTH])]
    return data.decode(errors="replace")


def _raise_difference(what: str, headers_WB: Words, group: Group) -> NoReturn:
    """Raise the first difference between the ranks, the same one on every rank."""
    first_B, rank = headers_WB[0], functools.partial(global_rank, group)
    for w, header_B in enumerate(headers_WB):
        if header_B[_MAGIC] != MAGIC:
            raise ExchangeError(f"{what}: what rank {rank(w)} sent is no exchange of brt_dist")
        if header_B[_VERSION] != VERSION:
            raise ExchangeError(
                f"{what}: rank {rank(w)} has version {int(header_B[_VERSION])} of the exchange, "
                f"this rank version {VERSION}: install one brt-dist on all hosts"
            )
    for w, header_B in enumerate(headers_WB):
        if header_B[_IS_PROBLEM]:
            raise ExchangeError(f"{what}: on rank {rank(w)}: {_text(header_B)}")
    for w, header_B in enumerate(headers_WB):
        _compare_two(what, header_B, first_B, rank(w), rank(0))
    raise AssertionError("ranks that differ differ in something")


def _compare_two(what: str, one_B: Words, first_B: Words, one: int, first: int) -> None:
    if one_B[_CHECKSUM] != first_B[_CHECKSUM] or _text(one_B) != _text(first_B):
        raise ExchangeError(
            f"{what}: rank {one} sends {_text(one_B)}, but rank {first} {_text(first_B)}"
        )
    if one_B[_NUM_COLUMNS] != first_B[_NUM_COLUMNS]:
        raise ExchangeError(
            f"{what}: rank {one} counts rows for {int(one_B[_NUM_COLUMNS])} experts on a rank, but "
            f"rank {first} for {int(first_B[_NUM_COLUMNS])}"
        )
    if one_B[_GRAD_MODE] != first_B[_GRAD_MODE]:
        modes = ("without gradients (torch.no_grad)", "with gradients")
        raise ExchangeError(
            f"{what}: rank {one} runs {modes[int(one_B[_GRAD_MODE])]}, but rank {first} "
            f"{modes[int(first_B[_GRAD_MODE])]}: the backward of one would wait for the other"
        )
