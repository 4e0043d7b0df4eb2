"""Checkpoints that fit any number of ranks, by `torch.distributed.checkpoint`.

Legend: P experts of a mixture, G experts of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from brt_dist.errors import ParallelError
from brt_dist.spread import Spread

if TYPE_CHECKING:
    from brt_dist.parallelize import Parallelized


class Checkpoint:
    """What `torch.distributed.checkpoint` saves and loads: a model and its optimizer.

    Names and shapes are those of one process, whatever ranks, placement or replicas there are: what
    W ranks saved, other ranks load, and one process without `parallelize` too (``spread=None``).
    Options of the optimizer's groups (learning rates...) are kept where they are numbers.

        dcp.save({"train": Checkpoint(model, optimizer, spread)}, checkpoint_id=folder)

    Args:
        model: parallelized or not; each rank loads into its own tensors, in place.
        optimizer: made after `parallelize`, with its groups in the same order everywhere. Load
            before its first backward: where there are gradients, torch makes no state to load into.
        spread: what `parallelize` returned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        spread: Parallelized | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        entries = () if spread is None else spread.entries
        self._spread_of = {
            entry.name: entry.spread
            for entry in entries
            if entry.spread is not None and entry.expert is None
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of this rank; those of the model and the optimizer themselves."""
        here = self._model.state_dict()
        state = {f"model.{name}": self._share(name, tensor) for name, tensor in here.items()}
        if self._optimizer is not None:
            names = self._names(self._optimizer)
            # It makes the state that a new optimizer does not have yet
            get_optimizer_state_dict(self._model, self._optimizer)
            state |= dict(self._of_optimizer(self._optimizer, names))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what was not loaded in place: options of the optimizer's groups."""
        for i, group in enumerate(() if self._optimizer is None else self._optimizer.param_groups):
            for option in _options(group):
                group[option] = _as_option(state[f"options.{i}.{option}"], group[option])

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._spread_of:
            return tensor
        return ExpertShare(tensor, self._spread_of[name])

    def _names(self, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
        """The names of the optimizer's parameters."""
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    model = type(self._model).__name__
                    raise ParallelError(
                        f"Checkpoint: the optimizer has a parameter {list(parameter.shape)} that "
                        f"is not the model's: make it after parallelize({model})"
                    )
        return names

    def _of_optimizer(
        self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
    ) -> Iterator[tuple[str, Tensor]]:
        for i, group in enumerate(optimizer.param_groups):
            for option, value in _options(group).items():
                yield f"options.{i}.{option}", torch.as_tensor(value, dtype=torch.float64).cpu()
        for parameter, state in optimizer.state.items():
            name = names[parameter]
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    raise ParallelError(
                        f"Checkpoint: {type(optimizer).__name__} keeps {key!r} as "
                        f"{type(value).__name__}; only tensors can be saved"
                    )
                is_alike = value.shape == parameter.shape
                share = self._share(name, value) if is_alike else value
                yield f"optimizer.{name}.{key}", share


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that are numbers, or several of them."""
    found = {}
    for name, value in group.items():
        parts = value if isinstance(value, tuple) else (value,)
        if name != "params" and all(isinstance(p, bool | int | float | Tensor) for p in parts):
            found[name] = value
    return found


def _as_option(loaded: Tensor, like: Any) -> Any:
    if isinstance(like, tuple):
        return tuple(type(old)(new) for old, new in zip(like, loaded.tolist(), strict=True))
    return like.copy_(loaded) if isinstance(like, Tensor) else type(like)(loaded.item())


class ExpertShare(Tensor):
    """The rows ``[G, ...]`` of this rank's experts, as part of ``[P, ...]``; for checkpoints only.

    torch asks tensors with these methods which parts of the whole they hold.
    """

    _runs: list[tuple[ChunkStorageMetadata, Tensor]]

    @staticmethod
    def __new__(cls, own: Tensor, spread: Spread) -> ExpertShare:
        """The whole, of which ``own`` is here."""
        shape = (spread.num_experts, *own.shape[1:])
        made: ExpertShare = Tensor._make_wrapper_subclass(
            cls, shape, dtype=own.dtype, device=own.device
        )
        return made

    def __init__(self, own: Tensor, spread: Spread) -> None:
        held, local = spread.held, own.detach()
        if isinstance(local, DTensor):
            # Sharded again, over data-parallel ranks: these have some of the rank's experts
            held, local = _part(held, local)
        self._runs = []
        for begin, end in _consecutive(held):
            part = local[begin:end]
            offsets = torch.Size((held[begin], *[0] * (part.ndim - 1)))
            self._runs.append((ChunkStorageMetadata(offsets, part.size()), part))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ParallelError(
            f"Checkpoint: {func} of experts that are on several ranks; the state of a Checkpoint "
            "is for torch.distributed.checkpoint only"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ExpertShare({list(self.shape)}, {len(self._runs)} parts here)"

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(part),
                    size=self.size(),
                ),
            )
            for chunk, part in self._runs
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._runs]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part for chunk, part in self._runs if chunk.offsets == index.offset)


def _part(held: tuple[int, ...], own: DTensor) -> tuple[tuple[int, ...], Tensor]:
    """The experts, and their rows, that a shard of this rank's experts has."""
    (chunk,) = own.__create_chunk_list__()
    local = own.to_local()
    if local.shape[1:] != own.shape[1:]:
        raise ParallelError("Checkpoint: experts must be sharded by their first dimension")
    begin = chunk.offsets[0]
    return held[begin : begin + local.shape[0]], local


def _consecutive(held: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the runs of consecutive numbers."""
    begin = 0
    for i in range(1, len(held) + 1):
        if i == len(held) or held[i] != held[i - 1] + 1:
            yield begin, i
            begin = i
