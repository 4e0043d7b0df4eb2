"""Checkpoints of Swin-MoE: one file a rank, each with the experts that the rank held."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models import checkpoints
from brt_models.swin_moe.network import SwinMoE

_EXPERTS = "._moe_layer.experts."


def load_ranks(model: SwinMoE, paths: Sequence[Path | str]) -> None:
    """Load ``NAME.pth.rank0``, ``NAME.pth.rank1``, ..., in any order if they are called so.

    Nothing in a file is executed. Raises `BrtError` where a file cannot be read, names the ranks
    that are missing, and lists all names and shapes that are not those of the model.
    """
    numbers = _numbers([Path(path) for path in paths])
    states = dict(sorted(zip(numbers, map(checkpoints.read, paths), strict=True)))
    states = {rank: {_renamed(n): t for n, t in state.items()} for rank, state in states.items()}
    own = model.state_dict()
    _check_ranks(own, states, Path(paths[0]).name if paths else "")
    merged = merge_ranks(list(states.values()))
    checkpoints.check_fit("swin_moe.load_ranks", own, merged)
    model.load_state_dict(merged)


def save_ranks(model: SwinMoE, path: Path | str, num_ranks: int) -> list[Path]:
    """Write ``path.rank0``, ``path.rank1``, ... as Tutel's ranks would; returns their paths."""
    made = []
    for rank, state in enumerate(split_ranks(model.state_dict(), num_ranks)):
        made.append(Path(f"{path}.rank{rank}"))
        checkpoints.write(made[-1], state, wrap="model")
    return made


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


def split_ranks(state: Mapping[str, Tensor], num_ranks: int) -> list[dict[str, Tensor]]:
    """What each of so many ranks would save of a model: the way back from `merge_ranks`."""
    if num_ranks < 1:
        raise BrtError(f"swin_moe.split_ranks: there must be at least one rank, not {num_ranks}")
    ranks: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
    for name, tensor in state.items():
        parts = [tensor] * num_ranks
        if _EXPERTS in name:
            held, shards = len(tensor), max(num_ranks // len(tensor), 1)
            if (held * shards) % num_ranks or tensor.shape[1] % shards:
                raise BrtError(
                    f"swin_moe.split_ranks: {num_ranks} ranks do not share the {held} experts of "
                    f"{name} evenly, nor their {tensor.shape[1]} features"
                )
            experts = tensor.chunk(num_ranks // shards)
            parts = [part for expert in experts for part in expert.chunk(shards, 1)]
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()
    return ranks


def split_experts(state: Mapping[str, Tensor]) -> dict[str, list[dict[str, Tensor]]]:
    """Each mixture's experts as the MLPs that they are: ``fc1`` and ``fc2`` of `nn.Linear`.

    The second layer's weights, input-major in Tutel, are transposed. Keys are the names of the
    mixtures: "layers.2.blocks.1.mlp".
    """
    names = {"fc1.weight": "batched_fc1_w", "fc1.bias": "batched_fc1_bias",
             "fc2.weight": "batched_fc2_w", "fc2.bias": "batched_fc2_bias"}  # fmt: skip
    last = f"{_EXPERTS}batched_fc1_w"
    split = {}
    for layer in (name.removesuffix(last) for name in state if name.endswith(last)):
        of = {ours: state[f"{layer}{_EXPERTS}{theirs}"] for ours, theirs in names.items()}
        of["fc2.weight"] = of["fc2.weight"].transpose(1, 2)
        split[layer] = [
            {name: tensor[expert] for name, tensor in of.items()}
            for expert in range(len(of["fc1.weight"]))
        ]
    return split


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


def _numbers(paths: Sequence[Path]) -> list[int]:
    """The rank of each file by its name, or by its place where names do not say."""
    named = [re.search(r"rank(\d+)$", path.name) for path in paths]
    if not all(named):
        return list(range(len(paths)))
    numbers = [int(found[1]) for found in named if found]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise BrtError(f"swin_moe.load_ranks: rank {', '.join(map(str, twice))} comes twice")
    return numbers


def _check_ranks(
    own: Mapping[str, Tensor], states: Mapping[int, Mapping[str, Tensor]], file: str
) -> None:
    """Name the ranks that hold the experts of a model that those given do not."""
    held = {name: t for state in states.values() for name, t in state.items()}
    weight = next((n for n in own if n.endswith("batched_fc1_w") and n in held), None)
    if weight is None:
        return
    (num_experts, *whole), (num_held, *part) = own[weight].shape, held[weight].shape
    if part == whole and num_held:
        num_ranks = -(-num_experts // num_held)
    elif num_held == 1 and part[1:] == whole[1:] and part[0] and whole[0] % part[0] == 0:
        num_ranks = num_experts * (whole[0] // part[0])  # parts of the hidden features
    else:
        return  # not of this model, whatever the number of ranks
    missing = [rank for rank in range(num_ranks) if rank not in states]
    if missing:
        name = re.sub(r"rank\d+$", "rank", file) if re.search(r"rank\d+$", file) else "rank "
        raise BrtError(
            f"swin_moe.load_ranks: {len(missing)} of {num_ranks} ranks are missing: "
            f"{', '.join(f'{name}{rank}' for rank in missing)}"
        )
