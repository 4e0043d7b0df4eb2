"""Folders of the Hugging Face kind: LayerSkip's checkpoints are plain Llamas."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor

from brt_models import checkpoints
from brt_models.layerskip.config import LayerSkipConfig
from brt_models.layerskip.network import LayerSkip

_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
# Older releases of transformers wrote this buffer
_UNUSED = ".self_attn.rotary_emb.inv_freq"


def load(folder: str | PathLike[str], dtype: torch.dtype = torch.float32) -> LayerSkip:
    """The model of a folder that holds a ``LlamaForCausalLM``, in eval mode.

    Weights may be safetensors or ``.bin``, whole or in shards. Raises `BrtError` with everything
    that does not fit.
    """
    what = f"layerskip.load: {folder}"
    config = LayerSkipConfig.from_hugging_face(checkpoints.read_config(folder))
    found = checkpoints.read(folder)
    tensors = {name: t for name, t in found.items() if not name.endswith(_UNUSED)}
    if config.tie_word_embeddings and _EMBED in tensors:
        head: Tensor = tensors.setdefault(_HEAD, tensors[_EMBED])
        if not torch.equal(head, tensors[_EMBED]):
            checkpoints.refuse(
                what, [f"{_HEAD} is not the same as {_EMBED}, with which it is tied"]
            )
    with torch.device("meta"):
        model = LayerSkip(config)
    checkpoints.assign(model, tensors, what, dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def save(model: LayerSkip, folder: str | PathLike[str]) -> None:
    """Write what `load` and ``from_pretrained`` of transformers read."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state[_HEAD]
    checkpoints.write_folder(folder, state, model.config.to_hugging_face())
