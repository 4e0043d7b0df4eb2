"""A cell takes the paths, or the one of two paths, that a threshold on its scores gives it.

N cells, P paths, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import (
    Protocol,
    check_at_least,
    check_floats,
    check_two_paths,
    in_float32,
    softmax,
)

Confidence = Literal["max-softmax", "entropy", "score"]


@dataclass(frozen=True)
class Threshold(Protocol):
    """Each cell takes every path whose score is above the threshold; none, one or many.

    Strictly above. With ``residual_path`` a cell above on no path takes that one. The weights are
    the scores, of the residual path too. As Brainstorm's ``threshold`` (F12), where -1 stands for
    no residual path; here that is None.
    """

    name: ClassVar[str] = "threshold"
    paper: ClassVar[str] = (
        "Li et al. 2020, Learning Dynamic Routing for Semantic Segmentation, arXiv:2003.10401"
    )

    threshold: float = 0.0
    residual_path: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_threshold(self.name, self.threshold)
        if self.residual_path is not None:
            check_at_least(self.name, "residual_path", self.residual_path, 0)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are ``[N, P]`` floats without NaN."""
        super().check(scores, num_paths)
        if self.residual_path is not None and self.residual_path >= num_paths:
            raise ProtocolError(
                f"{self.name}: residual_path={self.residual_path} is none of {num_paths} paths"
            )

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``mask_NP``."""
        mask_NP = in_float32(scores) > self.threshold
        if self.residual_path is not None:
            path_P = torch.arange(num_paths, device=scores.device)
            none_N1 = ~mask_NP.any(dim=1, keepdim=True)
            mask_NP = mask_NP | (none_N1 & (path_P == self.residual_path))
        return Decision(num_paths, mask_NP=mask_NP, weight=scores)


@dataclass(frozen=True)
class ResidualThreshold(Protocol):
    """A cell whose scores sum to less than the threshold takes the residual path, else the other.

    Two paths; the scores may be of any number of gates, ``[N, C]``. No weights. As Brainstorm's
    ``residual_threshold`` (F13).
    """

    name: ClassVar[str] = "residual-threshold"
    paper: ClassVar[str] = (
        "Li et al. 2020, Learning Dynamic Routing for Semantic Segmentation, arXiv:2003.10401"
    )

    threshold: float = 0.0
    residual_path: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        """Check the options."""
        _check_threshold(self.name, self.threshold)
        _check_one_of_two(self.name, "residual_path", self.residual_path)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are ``[N, C]`` floats without NaN, and P = 2."""
        check_two_paths(self.name, num_paths)
        _check_columns(self.name, scores)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        low_N1 = in_float32(scores.detach()).sum(dim=1, keepdim=True) < self.threshold
        return Decision(num_paths, choice_NK=_either(low_N1, self.residual_path))

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N."""
        return num_cells


@dataclass(frozen=True)
class BinaryThreshold(Protocol):
    """A confident cell takes ``selected_path``, the others the other one: early exit.

    Two paths; the scores are the logits of any number of classes, ``[N, C]``. No weights: a logit
    decides here, it does not scale. As Brainstorm's ``binary_threshold`` (F14) with
    ``confidence="max-softmax"``.
    """

    name: ClassVar[str] = "binary-threshold"
    paper: ClassVar[str] = (
        "Huang et al. 2018, Multi-Scale Dense Networks for Resource Efficient Image "
        "Classification, arXiv:1703.09844; for entropy: Teerapittayanon et al. 2016, BranchyNet, "
        "arXiv:1709.01686"
    )

    threshold: float
    selected_path: Literal[0, 1] = 0
    confidence: Confidence = "max-softmax"
    """When a cell is confident. "max-softmax": its largest probability >= threshold. "entropy":
    the entropy of its probabilities, in nats, < threshold. "score": its own score, ``[N, 1]``,
    >= threshold."""

    def __post_init__(self) -> None:
        """Check the options."""
        _check_threshold(self.name, self.threshold)
        _check_one_of_two(self.name, "selected_path", self.selected_path)
        if self.confidence not in ("max-softmax", "entropy", "score"):
            raise ProtocolError(
                f"{self.name}: confidence must be 'max-softmax', 'entropy' or 'score', "
                f"got {self.confidence!r}"
            )

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are ``[N, C]`` floats without NaN, and P = 2."""
        check_two_paths(self.name, num_paths)
        _check_columns(self.name, scores)
        if self.confidence == "score" and scores.shape[1] != 1:
            raise ProtocolError(
                f"{self.name}: confidence='score' takes one score a cell, [N, 1], "
                f"got shape {tuple(scores.shape)}"
            )

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        scores = scores.detach()
        if self.confidence == "score":
            confident_N1 = in_float32(scores) >= self.threshold
        elif self.confidence == "max-softmax":
            confident_N1 = softmax(scores).amax(dim=1, keepdim=True) >= self.threshold
        else:
            # entr(0) is 0, where p * log(p) would be NaN
            entropy_N1 = torch.special.entr(softmax(scores)).sum(dim=1, keepdim=True)
            confident_N1 = entropy_N1 < self.threshold
        return Decision(num_paths, choice_NK=_either(confident_N1, self.selected_path))

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N."""
        return num_cells


def _either(hit_N1: Tensor, hit_path: int) -> Tensor:
    """Return path ``hit_path`` where it is a hit, the other of two paths elsewhere."""
    return (hit_N1 if hit_path == 1 else ~hit_N1).to(torch.int64)


def _check_threshold(name: str, threshold: float) -> None:
    if not isinstance(threshold, int | float) or math.isnan(threshold):
        raise ProtocolError(f"{name}: threshold must be a number, got {threshold!r}")


def _check_one_of_two(name: str, option: str, path: int) -> None:
    if path not in (0, 1):
        raise ProtocolError(f"{name}: {option} must be 0 or 1, got {path!r}")


def _check_columns(name: str, scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ProtocolError(
            f"{name}: scores must be [N, C] with at least one column, "
            f"got shape {tuple(scores.shape)}"
        )
    check_floats(name, scores)
