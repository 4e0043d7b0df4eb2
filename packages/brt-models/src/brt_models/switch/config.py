"""The shape of a Switch Transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from brt.errors import BrtError

MODEL_TYPE = "switch_transformers"
BASE_EXPERTS = (8, 16, 32, 64, 128, 256)
ACTIVATIONS = ("relu", "gelu", "silu")

# What a config.json means that leaves a field out: transformers' class, not the published models
_LEFT_OUT = {"d_ff": 2048, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3}
_SIZES = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers",
    "num_sparse_encoder_layers", "num_sparse_decoder_layers", "num_experts",
)  # fmt: skip


@dataclass(frozen=True)
class SwitchConfig:
    """Shape of the model, in the words of Hugging Face's ``config.json``; defaults are base-8.

    ``expert_capacity`` is the most tokens of one sequence that an expert takes in a layer; None:
    all that come, which is what transformers has computed since its 5.0. Layer i is sparse where
    ``i % step == 1``, step being layers over sparse layers (or where step is 1), as the published
    checkpoints have it. ``router_jitter_noise`` and ``dropout_rate`` are for training only. The
    router runs in float32 whatever the rest does.
    """

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    num_decoder_layers: int = 12
    num_sparse_encoder_layers: int = 6
    num_sparse_decoder_layers: int = 6
    num_experts: int = 8
    expert_capacity: int | None = 64
    router_bias: bool = False
    router_jitter_noise: float = 0.01
    router_z_loss_coef: float = 0.001
    router_aux_loss_coef: float = 0.001
    dense_act_fn: str = "relu"
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise BrtError(f"SwitchConfig: {name} must be >= 1, got {getattr(self, name)!r}")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise BrtError(
                    f"SwitchConfig: {name} must be one of {self.vocab_size} tokens, got {token!r}"
                )
        self._check_layers()
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 4 or distance <= buckets // 2:
            raise BrtError(
                "SwitchConfig: relative_attention_num_buckets must be a multiple of 4 and "
                "relative_attention_max_distance more than half of it; got "
                f"{buckets} and {distance}"
            )

    def _check_layers(self) -> None:
        for layers, sparse in (
            ("num_layers", "num_sparse_encoder_layers"),
            ("num_decoder_layers", "num_sparse_decoder_layers"),
        ):
            if getattr(self, sparse) > getattr(self, layers):
                raise BrtError(
                    f"SwitchConfig: {sparse}={getattr(self, sparse)} of {layers}="
                    f"{getattr(self, layers)}; there cannot be more"
                )
        if self.expert_capacity is not None and self.expert_capacity < 1:
            raise BrtError(
                f"SwitchConfig: expert_capacity must be >= 1, or None for all that come; got "
                f"{self.expert_capacity}"
            )
        if self.dense_act_fn not in ACTIVATIONS:
            raise BrtError(
                f"SwitchConfig: dense_act_fn {self.dense_act_fn!r} is not known; there are "
                f"{', '.join(ACTIVATIONS)}"
            )
        if not 0 <= self.router_jitter_noise < 1 or not 0 <= self.dropout_rate < 1:
            raise BrtError(
                "SwitchConfig: router_jitter_noise and dropout_rate must be in [0, 1), got "
                f"{self.router_jitter_noise} and {self.dropout_rate}"
            )

    @classmethod
    def base(cls, num_experts: int = 8) -> SwitchConfig:
        """The published base models: 8, 16, 32, 64, 128 or 256 experts a sparse layer."""
        if num_experts not in BASE_EXPERTS:
            known = ", ".join(map(str, BASE_EXPERTS))
            raise BrtError(
                f"SwitchConfig.base: there are models of {known} experts, not of "
                f"{num_experts}; SwitchConfig(num_experts=...) takes any number"
            )
        return cls(num_experts=num_experts)

    @classmethod
    def from_hugging_face(cls, given: Mapping[str, Any]) -> SwitchConfig:
        """The config of a ``config.json``; what says nothing about the network is ignored."""
        model_type = given.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise BrtError(f"config of a {model_type!r} model, not of {MODEL_TYPE!r}")
        known = {field.name for field in fields(cls)}
        taken = {k: v for k, v in given.items() if k in known}
        if taken.get("num_decoder_layers", 0) is None:
            taken["num_decoder_layers"] = taken.get("num_layers", cls.num_layers)
        if taken.get("decoder_start_token_id", 0) is None:
            taken["decoder_start_token_id"] = taken.get("pad_token_id", cls.pad_token_id)
        try:
            return cls(**(_LEFT_OUT | taken))
        except TypeError as error:
            raise BrtError(
                f"config of a {MODEL_TYPE!r} model with a strange field: {error}"
            ) from error

    def to_hugging_face(self) -> dict[str, Any]:
        """What a ``config.json`` says; one that never drops has a capacity beyond all sequences."""
        capacity = 2**31 - 1 if self.expert_capacity is None else self.expert_capacity
        about = {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "is_encoder_decoder": True,
        }
        return about | asdict(self) | {"expert_capacity": capacity}

    def sparse_layers(self, decoder: bool) -> tuple[bool, ...]:
        """Which layers of a stack are sparse."""
        num_layers = self.num_decoder_layers if decoder else self.num_layers
        num_sparse = self.num_sparse_decoder_layers if decoder else self.num_sparse_encoder_layers
        step = num_layers // num_sparse
        return tuple(step == 1 or i % step == 1 for i in range(num_layers))
