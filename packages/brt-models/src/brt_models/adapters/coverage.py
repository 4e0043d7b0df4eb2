"""Which mixtures of the installed transformers `brt.adapt` takes: built small, one by one.

``python -m brt_models.adapters.coverage`` prints the table of the documentation.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from brt_models.adapters.families import LEFT
from brt_models.adapters.offers import ADAPTERS

_MIXTURE = re.compile(
    r"^class (\w*(?:Experts|SparseMLP|MoE|Moe|MoA|SparseMoeBlock|MoEBlock))\(", re.M
)
# Parts of modules that are adapted, or left, as a whole
_PARTS = {
    "JetMoeParallelExperts": "JetMoeMoE",
    "Llama4TextExperts": "Llama4TextMoe",
    "NllbMoeExperts": "NllbMoeSparseMLP",
    "SwitchTransformersExperts": "SwitchTransformersSparseMLP",
}
_SIZES = {"layer_idx": 1, "intermediate_size": 24, "ffn_dim": 24, "input_size": 16}
_SIZES |= {"output_size": 16, "num_experts": 4}


@dataclass(frozen=True)
class Mixture:
    """One class of transformers, and what becomes of it.

    Attributes:
        family: folder of the models of transformers.
        name: of the class.
        adapter: the adapter that takes it, or "".
        why: why none does, or where its experts are.
    """

    family: str
    name: str
    adapter: str = ""
    why: str = ""


class TinyConfig:
    """A config that has every field, small: what a field is for shows in its name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("_experts_implementation", "router_dtype"):
            return {"router_dtype": "float32"}.get(name, "eager")
        for part, value in (
            ("layer_types", ["sparse"] * 4), ("scoring", "sigmoid"), ("limits", None),
            ("jitter", 0.0), ("dropout", 0.0), ("eps", 0.0), ("bias", False), ("limit", 7.0),
            ("per_tok", 2), ("topk", 2), ("top_k", 2), ("ffn_act_fn", {"name": "silu"}),
            ("act_fn", "silu"), ("hidden_act", "silu"), ("activation", "silu"), ("zero_expert", 2),
            ("expert_ffn", 24), ("experts", 4), ("expert_num", 4), ("intermediate", 24),
            ("ffn_hidden", 24), ("d_ff", 24), ("hidden", 16), ("d_model", 16), ("latent", 16),
        ):  # fmt: skip
            if part in name:
                return value
        return 4


def mixtures() -> Iterator[Mixture]:
    """Every class with experts, in the order of their names."""
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        names = _MIXTURE.findall(file.read_text())
        if names:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            for name in names:
                yield _of_class(file.parent.name, getattr(module, name))


def build(cls: type[nn.Module]) -> nn.Module:
    """A small instance of a class, with all parameters drawn at random."""
    needed = list(inspect.signature(cls.__init__).parameters)[1:]
    given: dict[str, Any] = {name: _SIZES[name] for name in needed if name in _SIZES}
    if "config" in needed:
        given["config"] = TinyConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = cls(**given)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def adapter_of(module: nn.Module) -> str:
    """Name of the adapter that takes a module itself, or ""."""
    return next((spec.name for spec in ADAPTERS if spec.matches(module)), "")


def _of_class(family: str, cls: type[nn.Module]) -> Mixture:
    name = cls.__name__
    if name in LEFT:
        return Mixture(family, name, why=LEFT[name])
    if name in _PARTS:
        return Mixture(family, name, why=f"part of {_PARTS[name]}")
    module = build(cls)
    adapter = adapter_of(module)
    if adapter:
        return Mixture(family, name, adapter)
    inside = [child for child in module.modules() if adapter_of(child)]
    if inside:
        return Mixture(family, name, why=f"its {type(inside[0]).__name__} is adapted")
    return Mixture(family, name)


def table() -> str:
    """The classes that are adapted or left, as Markdown."""
    rows = ["| family | class | |", "|---|---|---|"]
    rows += [
        f"| {found.family} | `{found.name}` | {found.adapter or f'left: {found.why}'} |"
        for found in mixtures()
        if found.adapter or found.name in LEFT or not found.why
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    pass
