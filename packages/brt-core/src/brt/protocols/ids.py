"""Every cell carries an id that says where it goes: a label, a task, a token to hash.

N cells, T ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import Protocol, check_at_least, check_ids


@dataclass(frozen=True)
class Label(Protocol):
    """Cell n takes path ``scores[n]``; the scores are int64 labels ``[N]``. No weights.

    A label outside ``range(P)`` is an error, and where values are not checked it names no path.
    As Brainstorm's ``label`` (F15).
    """

    name: ClassVar[str] = "label"
    paper: ClassVar[str] = "none: the caller decides"

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are int64 ``[N]`` in ``range(P)``."""
        check_ids(self.name, scores, num_paths)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 1."""
        inside_N = (scores >= 0) & (scores < num_paths)
        return Decision(num_paths, choice_NK=torch.where(inside_N, scores, -1).unsqueeze(1))

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return N."""
        return num_cells


@dataclass(frozen=True)
class Task(Label):
    """A cell of task t takes path t; the scores are int64 task ids ``[N]``. No weights.

    There are as many paths as tasks. As Brainstorm's ``task`` (F18).
    """

    name: ClassVar[str] = "task"
    paper: ClassVar[str] = (
        "Kudugunta et al. 2021, Beyond Distillation: Task-level Mixture-of-Experts for Efficient "
        "Inference, arXiv:2110.03742"
    )

    num_tasks: int

    def __post_init__(self) -> None:
        """Check the options."""
        check_at_least(self.name, "num_tasks", self.num_tasks, 1)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are int64 task ids ``[N]``, and P = num_tasks."""
        _check_one_path_a_task(self.name, self.num_tasks, num_paths)
        super().check(scores, num_paths)


@dataclass(frozen=True)
class Hash(Protocol):
    """A cell of task t takes two paths that depend on t alone; int64 task ids ``[N]``. No weights.

    They are entries t and T-1-t of a permutation of the T paths drawn from ``seed``, so that every
    path has the same number of tasks; the middle task of an odd T takes one path. With
    ``placement_aware`` they are t and t+1, wrapping: neighbours, which a placement puts together.
    The same paths as Brainstorm's ``hash`` (F17) for a seed, which also reseeds the global
    generator; this one leaves it alone.
    """

    name: ClassVar[str] = "hash"
    paper: ClassVar[str] = (
        "Roller et al. 2021, Hash Layers For Large Sparse Models, arXiv:2106.04426"
    )

    num_tasks: int
    seed: int = 0
    placement_aware: bool = False
    _table_of: dict[torch.device, Tensor] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options and draw the table."""
        check_at_least(self.name, "num_tasks", self.num_tasks, 1)
        object.__setattr__(self, "_table_of", {torch.device("cpu"): self._draw()})

    def _draw(self) -> Tensor:
        """Return the two paths of each task, ``[T, 2]``; -1 where there is no second one."""
        if self.placement_aware:
            first_T = torch.arange(self.num_tasks)
            second_T = first_T.roll(-1)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            first_T = torch.randperm(self.num_tasks, generator=generator)
            second_T = first_T.flip(0)
        return torch.stack([first_T, torch.where(second_T == first_T, -1, second_T)], dim=1)

    def check(self, scores: Tensor, num_paths: int) -> None:
        """Raise `ProtocolError` unless ``scores`` are int64 task ids ``[N]``, and P = num_tasks."""
        _check_one_path_a_task(self.name, self.num_tasks, num_paths)
        check_ids(self.name, scores, self.num_tasks)

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """Decide with ``choice_NK``, K = 2."""
        inside_N = (scores >= 0) & (scores < self.num_tasks)
        table_T2 = self._table(scores.device)
        choice_N2 = table_T2.index_select(0, torch.where(inside_N, scores, 0))
        return Decision(num_paths, choice_NK=torch.where(inside_N.unsqueeze(1), choice_N2, -1))

    def _table(self, device: torch.device) -> Tensor:
        """Return the table on a device; it is copied there once, outside of any traced graph."""
        table = self._table_of.get(device)
        if table is None:
            table = self._table_of[torch.device("cpu")].to(device)
            if not torch.compiler.is_compiling() and type(table) is Tensor:
                self._table_of[device] = table
        return table

    def max_rows(self, num_cells: int, num_paths: int, group_size: int | None = None) -> int:
        """Return 2 * N."""
        return num_cells * 2


def _check_one_path_a_task(name: str, num_tasks: int, num_paths: int) -> None:
    if num_tasks != num_paths:
        raise ProtocolError(
            f"{name}: num_tasks={num_tasks}, but there are {num_paths} paths; "
            "there must be one path for each task"
        )
