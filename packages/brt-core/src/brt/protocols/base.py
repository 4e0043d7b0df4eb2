"""What a protocol is: scores in, the paths each cell takes out.

N cells, P paths, G groups of S cells (N = G * S).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from brt import checks
from brt.decision import Decision
from brt.errors import ProtocolError


class Protocol(ABC):
    """A routing function. Subclasses are frozen dataclasses: their fields are their options.

    Arithmetic on scores (softmax, sums, renormalising, noise) runs in float32, or in float64 for
    float64 scores, also under ``torch.autocast``, and its result stays so. Scores that are only
    picked keep their dtype.

    Protocols that draw random numbers take a ``generator``; None is torch's own of the device.
    Leave it None under ``torch.compile``, which cannot take one, and under activation
    checkpointing, which replays the state of torch's own only.
    """

    name: ClassVar[str]
    """Kebab-case and unique."""
    paper: ClassVar[str]
    """Where the rule comes from."""

    @property
    def stochastic(self) -> bool:
        """Whether these options draw random numbers."""
        return False

    def without_noise(self) -> Self:
        """Return this protocol as it decides in evaluation; itself, where it adds no noise."""
        return self

    def __call__(self, scores: Tensor, num_paths: int) -> Decision:
        """Check the scores and decide; raises `ProtocolError` on scores it cannot take."""
        self.check(scores, num_paths)
        return self.decide(scores, num_paths)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are ``[N, P]`` floats without NaN."""
        check_scores(self.name, scores, num_paths)

    @abstractmethod
    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide for scores that `check` has passed. Capacity is declared, never applied."""

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return the most rows that a decision for so many cells can route: what to allocate.

        ``group_size`` is the number of cells in which a capacity is counted, S of scores
        ``[G, S, P]`` and N of ``[N, P]``; None bounds them all.
        """
        return num_cells * num_paths


def check_scores(
    name: str, scores: Tensor, num_paths: int, *, grouped: bool = False, per_path: int = 1
) -> None:
    """Raise unless ``scores`` are floats ``[N, per_path * P]`` without NaN.

    With ``grouped`` also ``[G, S, P]``.
    """
    if scores.ndim != 2 and not (grouped and scores.ndim == 3):
        raise ProtocolError(
            f"{name}: scores must be {'[N, P] or [G, S, P]' if grouped else '[N, P]'}, "
            f"got shape {tuple(scores.shape)}; cells come first (brt.annotate makes rows of them)"
        )
    if scores.shape[-1] != per_path * num_paths:
        raise ProtocolError(
            f"{name}: scores of shape {tuple(scores.shape)} came for {num_paths} paths; "
            f"the last dim must be {per_path * num_paths}"
        )
    check_floats(name, scores)


def check_floats(name: str, scores: Tensor) -> None:
    """Raise unless ``scores`` are floats and none of them is NaN."""
    if not scores.is_floating_point():
        raise ProtocolError(
            f"{name}: scores must be floats, got {scores.dtype}; "
            "ids are for the protocols label, task, hash and greedy-decoding"
        )
    checks.check_not_nan(
        scores,
        f"{name}: scores hold NaN",
        detail=lambda: _where_nan(scores),
        error=ProtocolError,
    )


def check_id_form(name: str, ids_N: Tensor) -> None:
    """Raise unless ``ids_N`` are int64 ``[N]``."""
    if ids_N.ndim != 1 or ids_N.dtype != torch.int64:
        raise ProtocolError(
            f"{name}: scores must be int64 ids [N], one a cell, "
            f"got {ids_N.dtype} of shape {tuple(ids_N.shape)}"
        )


def check_ids(name: str, ids_N: Tensor, num_ids: int) -> None:
    """Raise unless ``ids_N`` are int64 ``[N]`` in ``range(num_ids)``."""
    check_id_form(name, ids_N)
    if not checks.wanted(ids_N) or ids_N.numel() == 0:
        return
    least, most = torch.aminmax(ids_N)
    checks.check_values(
        (least >= 0) & (most < num_ids),
        f"{name}: ids must lie in range({num_ids})",
        detail=lambda: _where_outside(ids_N, num_ids),
        error=ProtocolError,
    )


def check_two_paths(name: str, num_paths: int) -> None:
    """Raise unless there are two paths."""
    if num_paths != 2:
        raise ProtocolError(f"{name} decides between 2 paths, but num_paths is {num_paths}")


def check_k(name: str, k: int, num_paths: int) -> None:
    """Raise if a cell is to take more paths than there are."""
    if k > num_paths:
        raise ProtocolError(
            f"{name}: each cell is to take k={k} paths, but there are {num_paths}; "
            "lower k or raise num_paths"
        )


def check_at_least(name: str, option: str, value: object, least: int) -> None:
    """Raise unless an option is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ProtocolError(f"{name}: {option} must be an integer >= {least}, got {value!r}")


def check_generator(name: str, generator: torch.Generator | None, scores: Tensor) -> None:
    """Raise where random numbers for ``scores`` cannot be drawn from ``generator``."""
    if generator is None:
        return
    if torch.compiler.is_compiling():
        raise ProtocolError(
            f"{name}: torch.compile and torch.export cannot draw from a generator; "
            "leave generator=None and seed with torch.manual_seed"
        )
    if generator.device.type != scores.device.type:
        raise ProtocolError(
            f"{name}: the generator is on {generator.device}, but the scores are on "
            f"{scores.device}; make it with torch.Generator(device={str(scores.device)!r})"
        )


def in_float32(scores: Tensor) -> Tensor:
    """Return float16 and bfloat16 scores as float32, others as they are."""
    return scores if scores.dtype == torch.float64 else scores.float()


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dim, in float32 or better."""
    return torch.softmax(in_float32(scores), dim=-1)


def at_least(size: int, least: int) -> int:
    """Return the larger of two sizes; puts no guard on a symbolic one."""
    # torch.compile turns max into sym_max, and up to torch 2.11 takes no sym_max of plain ints
    return max(size, least) if isinstance(size, int) else torch.sym_max(size, least)


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return random numbers in [0, 1), of the shape of ``like`` whatever its strides."""
    # Naming generator=None fails on symbolic sizes, torch 2.13
    if generator is None:
        return torch.rand(like.shape, device=like.device, dtype=like.dtype)
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal random numbers, of the shape of ``like`` whatever its strides."""
    if generator is None:
        return torch.randn(like.shape, device=like.device, dtype=like.dtype)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _where_nan(scores: Tensor) -> str:
    nan = scores.detach().isnan()
    first = nan.nonzero()[0].tolist()
    return (
        f"{int(nan.sum())} of {scores.numel()}, the first at {first} of {tuple(scores.shape)}; "
        "look for NaN or infinity in the gate's input and weights"
    )


def _where_outside(ids_N: Tensor, num_ids: int) -> str:
    outside = (ids_N < 0) | (ids_N >= num_ids)
    first = int(outside.nonzero()[0])
    return (
        f"{int(outside.sum())} of {ids_N.numel()} do not, the first is {int(ids_N[first])} "
        f"of cell {first}"
    )
