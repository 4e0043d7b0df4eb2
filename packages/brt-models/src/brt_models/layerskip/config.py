"""The shape of a Llama, and when its tokens leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from brt.errors import BrtError

MODEL_TYPE = "llama"

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# What a Llama may have and these networks do not
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LayerSkipConfig:
    """Shape of the network; names are those of Hugging Face's Llama.

    Attributes:
        rope_llama3: factor, low_freq_factor, high_freq_factor and
            original_max_position_embeddings, by which Llama 3.1 and later stretch their positions;
            None where they do not.
        threshold: a token leaves where the likeliest next word has at least this probability.
        min_layers: no token leaves before it has run so many.
        layer_dropout: how often the last layer is dropped in training; earlier ones less.
        exit_scale: what the words of a layer before the last count in the loss.
    """

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_llama3: tuple[float, float, float, int] | None = None
    tie_word_embeddings: bool = False
    threshold: float = 0.9
    min_layers: int = 1
    layer_dropout: float = 0.1
    exit_scale: float = 0.2

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise BrtError(f"LayerSkipConfig: {name} must be >= 1, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise BrtError(
                f"LayerSkipConfig: num_attention_heads={self.num_attention_heads} must be a "
                f"multiple of num_key_value_heads={self.num_key_value_heads}, and head_dim="
                f"{self.head_dim} even"
            )
        if not self.threshold > 0 or not 1 <= self.min_layers <= self.num_hidden_layers:
            raise BrtError(
                "LayerSkipConfig: threshold must be over 0 and min_layers one of "
                f"{self.num_hidden_layers}, got {self.threshold} and {self.min_layers}"
            )
        if not 0 <= self.layer_dropout < 1 or self.exit_scale < 0:
            raise BrtError(
                "LayerSkipConfig: layer_dropout must be in [0, 1) and exit_scale >= 0, got "
                f"{self.layer_dropout} and {self.exit_scale}"
            )

    @classmethod
    def from_hugging_face(cls, given: Mapping[str, Any]) -> LayerSkipConfig:
        """The config of a Llama's ``config.json``; what says nothing about it is ignored."""
        if given.get("model_type") != MODEL_TYPE:
            raise BrtError(f"config of a {given.get('model_type')!r} model, not of {MODEL_TYPE!r}")
        for name, value in _FIXED.items():
            if given.get(name, value) != value:
                raise BrtError(f"config of a Llama whose {name} is {given[name]!r}, not {value!r}")
        known = {field.name for field in fields(cls)}
        taken = {k: v for k, v in given.items() if k in known and v is not None}
        heads = taken.get("num_attention_heads")
        if not heads or "hidden_size" not in taken:
            raise BrtError("config of a Llama without num_attention_heads or hidden_size")
        taken.setdefault("num_key_value_heads", heads)
        if "head_dim" not in taken and taken["hidden_size"] % heads:
            raise BrtError(
                f"config of a Llama whose num_attention_heads={heads} do not share hidden_size="
                f"{taken['hidden_size']} evenly"
            )
        taken.setdefault("head_dim", taken["hidden_size"] // heads)
        try:
            return cls(**(taken | _rope(given)))
        except TypeError as error:
            raise BrtError(f"config of a Llama with a strange field: {error}") from error

    def to_hugging_face(self) -> dict[str, Any]:
        """What a ``config.json`` says."""
        shape = {k: v for k, v in asdict(self).items() if k != "rope_llama3"}
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_llama3 is not None:
            stretch = dict(zip(_LLAMA3, self.rope_llama3, strict=True))
            rope |= stretch | {"rope_type": "llama3"}
        about = {"architectures": ["LlamaForCausalLM"], "model_type": MODEL_TYPE}
        return about | shape | _FIXED | {"rope_parameters": rope}


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Positions as releases of transformers before and since 5.0 write them."""
    old, new = given.get("rope_scaling") or {}, given.get("rope_parameters") or {}
    rope = {**old, **new}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", given.get("rope_theta", LayerSkipConfig.rope_theta))
    if kind == "default":
        return {"rope_theta": theta}
    missing = [name for name in _LLAMA3 if name not in rope]
    if kind != "llama3" or missing:
        lacks = f" without {', '.join(missing)}" if kind == "llama3" else ""
        raise BrtError(
            f"config of a Llama with positions of kind {kind!r}{lacks}; there are default and "
            f"llama3 with {', '.join(_LLAMA3)}"
        )
    return {"rope_theta": theta, "rope_llama3": tuple(rope[name] for name in _LLAMA3)}
