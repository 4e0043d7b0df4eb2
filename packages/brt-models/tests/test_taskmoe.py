"""TaskMoE against a loop over experts, against transformers' decoder, and bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import brt
from brt import plugins
from brt.errors import BrtError
from brt.protocols import Hash
from brt_models import _plugin
from brt_models.taskmoe import TaskMoE, TaskMoEConfig, load_dense, sample, small
from brt_models.workloads.taskmoe import IndexLoop, task_workload

TINY = TaskMoEConfig(
    num_tasks=4, num_layers=2, hidden_size=8, num_heads=2, intermediate_size=12, vocab_size=20,
    max_positions=10,
)  # fmt: skip


def tiny(config: TaskMoEConfig = TINY) -> TaskMoE:
    torch.manual_seed(0)
    return TaskMoE(config).eval()


def sentences(tasks: list[int], tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(tasks))
    ids_NS = torch.randint(20, (len(tasks), tokens), generator=generator)
    return ids_NS, torch.tensor(tasks, dtype=torch.int64)


def plain(model: TaskMoE, ids_NS: Tensor, task_N: Tensor) -> Tensor:
    """One sentence after another."""
    config = model.config
    protocol = Hash(config.num_tasks, config.seed, config.placement_aware)
    choice_TK = protocol(torch.arange(config.num_tasks), config.num_tasks).choice_NK
    assert choice_TK is not None
    answers = []
    for ids, task in zip(ids_NS, task_N.tolist(), strict=True):
        x = model.embeddings(ids[None])
        for layer in model.layer:
            x = layer.attention(x)
            x = sum(layer.experts[e](x) for e in choice_TK[task].tolist() if e >= 0)
        answers.append(model.lm_head(x)[0])
    return torch.stack(answers)


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("hash", TINY),
        ("other seed", replace(TINY, seed=3)),
        ("neighbours", replace(TINY, placement_aware=True)),
        ("odd number of tasks", replace(TINY, num_tasks=3)),
    ],
)
@pytest.mark.parametrize("tasks", [[0], [1, 1, 1], [2, 0, 1, 2, 0]], ids=str)
@torch.inference_mode()
def test_equals_one_sentence_after_another(
    tasks: list[int], case: str, config: TaskMoEConfig
) -> None:
    model, batch = tiny(config), sentences(tasks)
    torch.testing.assert_close(model(*batch), plain(model, *batch), msg=case)


@torch.inference_mode()
def test_no_sentences() -> None:
    assert tiny()(*sentences([])).shape == (0, 5, 20)


@torch.inference_mode()
def test_a_token_sees_what_is_before_it() -> None:
    model, (ids_NS, task_N) = tiny(), sentences([0, 1])
    other = ids_NS.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 20
    before, after = model(ids_NS, task_N), model(other, task_N)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_gradients_reach_the_experts_of_the_tasks() -> None:
    model, batch = tiny().train(), sentences([0, 0])
    model(*batch).square().mean().backward()
    grads = [
        sum(float(p.grad.abs().sum()) for p in expert.parameters())
        for expert in model.layer[0].experts
    ]
    assert sum(grad > 0 for grad in grads) == 2
    torch.manual_seed(1)
    assert not torch.equal(model(*batch), model(*batch))  # dropout


@pytest.mark.parametrize("tasks", [[0, 1, 2, 3], [1, 1]], ids=str)
def test_optimised_gives_the_same(tasks: list[int]) -> None:
    model, batch = tiny(), sentences(tasks)
    fast = brt.optimize(model, brt.profile(model, [batch]), sample=batch, measure=False)
    with torch.inference_mode():
        for other in ([0, 1, 2, 3], [1, 1], [3], [2, 0, 0]):
            torch.testing.assert_close(fast(*sentences(other)), model(*sentences(other)))


def test_one_task_is_the_decoder_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertGenerationConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=10, is_decoder=True, bos_token_id=2,
    )  # fmt: skip
    theirs = transformers.BertGenerationDecoder(config).eval()
    ours = tiny(replace(TINY, num_tasks=1))
    load_dense(ours, theirs.state_dict())
    ids_NS, task_N = sentences([0, 0, 0])
    with torch.inference_mode():
        wanted = theirs(ids_NS).logits
        torch.testing.assert_close(ours(ids_NS, task_N), wanted, rtol=1e-5, atol=1e-5)
    many = tiny()
    load_dense(many, theirs.state_dict())
    for expert in many.layer[1].experts:
        assert torch.equal(expert.intermediate.weight, ours.layer[1].experts[0].intermediate.weight)


def test_weights_of_another_model() -> None:
    with pytest.raises(BrtError, match="of another model: none of its 1 names"):
        load_dense(tiny(), {"x": torch.zeros(1)})
    ours = {"lm_head.bias": torch.zeros(20), "x": torch.zeros(1)}
    wanted = r"(?s)missing: embeddings\.LayerNorm\.bias.*not of this model: x"
    with pytest.raises(BrtError, match=wanted):
        load_dense(tiny(), ours)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"num_heads": 3}, "3 heads do not share hidden_size=8 evenly"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1"),
        ({"pad_token_id": 20}, "pad_token_id=20 is none of 20 tokens"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY, **fields)


def test_what_are_no_sentences() -> None:
    model, (ids_NS, task_N) = tiny(), sentences([0, 1])
    with pytest.raises(BrtError, match=r"integers \[N, S\]"):
        model(ids_NS[0], task_N)
    with pytest.raises(BrtError, match="11 tokens, but there are 10 positions"):
        model(*sentences([0], tokens=11))
    with pytest.raises(BrtError, match=r"2 sentences need as many tasks, got \[1\]"):
        model(ids_NS, task_N[:1])
    with pytest.raises(BrtError, match=r"range\(4\)"):
        model(ids_NS, task_N + 4)


def test_plugin() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "taskmoe")
        assert "taskmoe" in plugins.collect("workloads")
    model, batch = spec.factory(), spec.sample()
    assert not torch.equal(batch[0], spec.sample(seed=1)[0])
    with torch.inference_mode():
        assert model(*batch).shape == (8, 12, 200)
    assert sum(p.numel() for p in small().parameters()) < 100_000
    assert len(sample()) == 2


@torch.inference_mode()
def test_variants_agree() -> None:
    workload = task_workload(tiny(), 4, 6, {})
    assert workload.reference is not None
    wanted = [workload.reference(*arguments) for arguments in workload.sets]
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue
        run = variant.make()
        for arguments, right in zip(workload.sets, wanted, strict=True):
            error = (run(*arguments) - right).abs().max() / right.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"
    model, batch = tiny(), sentences([0, 3, 1])
    torch.testing.assert_close(IndexLoop(model)(*batch), plain(model, *batch))
