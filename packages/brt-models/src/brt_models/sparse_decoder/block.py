"""One module for all of them: gate, protocol, experts.

Legend: N tokens (cells), P paths (experts), D model and H hidden features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.protocols import Protocol
from brt_models import checkpoints
from brt_models.sparse_decoder.config import SparseBlockConfig

ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss's activation


class Experts(brt.ExpertRouter):
    """An `ExpertRouter` that a protocol decides for: ``forward(x_ND, scores, ...)``."""

    def __init__(self, protocol: Protocol, num_paths: int, activation: str) -> None:
        super().__init__(num_paths)
        self.protocol = protocol
        # Kept here, since a graph cannot hold a function as an argument
        self.activation = "swiglu" if activation == "swiglu" else clamped_swiglu

    def forward(  # type: ignore[override]
        self,
        x_ND: Tensor,
        scores: Tensor,
        up_PHD: Tensor,
        down_PDH: Tensor,
        **biases: Tensor | None,
    ) -> Tensor:
        """``[N, D]`` -> ``[N, D]``."""
        decision = self.protocol(scores, self.num_paths)
        assert decision.choice_NK is not None
        return super().forward(
            x_ND, decision.choice_NK, decision.weight, up_PHD, down_PDH,
            activation=self.activation, **biases,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The rule, and how many paths."""
        return f"{self.protocol!r}, {super().extra_repr()}"


class GatedMLP(nn.Module):
    """The experts that every token takes, as one."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """``[N, D]`` -> ``[N, D]``."""
        return self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class SparseBlock(nn.Module):
    """Tokens ``[..., D]`` -> ``[..., D]``, each by a few of the experts.

    ``up_PHD`` holds the gate's rows of every expert first, then those that it multiplies.
    """

    choice_bias_P: Tensor

    def __init__(self, config: SparseBlockConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SparseBlockConfig()
        num_experts, dim, hidden = config.num_experts, config.dim, config.hidden
        self.gate = nn.Linear(dim, num_experts, bias=config.gate_bias)
        self.experts = Experts(config.protocol, num_experts, config.activation)
        self.up_PHD = nn.Parameter(torch.randn(num_experts, 2 * hidden, dim) * dim**-0.5)
        self.down_PDH = nn.Parameter(torch.randn(num_experts, dim, hidden) * hidden**-0.5)
        self.up_bias_PH: nn.Parameter | None = None
        self.down_bias_PD: nn.Parameter | None = None
        if config.expert_bias:
            self.up_bias_PH = nn.Parameter(torch.zeros(num_experts, 2 * hidden))
            self.down_bias_PD = nn.Parameter(torch.zeros(num_experts, dim))
        if config.choice_bias:
            self.register_buffer("choice_bias_P", torch.zeros(num_experts))
        if config.shared_hidden:
            self.shared = GatedMLP(dim, config.shared_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        x_ND = x.flatten(0, -2)
        out_ND = self.experts(
            x_ND,
            self.scores(x_ND),
            self.up_PHD,
            self.down_PDH,
            up_bias_PH=self.up_bias_PH,
            down_bias_PD=self.down_bias_PD,
        )
        if self.config.shared_hidden:
            out_ND = out_ND + self.shared(x_ND)
        return out_ND.view(x.shape)

    def scores(self, x_ND: Tensor) -> Tensor:
        """What the protocol is given: ``[N, P]``, or ``[N, 2 * P]`` where choices are biased."""
        if self.config.scores == "logits":
            return self.gate(x_ND)
        # DeepSeek's gates run in float32 from the product on
        logits_NP = F.linear(x_ND.float(), self.gate.weight.float())
        is_softmax = self.config.scores == "softmax"
        score_NP = logits_NP.softmax(-1) if is_softmax else logits_NP.sigmoid()
        if not self.config.choice_bias:
            return score_NP
        return torch.cat([score_NP, score_NP + self.choice_bias_P], 1)

    @torch.no_grad()
    def load_transformers(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what the ``state_dict`` of transformers' (5.0 and up) own block holds.

        Raises `BrtError` with everything that does not fit.
        """
        is_gpt_oss = self.config.activation == "clamped-swiglu"
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            ours = _OURS.get(name, name.replace("shared_experts.", "shared."))
            renamed[ours] = _from_gpt_oss(ours, tensor) if is_gpt_oss else tensor
        own = self.state_dict()
        checkpoints.check_fit("SparseBlock.load_transformers", own, renamed)
        for name, tensor in renamed.items():
            own[name].copy_(tensor)

    @torch.no_grad()
    def to_transformers(self) -> dict[str, Tensor]:
        """The weights as the ``state_dict`` of transformers' own block holds them."""
        is_gpt_oss = self.config.activation == "clamped-swiglu"
        theirs = {ours: name for name, ours in _OURS.items() if is_gpt_oss or "router" not in name}
        named: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            there = theirs.get(name, name.replace("shared.", "shared_experts."))
            named[there] = _to_gpt_oss(name, tensor) if is_gpt_oss else tensor
        return named


_OURS = {
    "router.weight": "gate.weight",
    "router.bias": "gate.bias",
    "gate.e_score_correction_bias": "choice_bias_P",
    "experts.gate_up_proj": "up_PHD",
    "experts.down_proj": "down_PDH",
    "experts.gate_up_proj_bias": "up_bias_PH",
    "experts.down_proj_bias": "down_bias_PD",
}


def clamped_swiglu(x_RH: Tensor) -> Tensor:
    """What lies between the layers of gpt-oss's experts: ``[R, 2H]`` -> ``[R, H]``."""
    gate_RH, up_RH = x_RH.chunk(2, -1)
    gate_RH, up_RH = gate_RH.clamp(max=LIMIT), up_RH.clamp(-LIMIT, LIMIT)
    return (up_RH + 1) * gate_RH * torch.sigmoid(ALPHA * gate_RH)


def _from_gpt_oss(name: str, tensor: Tensor) -> Tensor:
    """Weights as ``[P, out, in]``, gates first: gpt-oss has ``[P, in, out]``, taking turns."""
    if name in ("up_PHD", "down_PDH"):
        tensor = tensor.transpose(1, 2)
    if name in ("up_PHD", "up_bias_PH"):
        tensor = torch.cat([tensor[:, ::2], tensor[:, 1::2]], 1)
    return tensor


def _to_gpt_oss(name: str, tensor: Tensor) -> Tensor:
    """The same the other way round."""
    if name in ("up_PHD", "up_bias_PH"):
        tensor = torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2)
    if name in ("up_PHD", "down_PDH"):
        tensor = tensor.transpose(1, 2).contiguous()
    return tensor


def sample(seed: int = 0, dim: int = 64) -> tuple[Tensor]:
    """Made-up tokens: two sequences of 24, tokens of a sequence alike."""
    generator = torch.Generator().manual_seed(seed)
    topic_B1D = torch.randn(2, 1, dim, generator=generator)
    return (topic_B1D + torch.randn(2, 24, dim, generator=generator),)
