"""What `brt load` calls for each model: a path and options that can be written as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from brt.errors import BrtError
from brt_models import checkpoints, classsr, dynamic_routing, ranet, sparse_decoder, swin_moe
from brt_models.msdnet.checkpoint import load_checkpoint
from brt_models.swin_moe import SwinMoE, SwinMoEConfig

_FAMILIES = {"deepseek-v2", "deepseek-v3", "gpt-oss", "mixtral", "qwen3-moe"}


def load_msdnet(path: Path) -> nn.Module:
    """A checkpoint of the authors' code; which published network is told by its shapes."""
    return load_checkpoint(path)


def load_ranet(path: Path) -> nn.Module:
    """A checkpoint of the authors' code; which of their networks is told by its shapes."""
    return ranet.load_checkpoint(path)


def load_classsr(path: Path) -> nn.Module:
    """A checkpoint of the authors' code; which kind of branches is told by its names."""
    return classsr.load(path)


def load_dynamic_routing(path: Path, network: str | None = None) -> nn.Module:
    """A checkpoint of the authors' code, of network A, B, C or Raw."""
    return dynamic_routing.load_checkpoint(path, network)


def load_swin_moe(folder: Path) -> nn.Module:
    """What all ranks saved, ``NAME.rank0`` and so on, in a folder; its shapes tell the network."""
    paths = [path for path in Path(folder).glob("*rank*") if re.search(r"rank\d+$", path.name)]
    if not paths:
        raise BrtError(f"{folder} holds no files of ranks: NAME.rank0, NAME.rank1, ...")
    held = checkpoints.read(min(paths))
    choices = _swin_configs(held)
    name, empty = checkpoints.nearest(held, SwinMoE, choices)
    own = empty.state_dict()
    if not own.keys() & held.keys():
        checkpoints.check_fit(f"{min(paths)}", own, held)
    model = SwinMoE(choices[name]).eval()
    swin_moe.load_ranks(model, paths)
    return model


def _swin_configs(held: Mapping[str, Tensor]) -> dict[str, SwinMoEConfig]:
    """The networks that there are, with as many experts and classes as the file of a rank says."""
    gates = [t.shape[0] for name, t in held.items() if name.endswith("wg.weight")]
    gates += [t.shape[1] for name, t in held.items() if name.endswith("sim_matrix")]
    cosine = any(name.endswith("sim_matrix") for name in held)
    num_experts = gates[0] if gates else SwinMoEConfig.num_experts
    classes = checkpoints.num_classes(held, "head.bias", SwinMoEConfig.num_classes)
    known = {
        "small": SwinMoEConfig.published("small"),
        "base": SwinMoEConfig.published("base"),
        "v2 tiny": SwinMoEConfig.v2("tiny"),
        "v2 small": SwinMoEConfig.v2("small"),
        "v2 base": SwinMoEConfig.v2("base"),
        "for 32x32 pixels": swin_moe.small().config,
        "v2 for 32x32 pixels": swin_moe.small_v2().config,
    }
    first = held.get("patch_embed.proj.weight")
    widths = [first.shape[0]] if first is not None else [SwinMoEConfig.embed_dim]
    alike = {name: config for name, config in known.items() if config.embed_dim in widths}
    return {
        name: replace(config, num_experts=num_experts, num_classes=classes, cosine_router=cosine)
        for name, config in (alike or known).items()
    }


def sparse_block_loader(family: str) -> Callable[..., nn.Module]:
    """The loader of one family: the block of one layer out of a folder."""

    def load_sparse_block(folder: Path, layer: int = 0) -> nn.Module:
        kind = str(checkpoints.read_config(folder).get("model_type")).replace("_", "-")
        if kind != family and kind in _FAMILIES:
            raise BrtError(f"{folder} holds a {kind} model, not a {family} one")
        return sparse_decoder.load(folder, layer)

    return load_sparse_block
