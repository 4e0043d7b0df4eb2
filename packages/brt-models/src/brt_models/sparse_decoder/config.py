"""The shape of a sparse block, and its gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from brt.errors import BrtError
from brt.protocols import Protocol, TopK
from brt_models.sparse_decoder.protocols import GroupLimitedTopK

Scores = Literal["logits", "softmax", "sigmoid"]
Activation = Literal["swiglu", "clamped-swiglu"]

_DEFAULT_GATE = TopK(2, softmax="before", renormalise=True)


@dataclass(frozen=True)
class SparseBlockConfig:
    """A block of ``num_experts`` gated MLPs, ``dim`` -> ``hidden`` -> ``dim``.

    Attributes:
        protocol: the gate's rule, from its scores to experts and weights.
        scores: what the rule is given: the logits of the gate, or a function of them, in float32.
        gate_bias: whether the gate's logits have a bias.
        choice_bias: whether a buffer is added to what experts are chosen by, and to nothing else;
            the rule must be `GroupLimitedTopK` with ``biased``.
        expert_bias: whether the experts' linear layers have biases.
        activation: between the layers of an expert. "clamped-swiglu" is gpt-oss's.
        shared_hidden: hidden features of an MLP that every token takes; 0 = none.
    """

    dim: int = 64
    hidden: int = 96
    num_experts: int = 8
    protocol: Protocol = field(default=_DEFAULT_GATE)
    scores: Scores = "logits"
    gate_bias: bool = False
    choice_bias: bool = False
    expert_bias: bool = False
    activation: Activation = "swiglu"
    shared_hidden: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.hidden, self.num_experts) < 1 or self.shared_hidden < 0:
            raise BrtError(
                "SparseBlockConfig: dim, hidden and num_experts must be >= 1 and shared_hidden "
                f">= 0; got {self.dim}, {self.hidden}, {self.num_experts}, {self.shared_hidden}"
            )
        if self.scores not in ("logits", "softmax", "sigmoid"):
            raise BrtError(
                f"SparseBlockConfig: no scores {self.scores!r}: logits, softmax, sigmoid"
            )
        if self.activation not in ("swiglu", "clamped-swiglu"):
            raise BrtError(
                f"SparseBlockConfig: no activation {self.activation!r}: swiglu, clamped-swiglu"
            )
        if self.choice_bias != getattr(self.protocol, "biased", False):
            raise BrtError(
                f"SparseBlockConfig: choice_bias={self.choice_bias} does not go with the protocol "
                f"{self.protocol}; it is for GroupLimitedTopK(biased=True), which needs it"
            )

    @classmethod
    def mixtral(
        cls, dim: int = 64, hidden: int = 96, num_experts: int = 8, k: int = 2
    ) -> SparseBlockConfig:
        """Mixtral: softmax over all experts, the k best, weights that sum to 1."""
        return cls(dim, hidden, num_experts, TopK(k, softmax="before", renormalise=True))

    @classmethod
    def qwen3_moe(
        cls,
        dim: int = 64,
        hidden: int = 32,
        num_experts: int = 16,
        k: int = 4,
        renormalise: bool = True,
    ) -> SparseBlockConfig:
        """Qwen3-MoE: many small experts; the 235B has 128 and k = 8."""
        return cls(dim, hidden, num_experts, TopK(k, softmax="before", renormalise=renormalise))

    @classmethod
    def deepseek_v2(
        cls,
        dim: int = 64,
        hidden: int = 32,
        num_experts: int = 16,
        k: int = 4,
        num_groups: int = 4,
        groups_taken: int = 2,
        scale: float = 16.0,
        num_shared: int = 2,
    ) -> SparseBlockConfig:
        """DeepSeek-V2: shared experts, and others of groups that are as good as their best."""
        rule = GroupLimitedTopK(k, num_groups, groups_taken, scale=scale)
        return cls(
            dim, hidden, num_experts, rule, scores="softmax", shared_hidden=num_shared * hidden
        )

    @classmethod
    def deepseek_v3(
        cls,
        dim: int = 64,
        hidden: int = 32,
        num_experts: int = 16,
        k: int = 4,
        num_groups: int = 4,
        groups_taken: int = 2,
        renormalise: bool = True,
        scale: float = 2.5,
        num_shared: int = 1,
    ) -> SparseBlockConfig:
        """DeepSeek-V3: sigmoid scores, and a bias that evens loads without a loss."""
        rule = GroupLimitedTopK(
            k, num_groups, groups_taken, "top-2", biased=True, renormalise=renormalise, scale=scale
        )
        shared = num_shared * hidden
        return cls(
            dim, hidden, num_experts, rule, "sigmoid", choice_bias=True, shared_hidden=shared
        )

    @classmethod
    def gpt_oss(
        cls, dim: int = 64, hidden: int = 64, num_experts: int = 8, k: int = 4
    ) -> SparseBlockConfig:
        """gpt-oss: softmax over the k best only, biases everywhere, a clamped activation."""
        return cls(
            dim,
            hidden,
            num_experts,
            TopK(k, softmax="after"),
            gate_bias=True,
            expert_bias=True,
            activation="clamped-swiglu",
        )

    @classmethod
    def from_hugging_face(cls, given: Mapping[str, Any]) -> SparseBlockConfig:
        """The sparse blocks of a model, by its ``config.json``."""
        model_type = given.get("model_type")
        read = _READ.get(str(model_type))
        if read is None:
            raise BrtError(
                f"SparseBlockConfig: no sparse block of {model_type!r} is known; there are "
                f"{', '.join(_READ)}"
            )
        if given.get("hidden_act", "silu") != "silu":
            raise BrtError(f"SparseBlockConfig: experts use silu, not {given['hidden_act']!r}")
        try:
            return read(given)
        except KeyError as error:
            raise BrtError(f"config of a {model_type!r} model without {error}") from error
        except TypeError as error:
            raise BrtError(
                f"config of a {model_type!r} model with a strange field: {error}"
            ) from error


def _mixtral(given: Mapping[str, Any]) -> SparseBlockConfig:
    return SparseBlockConfig.mixtral(
        given["hidden_size"], given["intermediate_size"], given["num_local_experts"],
        given["num_experts_per_tok"],
    )  # fmt: skip


def _qwen3_moe(given: Mapping[str, Any]) -> SparseBlockConfig:
    return SparseBlockConfig.qwen3_moe(
        given["hidden_size"], given["moe_intermediate_size"], _num_experts(given),
        given["num_experts_per_tok"], given.get("norm_topk_prob", False),
    )  # fmt: skip


def _deepseek_v2(given: Mapping[str, Any]) -> SparseBlockConfig:
    limited = given.get("topk_method", "greedy") == "group_limited_greedy"
    return SparseBlockConfig.deepseek_v2(
        given["hidden_size"], given["moe_intermediate_size"], _num_experts(given),
        given["num_experts_per_tok"], given["n_group"] if limited else 1,
        given["topk_group"] if limited else 1, given["routed_scaling_factor"],
        given["n_shared_experts"],
    )  # fmt: skip


def _deepseek_v3(given: Mapping[str, Any]) -> SparseBlockConfig:
    return SparseBlockConfig.deepseek_v3(
        given["hidden_size"], given["moe_intermediate_size"], _num_experts(given),
        given["num_experts_per_tok"], given["n_group"], given["topk_group"],
        given.get("norm_topk_prob", True), given["routed_scaling_factor"],
        given["n_shared_experts"],
    )  # fmt: skip


def _gpt_oss(given: Mapping[str, Any]) -> SparseBlockConfig:
    return SparseBlockConfig.gpt_oss(
        given["hidden_size"], given["intermediate_size"], given["num_local_experts"],
        given["num_experts_per_tok"],
    )  # fmt: skip


def _num_experts(given: Mapping[str, Any]) -> int:
    """Their number, which releases of transformers name differently."""
    for name in ("n_routed_experts", "num_local_experts", "num_experts"):
        if name in given:
            return int(given[name])
    raise KeyError("num_experts")


_READ: dict[str, Callable[[Mapping[str, Any]], SparseBlockConfig]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
