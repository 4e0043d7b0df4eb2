"""Benchmark of the sparse blocks of decoder language models.

Legend: B sequences, S tokens of one, N tokens, K choices per token, P experts, D features.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind, Unavailable
from brt.errors import BrtError
from brt_models.sparse_decoder import GroupLimitedTopK, SparseBlock, SparseBlockConfig
from brt_models.sparse_decoder.block import clamped_swiglu

Family = Literal["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]

_CLASSES: dict[Family, tuple[str, str]] = {
    "mixtral": ("MixtralSparseMoeBlock", "MixtralConfig"),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
    "deepseek_v2": ("DeepseekV2Moe", "DeepseekV2Config"),
    "deepseek_v3": ("DeepseekV3MoE", "DeepseekV3Config"),
    "gpt_oss": ("GptOssMLP", "GptOssConfig"),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def sparse_block(
    device: torch.device,
    dtype: torch.dtype,
    *,
    family: Family = "qwen3_moe",
    dim: int = 512,
    hidden: int = 192,
    num_experts: int = 32,
    k: int = 4,
    batch: int = 4,
    tokens: int = 64,
) -> Workload:
    """A block of one family, random weights; sizes are a quarter of Qwen3-30B's."""
    if family not in get_args(Family):
        raise BrtError(f"sparse-block: family {family!r}; there are {', '.join(get_args(Family))}")
    torch.manual_seed(0)
    config = getattr(SparseBlockConfig, family)(dim, hidden, num_experts, k)
    block = SparseBlock(config).to(device, dtype).eval()
    sets = [(torch.randn(batch, tokens, dim).to(device, dtype),) for _ in range(4)]
    flops = 6.0 * batch * tokens * dim * (k * hidden + config.shared_hidden)

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(block, brt.profile(block, sets), sample=sets[0])

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    return Workload(
        name="sparse-block",
        shapes=f"{family} B={batch} S={tokens} D={dim} H={hidden} P={num_experts} k={k}",
        device=device,
        dtype=dtype,
        sets=sets,
        reference=IndexLoop(block, in_double=True),
        tolerance=TOLERANCE.get(dtype, 3e-2),
        options={
            "family": family, "dim": dim, "hidden": hidden, "num_experts": num_experts, "k": k,
            "batch": batch, "tokens": tokens,
        },
        variants=[
            row("eager", "torch index loop", lambda: IndexLoop(block)),
            row("peer", "transformers", lambda: _transformers(block, family)),
            row("brt", "brt eager", lambda: block),
            row("brt", "brt optimised", optimised),
        ],
    )  # fmt: skip


class IndexLoop(nn.Module):
    """The same block as people write it; ``in_double`` runs the experts in float64."""

    def __init__(self, block: SparseBlock, in_double: bool = False) -> None:
        super().__init__()
        self.block = block
        self.experts = copy.deepcopy(block).double() if in_double else block

    def forward(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``."""
        x_ND = x_BSD.flatten(0, 1)
        config, experts = self.block.config, self.experts
        decision = config.protocol(self.block.scores(x_ND), config.num_experts)
        assert decision.choice_NK is not None
        assert decision.weight is not None
        x_ND = x_ND.to(experts.up_PHD.dtype)
        out_ND = experts.shared(x_ND) if config.shared_hidden else torch.zeros_like(x_ND)
        for path in range(config.num_experts):
            index, choice = (decision.choice_NK == path).nonzero(as_tuple=True)
            if len(index):
                rows_RD = _expert(experts, path, x_ND[index])
                rows_RD = rows_RD * decision.weight[index, choice, None]
                out_ND = out_ND.index_add(0, index, rows_RD.to(out_ND.dtype))
        return out_ND.view(x_BSD.shape).to(x_BSD.dtype)


def _expert(block: SparseBlock, path: int, rows_RD: Tensor) -> Tensor:
    up_bias_PH, down_bias_PD = block.up_bias_PH, block.down_bias_PD
    up_bias_H = None if up_bias_PH is None else up_bias_PH[path]
    down_bias_D = None if down_bias_PD is None else down_bias_PD[path]
    hidden_RH = F.linear(rows_RD, block.up_PHD[path], up_bias_H)
    if block.config.activation == "clamped-swiglu":
        hidden_RH = clamped_swiglu(hidden_RH)
    else:
        gate_RH, up_RH = hidden_RH.chunk(2, -1)
        hidden_RH = F.silu(gate_RH) * up_RH
    return F.linear(hidden_RH, block.down_PDH[path], down_bias_D)


def _transformers(block: SparseBlock, family: Family) -> Callable[[Tensor], Tensor]:
    """transformers' own block of the same sizes, with the same weights."""
    try:
        import transformers
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    config = block.config
    rule: Any = config.protocol
    settings: dict[str, Any] = {
        "hidden_size": config.dim,
        "moe_intermediate_size": config.hidden,
        "intermediate_size": config.hidden,
        "num_experts_per_tok": rule.k,
        "norm_topk_prob": getattr(rule, "renormalise", False),
        # Each family has a name of its own for it
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "n_routed_experts": config.num_experts,
        "num_attention_heads": 1,
    }
    if isinstance(rule, GroupLimitedTopK):
        settings |= {
            "n_group": rule.num_groups,
            "topk_group": rule.groups_taken,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": rule.scale,
            "n_shared_experts": config.shared_hidden // config.hidden,
        }
    block_name, config_name = _CLASSES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    with torch.device("meta"):
        theirs = getattr(module, block_name)(getattr(transformers, config_name)(**settings))
    theirs.load_state_dict(block.to_transformers(), assign=True)
    theirs.eval()
    if family == "gpt_oss":
        return lambda x_BSD: theirs(x_BSD)[0]
    run: Callable[[Tensor], Tensor] = theirs
    return run
