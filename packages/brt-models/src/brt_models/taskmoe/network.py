"""The decoder: attention, and experts by task.

Legend: N sentences (cells), S tokens of one, D features, A heads, K features of a head, T tasks,
V words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt import GatherRouter, ScatterRouter, each
from brt.errors import BrtError
from brt.protocols import Hash
from brt_models.taskmoe.config import TaskMoEConfig

torch.fx.wrap("check_tokens")  # it reads shapes, which a symbolic trace does not have


class Embeddings(nn.Module):
    """Words and positions."""

    def __init__(self, config: TaskMoEConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_positions, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids_NS: Tensor) -> Tensor:
        """[N, S] -> [N, S, D]."""
        position_S = torch.arange(ids_NS.shape[1], device=ids_NS.device)
        x_NSD = self.word_embeddings(ids_NS) + self.position_embeddings(position_S)
        return self.dropout(self.LayerNorm(x_NSD))


class SelfAttention(nn.Module):
    """Heads that see what is not behind a token."""

    def __init__(self, config: TaskMoEConfig) -> None:
        super().__init__()
        self.num_heads, self.probability = config.num_heads, config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NSD: Tensor) -> Tensor:
        """[N, S, D] -> [N, S, D]."""
        q_NASK, k_NASK, v_NASK = (
            layer(x_NSD).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.probability if self.training else 0.0
        out_NASK = F.scaled_dot_product_attention(
            q_NASK, k_NASK, v_NASK, dropout_p=dropout, is_causal=True
        )
        return out_NASK.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """Linear layer, residual, layer norm."""

    def __init__(self, in_size: int, config: TaskMoEConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[..., in_size] and [..., D] -> [..., D]."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Self-attention and its output layer."""

    def __init__(self, config: TaskMoEConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)

    def forward(self, x_NSD: Tensor) -> Tensor:
        """[N, S, D] -> [N, S, D]."""
        return self.output(self.self(x_NSD), x_NSD)


class Expert(nn.Module):
    """A feed-forward layer of its own, with residual and layer norm."""

    def __init__(self, config: TaskMoEConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = Output(config.intermediate_size, config)

    def forward(self, x_NSD: Tensor) -> Tensor:
        """[N, S, D] -> [N, S, D]."""
        return self.output(F.gelu(self.intermediate(x_NSD)), x_NSD)


class Layer(nn.Module):
    """Attention for all, then the sum of what the two experts of a sentence's task give."""

    def __init__(self, config: TaskMoEConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        protocol = Hash(config.num_tasks, config.seed, config.placement_aware)
        self.scatter = ScatterRouter(protocol, config.num_tasks)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_tasks))
        self.gather = GatherRouter(weighted=False)

    def forward(self, x_NSD: Tensor, task_N: Tensor) -> Tensor:
        """[N, S, D] and [N] -> [N, S, D]."""
        paths, route = self.scatter(self.attention(x_NSD), task_N)
        return self.gather(each(self.experts, paths), route)


class TaskMoE(nn.Module):
    """Tokens [N, S] of sentences and their tasks [N] -> logits [N, S, V] of the next tokens.

    Every token sees those before it in its sentence; there is no mask for padding, which comes
    last and is not seen by what is before it.
    """

    def __init__(self, config: TaskMoEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TaskMoEConfig()
        self.embeddings = Embeddings(config)
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.lm_head.weight = self.embeddings.word_embeddings.weight

    def forward(self, ids_NS: Tensor, task_N: Tensor) -> Tensor:
        """[N, S] and [N], both int64 -> [N, S, V]."""
        check_tokens(self.config, ids_NS, task_N)
        x_NSD = self.embeddings(ids_NS)
        for layer in self.layer:
            x_NSD = layer(x_NSD, task_N)
        return self.lm_head(x_NSD)


def check_tokens(config: TaskMoEConfig, ids_NS: Tensor, task_N: Tensor) -> None:
    """Raise unless these are sentences that fit, with a task each."""
    if ids_NS.ndim != 2 or ids_NS.is_floating_point():
        raise BrtError(
            f"TaskMoE: tokens must be integers [N, S], got {ids_NS.dtype} {list(ids_NS.shape)}"
        )
    if ids_NS.shape[1] > config.max_positions:
        raise BrtError(
            f"TaskMoE: sentences of {ids_NS.shape[1]} tokens, but there are "
            f"{config.max_positions} positions"
        )
    if task_N.shape != ids_NS.shape[:1]:
        raise BrtError(
            f"TaskMoE: {ids_NS.shape[0]} sentences need as many tasks, got {list(task_N.shape)}"
        )


def small(num_tasks: int = 4) -> TaskMoE:
    """A small decoder with random weights, in eval mode."""
    config = TaskMoEConfig(
        num_tasks=num_tasks,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        vocab_size=200,
        max_positions=32,
    )
    return TaskMoE(config).eval()


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up sentences [8, 12] of four tasks."""
    generator = torch.Generator().manual_seed(seed)
    ids_NS = torch.randint(200, (8, 12), generator=generator)
    return ids_NS, torch.randint(4, (8,), generator=generator)
