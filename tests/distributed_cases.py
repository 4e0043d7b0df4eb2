"""What ranks do in test_distributed_models."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

import brt
import brt_dist
import brt_models._plugin
from brt import plugins
from brt_dist.demo import compare


def adapted_mixtral_equals_one_process(rank: int) -> None:
    """Each rank has a sequence of its own; logits and gradients are those of one process."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=5,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = MixtralForCausalLM(config)
    model = copy.deepcopy(whole)
    with plugins.using(brt_models._plugin):
        brt.adapt(model)
    spread = brt_dist.parallelize(model)
    assert len(spread.changed) == 2
    ids = torch.randint(0, 64, (dist.get_world_size(), 7))
    wanted = whole(ids).logits
    wanted.square().sum().backward()
    logits = model(ids[rank : rank + 1]).logits
    torch.testing.assert_close(logits, wanted[rank : rank + 1], rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    brt_dist.sum_gradients(model, but=spread.experts)
    full = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = full[name].grad
        assert grad is not None
        if name in spread.experts:
            grad = grad[list(model.get_submodule(name.rpartition(".")[0]).brt_router.spread.held)]
        assert parameter.grad is not None, name
        error = (parameter.grad - grad).abs().max() / full[name].grad.abs().max()
        assert error < 1e-4, f"{name}: {error}"
    state = spread.state_dict(model)
    whole.load_state_dict(state)


def demo(rank: int) -> list[int]:
    """The rows that each placement of the demo moves; it checks outputs itself."""
    with plugins.using(brt_models._plugin):
        model = plugins.get("models", "switch-base-8")
    return [row.moved for row in compare(model)]
