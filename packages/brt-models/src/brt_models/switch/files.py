"""Switch Transformers as Hugging Face keeps them: names of tensors, folders in and out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from brt_models import checkpoints
from brt_models.switch.config import SwitchConfig
from brt_models.switch.network import SwitchTransformer

# Copies of the embedding that .bin files hold, where it is shared
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
# Some checkpoints of T5's family hold it; nothing has ever read it
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_PARTS = {
    "attention": "layer.0.SelfAttention",
    "attention_norm": "layer.0.layer_norm",
    "cross": "layer.1.EncDecAttention",
    "cross_norm": "layer.1.layer_norm",
}


def load(
    folder: str | os.PathLike[str],
    *,
    never_drop: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SwitchTransformer:
    """The model of a folder that Hugging Face's ``save_pretrained`` or hub wrote, in eval mode.

    Weights may be safetensors or ``.bin``, whole or in shards. ``never_drop`` leaves out the
    capacity that the config says. Raises `BrtError` with everything that does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    if never_drop:
        config = replace(config, expert_capacity=None)
    with torch.device("meta"):
        model = SwitchTransformer(config)
    tensors = _without_copies(checkpoints.read(folder), config, folder)
    named = {hugging_face_name(name): name for name in model.state_dict()}
    ours = {named.get(name, name): tensor for name, tensor in tensors.items()}
    checkpoints.assign(model, ours, f"switch.load: {folder}", dtype)
    return model.eval()


def read_config(folder: str | os.PathLike[str]) -> SwitchConfig:
    """The config of a folder with a ``config.json``."""
    return SwitchConfig.from_hugging_face(checkpoints.read_config(folder))


def save(model: SwitchTransformer, folder: str | os.PathLike[str]) -> None:
    """Write what `load` and ``from_pretrained`` of transformers read."""
    tensors = {hugging_face_name(name): tensor for name, tensor in model.state_dict().items()}
    checkpoints.write_folder(folder, tensors, model.config.to_hugging_face())


def hugging_face_name(name: str) -> str:
    """What Hugging Face calls a parameter of ours."""
    if name == "embed.weight":
        return "shared.weight"
    name = name.replace(".norm.", ".final_layer_norm.")
    name = name.replace(
        ".position.embed.", ".block.0.layer.0.SelfAttention.relative_attention_bias."
    )
    block = re.fullmatch(r"(encoder|decoder)\.blocks\.(\d+)\.(\w+)\.(.+)", name)
    if block is None:
        return name
    stack, index, part, rest = block.groups()
    layer = 1 if stack == "encoder" else 2
    rest = re.sub(r"^gate\.", "router.classifier.", rest)
    rest = re.sub(r"^experts\.(\d+)\.", r"experts.expert_\1.", rest)
    parts = _PARTS | {"mlp": f"layer.{layer}.mlp", "mlp_norm": f"layer.{layer}.layer_norm"}
    return f"{stack}.block.{index}.{parts[part]}.{rest}"


def _without_copies(
    tensors: Mapping[str, Tensor], config: SwitchConfig, folder: Path
) -> dict[str, Tensor]:
    """The weights that the model needs once each; a copy that is none is an error."""
    kept = {name: tensor for name, tensor in tensors.items() if name != _UNUSED}
    copies = _TIED if config.tie_word_embeddings else _TIED[:2]
    shared = kept.get("shared.weight")
    if shared is None:
        return kept
    differs = [n for n in copies if n in kept and not torch.equal(kept.pop(n), shared)]
    checkpoints.refuse(
        f"switch.load: {folder}",
        [f"{name} is not the same as shared.weight, with which it is tied" for name in differs],
    )
    return kept
