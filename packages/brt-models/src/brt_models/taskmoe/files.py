"""TaskMoE in folders of the Hugging Face kind; BertGeneration decoders to start one from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from brt.errors import BrtError
from brt_models import checkpoints
from brt_models.taskmoe.config import TaskMoEConfig
from brt_models.taskmoe.network import TaskMoE

MODEL_TYPE, DENSE_TYPE = "taskmoe", "bert-generation"

_DENSE_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
}
_TIED = "lm_head.weight"
# transformers' buffer, and the second name of lm_head.bias
_UNUSED = ("embeddings.position_ids", "lm_head.decoder.bias")


def load(
    folder: str | PathLike[str],
    num_tasks: int = TaskMoEConfig.num_tasks,
    seed: int = TaskMoEConfig.seed,
    *,
    placement_aware: bool = False,
) -> TaskMoE:
    """The model of a folder, in eval mode and in float32.

    The folder is one that `save` wrote, whose config says all; or holds a ``BertGenerationDecoder``
    of transformers without cross-attention, from whose layers all experts start: the other
    arguments are for that. Raises `BrtError` with everything that does not fit.
    """
    given = checkpoints.read_config(folder)
    kind = given.get("model_type")
    if kind not in (MODEL_TYPE, DENSE_TYPE):
        raise BrtError(
            f"taskmoe.load: {folder} holds a {kind!r} model, neither {MODEL_TYPE!r} nor "
            f"{DENSE_TYPE!r}"
        )
    routing = {"num_tasks": num_tasks, "seed": seed, "placement_aware": placement_aware}
    config = _own_config(given) if kind == MODEL_TYPE else _dense_config(given, routing)
    model = TaskMoE(config)
    tensors = checkpoints.read(folder)
    if kind == DENSE_TYPE:
        load_dense(model, tensors)
    else:
        tied = tensors.get("embeddings.word_embeddings.weight")
        tensors |= {} if tied is None else {_TIED: tied}
        checkpoints.assign(model, tensors, f"taskmoe.load: {folder}", torch.float32)
        model.lm_head.weight = model.embeddings.word_embeddings.weight
    return model.eval()


def save(model: TaskMoE, folder: str | PathLike[str]) -> None:
    """Write what `load` reads: safetensors and ``config.json``; the tied head is left out."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != _TIED}
    checkpoints.write_folder(folder, tensors, {"model_type": MODEL_TYPE} | asdict(model.config))


def load_dense(model: TaskMoE, state: Mapping[str, Tensor]) -> None:
    """Take the weights of a BertGeneration decoder; every expert starts from its layer's own.

    ``state`` is the state dict of transformers' ``BertGenerationDecoder`` without cross-attention.
    Raises `CheckpointError` with all names that are missing, unknown or of another shape.
    """
    given = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.").removeprefix("encoder.")
        if name in _UNUSED:
            continue
        name = name.replace("lm_head.decoder.weight", _TIED)
        parts = name.split(".")
        if parts[0] == "layer" and len(parts) > 2 and parts[2] in ("intermediate", "output"):
            tail = ".".join(parts[2:]).replace("intermediate.dense.", "intermediate.")
            for expert in range(model.config.num_tasks):
                given[f"layer.{parts[1]}.experts.{expert}.{tail}"] = tensor
        else:
            given[name] = tensor
    if "embeddings.word_embeddings.weight" in given:
        given.setdefault(_TIED, given["embeddings.word_embeddings.weight"])
    checkpoints.check_fit("taskmoe.load_dense", model.state_dict(), given)
    model.load_state_dict(given)


def _own_config(given: Mapping[str, Any]) -> TaskMoEConfig:
    known = {field.name for field in fields(TaskMoEConfig)}
    strange = given.keys() - known - {"model_type"}
    if strange:
        raise BrtError(f"config of a {MODEL_TYPE!r} model with a strange field: {min(strange)}")
    return TaskMoEConfig(**{name: value for name, value in given.items() if name in known})


def _dense_config(given: Mapping[str, Any], routing: Mapping[str, Any]) -> TaskMoEConfig:
    if given.get("hidden_act", "gelu") != "gelu" or given.get("add_cross_attention", False):
        raise BrtError(
            f"config of a {DENSE_TYPE!r} model that is none of ours: hidden_act must be 'gelu' and "
            f"add_cross_attention false; got {given.get('hidden_act')!r} and "
            f"{given.get('add_cross_attention')!r}"
        )
    missing = [name for name in _DENSE_FIELDS if name not in given]
    if missing:
        raise BrtError(f"config of a {DENSE_TYPE!r} model without {', '.join(missing)}")
    return TaskMoEConfig(**{ours: given[name] for name, ours in _DENSE_FIELDS.items()}, **routing)
