"""The language models that brt-models offers, and their benchmarks."""

from __future__ import annotations

import brt
from brt_models import early_exit_decoder, layerskip, mixture_of_depths, sparse_decoder, switch
from brt_models.loaders import sparse_block_loader
from brt_models.sparse_decoder import SparseBlockConfig
from brt_models.workloads import dynamic_depth
from brt_models.workloads import layerskip as layerskip_workloads
from brt_models.workloads import sparse_decoder as sparse_decoder_workloads
from brt_models.workloads import switch as switch_workloads


def _sparse_block(family: str, what: str, paper: str) -> brt.ModelSpec:
    make = getattr(SparseBlockConfig, family.replace("-", "_"))
    return brt.ModelSpec(
        name=f"{family}-block",
        summary=f"sparse block of a decoder: {what}; narrow, random weights",
        factory=lambda **sizes: sparse_decoder.SparseBlock(make(**sizes)).eval(),
        sample=sparse_decoder.sample,
        title=f"Sparse block, {family}",
        cells="a token",
        paper=paper,
        checkpoints=("huggingface",),
        load=sparse_block_loader(family),
    )


MODELS = (
    brt.ModelSpec(
        name="switch-base-8",
        summary="T5 with 8 experts in every other layer; here narrow, with random weights",
        factory=switch.narrow,
        sample=switch.sample,
        title="Switch Transformer, base-8",
        cells="a token",
        paper="Fedus et al. 2021, Switch Transformers, arXiv:2101.03961",
        checkpoints=("huggingface",),
        load=switch.load,
    ),
    _sparse_block("mixtral", "2 of 8 experts, weights that sum to 1", "Mixtral, arXiv:2401.04088"),
    _sparse_block("qwen3-moe", "4 of 16 small experts", "Qwen3, arXiv:2505.09388"),
    _sparse_block(
        "deepseek-v2",
        "4 of 16 small experts in 4 groups, and shared ones",
        "DeepSeek-V2, arXiv:2405.04434",
    ),
    _sparse_block(
        "deepseek-v3",
        "4 of 16 small experts in 4 groups by biased scores, and a shared one",
        "DeepSeek-V3, arXiv:2412.19437",
    ),
    _sparse_block("gpt-oss", "4 of 8 experts with a clamped activation", "arXiv:2508.10925"),
    brt.ModelSpec(
        name="mixture-of-depths",
        summary="decoder whose every other layer takes only some tokens; random weights",
        factory=mixture_of_depths.small,
        sample=mixture_of_depths.sample,
        title="Mixture-of-Depths",
        cells="a token",
        paper="Raposo et al. 2024, arXiv:2404.02258",
    ),
    brt.ModelSpec(
        name="early-exit-decoder",
        summary="decoder whose sequences leave at a layer that is sure; random weights",
        factory=early_exit_decoder.small,
        sample=early_exit_decoder.sample,
        title="Early-exit decoder",
        cells="a sequence",
        paper="LayerSkip, arXiv:2404.16710; CALM, arXiv:2207.07061",
    ),
    brt.ModelSpec(
        name="layerskip",
        summary="Llama whose tokens leave at a layer that is sure, or draft; random weights",
        factory=layerskip.small,
        sample=layerskip.sample,
        title="LayerSkip",
        cells="a token",
        paper="Elhoushi et al., LayerSkip (ACL 2024), arXiv:2404.16710",
        checkpoints=("huggingface",),
        load=layerskip.load,
    ),
)

PROTOCOLS = (brt.ProtocolSpec.of(sparse_decoder.GroupLimitedTopK),)

WORKLOADS = (
    brt.WorkloadSpec(
        name="switch-layer",
        summary="one sparse layer of a Switch Transformer",
        factory=switch_workloads.sparse_layer,
    ),
    brt.WorkloadSpec(
        name="sparse-block",
        summary="one sparse block of Mixtral, Qwen3-MoE, DeepSeek-V2/V3 or gpt-oss",
        factory=sparse_decoder_workloads.sparse_block,
    ),
    brt.WorkloadSpec(
        name="mixture-of-depths",
        summary="a decoder whose layers take only some tokens",
        factory=dynamic_depth.mixture_of_depths,
    ),
    brt.WorkloadSpec(
        name="early-exit-decoder",
        summary="a decoder whose sequences leave at different layers",
        factory=dynamic_depth.early_exit_decoder,
    ),
    brt.WorkloadSpec(
        name="layerskip",
        summary="a Llama's words, drafted by its first layers and verified by the others",
        factory=layerskip_workloads.decoding,
    ),
)
