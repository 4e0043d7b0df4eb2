"""Checkpoints of Swin-MoE: one file a rank, each with the experts that the rank held."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from brt.errors import BrtError

_EXPERTS = "._moe_layer.experts."


def load_ranks(model: nn.Module, paths: Sequence[Path | str]) -> None:
    """Load ``NAME.pth.rank0``, ``NAME.pth.rank1``, ..., in the order of ranks.

    Nothing in a file is executed. Raises `BrtError` where a file cannot be read, ranks are missing,
    or names and shapes are not those of the model, and lists them all.
    """
    merged = merge_ranks([_read(Path(path)) for path in paths])
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - merged.keys()]
    wrong += [f"{name} is unknown" for name in merged.keys() - own.keys()]
    for name in own.keys() & merged.keys():
        if own[name].shape != merged[name].shape:
            wrong.append(f"{name} is {list(merged[name].shape)}, not {list(own[name].shape)}")
    if wrong:
        raise BrtError(f"swin_moe.load_ranks: {'; '.join(sorted(wrong))}")
    model.load_state_dict(merged)


def merge_ranks(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state dict of those of all ranks.

    Experts follow one another in the order of ranks. Where there are more ranks than experts, as
    many neighbours hold parts of the hidden features of one expert. Names that older releases of
    Tutel gave are changed to today's. Raises `BrtError` where experts are missing.
    """
    if not states:
        raise BrtError("swin_moe.merge_ranks: there must be at least one rank")
    ranks = [{_renamed(name): tensor for name, tensor in state.items()} for state in states]
    for rank, state in enumerate(ranks):
        if state.keys() != ranks[0].keys():
            other = sorted(state.keys() ^ ranks[0].keys())
            raise BrtError(f"swin_moe.merge_ranks: ranks 0 and {rank} differ in {', '.join(other)}")
    merged = {}
    for name, tensor in ranks[0].items():
        if _EXPERTS not in name:
            merged[name] = tensor
            continue
        layer = name.partition(_EXPERTS)[0]
        merged[name] = _join(name, [r[name] for r in ranks], _num_experts(ranks[0], layer))
    return merged


def _join(name: str, parts: Sequence[Tensor], num_experts: int) -> Tensor:
    held = sum(len(part) for part in parts)
    if held % num_experts or held < num_experts:
        raise BrtError(
            f"swin_moe.merge_ranks: {name}: {len(parts)} ranks hold {held} of {num_experts} "
            "experts; give the files of all ranks"
        )
    num_shards = held // num_experts
    if num_shards == 1:
        return torch.cat(list(parts))
    shards = [torch.cat(list(parts[i : i + num_shards]), 1) for i in range(0, held, num_shards)]
    return torch.cat(shards)


def _num_experts(state: Mapping[str, Tensor], layer: str) -> int:
    gate = f"{layer}._moe_layer.gates.0."
    if f"{gate}wg.weight" in state:
        return len(state[f"{gate}wg.weight"])
    if f"{gate}sim_matrix" in state:
        return state[f"{gate}sim_matrix"].shape[1]
    raise BrtError(f"swin_moe.merge_ranks: {layer} has no gate, of which the experts are counted")


def _renamed(name: str) -> str:
    name = name.replace("._moe_layer.gate.", "._moe_layer.gates.0.")
    return name.replace(f"{_EXPERTS}0.", _EXPERTS)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BrtError(f"swin_moe.load_ranks: cannot read {path}: {error}") from error
    state = found.get("model", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise BrtError(f"swin_moe.load_ranks: {path} holds no state dict, nor one under 'model'")
    return state
