"""The language models that brt-models offers, and their benchmarks."""

from __future__ import annotations

import brt
from brt_models import switch
from brt_models.workloads import switch as switch_workloads

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
    ),
)

WORKLOADS = (
    brt.WorkloadSpec(
        name="switch-layer",
        summary="one sparse layer of a Switch Transformer",
        factory=switch_workloads.sparse_layer,
    ),
)
