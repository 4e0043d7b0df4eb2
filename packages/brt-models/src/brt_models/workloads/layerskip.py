"""Benchmark of decoding with drafts of the first layers.

Legend: B sequences, S tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt_models.decoder_layer import drawn_ids
from brt_models.layerskip import LayerSkip, LayerSkipConfig, speculate

NUM_WORDS = 1024
HEAD_SIZE = 16


def decoding(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int = 256,
    num_layers: int = 8,
    exit_layer: int = 2,
    num_drafts: int = 4,
    gain: float = 0.1,
    batch: int = 1,
    prompt: int = 16,
    new_tokens: int = 16,
) -> Workload:
    """Words that the whole model writes; random weights, all sequences to the end.

    Layers behind the draft add ``gain`` times what they would, so that some drafts are right.
    """
    torch.manual_seed(0)
    config = LayerSkipConfig(
        vocab_size=NUM_WORDS, hidden_size=dim, intermediate_size=2 * dim,
        num_hidden_layers=num_layers, num_attention_heads=dim // HEAD_SIZE,
        num_key_value_heads=dim // HEAD_SIZE, head_dim=HEAD_SIZE,
    )  # fmt: skip
    model = LayerSkip(config).to(device, dtype).eval()
    with torch.no_grad():
        for name, parameter in model.model.layers[exit_layer:].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(gain)
    sets = [(drawn_ids(NUM_WORDS, (batch, prompt), seed).to(device),) for seed in range(3)]

    def greedy(ids_BS: Tensor) -> Tensor:
        return model.greedy(ids_BS, new_tokens).to(dtype)

    def drafted(ids_BS: Tensor) -> Tensor:
        options = {"exit_layer": exit_layer, "num_drafts": num_drafts}
        return speculate(model, ids_BS, new_tokens, **options).ids_BS.to(dtype)

    def row(kind: Kind, name: str, run: Callable[[Tensor], Tensor]) -> Variant:
        return Variant(kind=kind, name=name, make=lambda: run)

    options = {
        "dim": dim, "num_layers": num_layers, "exit_layer": exit_layer, "num_drafts": num_drafts,
        "gain": gain, "batch": batch, "prompt": prompt, "new_tokens": new_tokens,
    }  # fmt: skip
    return Workload(
        name="layerskip",
        shapes=" ".join(f"{name}={value}" for name, value in options.items()),
        device=device,
        dtype=dtype,
        sets=sets,
        reference=greedy,
        tolerance=0.0,
        options=options,
        variants=[
            row("eager", "whole model, word by word", greedy),
            row("brt", "first layers draft", drafted),
        ],
    )
