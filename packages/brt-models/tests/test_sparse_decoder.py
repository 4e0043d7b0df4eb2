"""Sparse blocks of decoder language models: against transformers' own, and against plain loops.

Legend: B sequences, S tokens of one, N tokens, P experts, D features.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import brt
from brt import plugins
from brt.errors import BrtError, ProtocolError
from brt.protocols import TopK
from brt.testing import check_protocol
from brt_models import _plugin
from brt_models.sparse_decoder import GroupLimitedTopK, SparseBlock, SparseBlockConfig, load, sample
from brt_models.workloads.sparse_decoder import IndexLoop, sparse_block

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
SMALL = {"dim": 16, "hidden": 24}

DEEPSEEK = {
    "hidden_size": 16, "moe_intermediate_size": 12, "num_experts_per_tok": 3,
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
    "routed_scaling_factor": 2.5, "num_attention_heads": 4,
}  # fmt: skip
QWEN = {
    "hidden_size": 16, "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
MIXTRAL = {
    "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
# family, block, config, its settings
THEIRS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", MIXTRAL),
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", QWEN),
    "qwen3-moe, normed": (
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", QWEN | {"norm_topk_prob": True}
    ),
    "deepseek-v2, greedy": ("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", DEEPSEEK),
    "deepseek-v2, groups": (
        "deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config",
        DEEPSEEK | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", DEEPSEEK),
    "deepseek-v3, one group": (
        "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config",
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "gpt-oss": ("gpt_oss", "GptOssMLP", "GptOssConfig", MIXTRAL),
}  # fmt: skip


def theirs(case: str) -> tuple[nn.Module, SparseBlock]:
    """transformers' block with random weights, and ours with the same."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    family, cls, config_cls, settings = THEIRS[case]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(transformers, config_cls)(**settings)
    block = getattr(module, cls)(config).eval()
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            tensor.copy_(torch.randn_like(tensor) * (3.0 if "proj_bias" in name else 0.3))
    own = SparseBlock(SparseBlockConfig.from_hugging_face(config.to_dict())).eval()
    own.load_transformers(block.state_dict())
    return block, own


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_equals_transformers(case: str, shape: tuple[int, int]) -> None:
    block, own = theirs(case)
    x_BSD = 3 * torch.randn(*shape, 16)
    ours, other = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    found, wanted = own(ours), block(other)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(wanted)
    found.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", THEIRS)
def test_weights_go_both_ways(case: str) -> None:
    block, own = theirs(case)
    wanted, found = block.state_dict(), own.to_transformers()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


LANGUAGE_MODEL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
IN_GROUPS = {
    "moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "intermediate_size": 24,
}  # fmt: skip
SAVED: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8},
    "DeepseekV2": IN_GROUPS,
    "DeepseekV3": IN_GROUPS,
    "GptOss": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},
}


def save_language_model(family: str, folder: Path, **how: Any) -> nn.Module:
    """A model of transformers, saved in the container of the hub; its second layer's block."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(transformers, f"{family}Config")(**LANGUAGE_MODEL, **SAVED[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    block: nn.Module = model.model.layers[1].mlp
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.copy_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder, **how)
    return block


@pytest.mark.parametrize("family", SAVED)
@torch.no_grad()
def test_loads_one_layer_of_a_model(family: str, tmp_path: Path) -> None:
    block = save_language_model(family, tmp_path)
    own = load(tmp_path, layer=1)
    assert not own.training
    x_BSD = torch.randn(2, 5, 16)
    wanted = block(x_BSD)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(own(x_BSD), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(BrtError, match="has no experts"):
        load(tmp_path, layer=7)
    if "Deepseek" in family:
        with pytest.raises(BrtError, match="it is dense"):
            load(tmp_path, layer=0)


def test_only_the_shards_of_the_layer_are_read(tmp_path: Path) -> None:
    save_language_model("Mixtral", tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    of_layer = {s for name, s in index["weight_map"].items() if "layers.1.block_sparse" in name}
    for shard in set(index["weight_map"].values()) - of_layer:
        (tmp_path / shard).unlink()
    assert load(tmp_path, layer=1).config.num_experts == 4
    (tmp_path / sorted(of_layer)[0]).unlink()
    with pytest.raises(BrtError, match="lacks 1 of"):
        load(tmp_path, layer=1)


def test_everything_of_a_layer_that_does_not_fit(tmp_path: Path) -> None:
    save_language_model("Mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stem = "model.layers.1.block_sparse_moe.experts"
    del tensors[f"{stem}.2.w3.weight"]
    tensors[f"{stem}.0.w2.weight"] = torch.zeros(3, 24)
    tensors[f"{stem}.1.w1.weight"] = torch.zeros(24, 16).to(torch.float8_e4m3fn)
    tensors[f"{stem}.4.w1.weight"] = torch.zeros(24, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BrtError) as failure:
        load(tmp_path, layer=1)
    for part in (
        "4 complaints",
        "missing: experts.2.up_proj.weight",
        "not of this model: experts.4.gate_proj.weight",
        "experts.0.down_proj.weight is [3, 24], not [16, 24]",
        "float8_e4m3fn",
    ):
        assert part in str(failure.value)


def test_weights_of_another_block() -> None:
    block, own = theirs("mixtral")
    tensors = block.state_dict() | {"extra": torch.zeros(1)}
    del tensors["gate.weight"]
    tensors["experts.down_proj"] = torch.zeros(4, 3, 24)
    with pytest.raises(BrtError) as failure:
        own.load_transformers(tensors)
    for part in ("3 complaints", "missing: gate.weight", "extra", "[4, 3, 24], not [4, 16, 24]"):
        assert part in str(failure.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@torch.no_grad()
def test_equals_a_loop(family: str, num_tokens: int) -> None:
    block = SparseBlock(getattr(SparseBlockConfig, family)(**SMALL)).eval()
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.normal_(std=0.3)
    x_BSD = torch.randn(1, num_tokens, 16)
    torch.testing.assert_close(block(x_BSD), IndexLoop(block)(x_BSD), rtol=1e-5, atol=1e-5)


def grouped_by_hand(rule: GroupLimitedTopK, score_P: list[float], by_P: list[float]) -> list[int]:
    """The experts of one token, best first, in plain Python."""
    size = len(by_P) // rule.num_groups
    count = 1 if rule.group_score == "max" else 2
    groups = [sorted(by_P[g * size : g * size + size])[-count:] for g in range(rule.num_groups)]
    order = sorted(range(rule.num_groups), key=lambda g: -sum(groups[g]))
    inside = [p for g in order[: rule.groups_taken] for p in range(g * size, g * size + size)]
    return sorted(inside, key=lambda p: -by_P[p])[: rule.k]


@pytest.mark.parametrize("group_score", ["max", "top-2"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 4])
def test_groups_by_hand(group_score: Any, biased: bool, taken: int) -> None:
    rule = GroupLimitedTopK(3, 4, taken, group_score, biased=biased, renormalise=True, scale=2.0)
    score_NP = torch.rand(17, 16)
    by_NP = score_NP + torch.randn(16) if biased else score_NP
    decision = rule(torch.cat([score_NP, by_NP], 1) if biased else score_NP, 16)
    assert decision.choice_NK is not None
    assert decision.weight is not None
    for score_P, by_P, choice_K, weight_K in zip(
        score_NP.tolist(), by_NP.tolist(), decision.choice_NK.tolist(), decision.weight.tolist(),
        strict=True,
    ):  # fmt: skip
        wanted = grouped_by_hand(rule, score_P, by_P)
        assert choice_K == wanted
        total = sum(score_P[p] for p in wanted)
        assert weight_K == pytest.approx([2.0 * score_P[p] / total for p in wanted])


def test_the_contract_of_a_protocol() -> None:
    check_protocol(GroupLimitedTopK(2, num_groups=2, groups_taken=1), num_paths=8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k must be an integer >= 1"),
        ({"k": 1, "num_groups": 2, "groups_taken": 3}, "groups_taken=3 of num_groups=2"),
        ({"k": 1, "group_score": "best"}, "'max' or 'top-2'"),
        ({"k": 3, "num_groups": 4}, "lower k or raise groups_taken"),
        ({"k": 1, "num_groups": 3}, "not 3 groups of equal size"),
        ({"k": 1, "num_groups": 8, "group_score": "top-2"}, "at least 2 paths"),
        ({"k": 1, "biased": True}, "must be 16"),
    ],
)
def test_groups_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        GroupLimitedTopK(**options)(torch.rand(5, 8), 8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SparseBlockConfig(dim=0), "must be >= 1"),
        (lambda: SparseBlockConfig(choice_bias=True), "GroupLimitedTopK"),
        (lambda: SparseBlockConfig(scores="tanh"), "no scores 'tanh'"),
        (lambda: SparseBlockConfig(activation="relu"), "no activation 'relu'"),
        (lambda: SparseBlockConfig.from_hugging_face({"model_type": "gpt2"}), "there are mixtral"),
        (
            lambda: SparseBlockConfig.from_hugging_face({"model_type": "mixtral"}),
            "without 'hidden_size'",
        ),
        (
            lambda: SparseBlockConfig.from_hugging_face(
                {"model_type": "mixtral", "hidden_act": "gelu"}
            ),
            "use silu",
        ),
        (
            lambda: SparseBlockConfig.from_hugging_face(
                {"model_type": "mixtral", **MIXTRAL, "hidden_size": "16"}
            ),
            "strange field",
        ),
    ],
)
def test_configs_that_contradict(make: Callable[[], object], says: str) -> None:
    with pytest.raises(BrtError, match=says):
        make()


def test_the_bias_of_choices_weights_nothing() -> None:
    block = SparseBlock(SparseBlockConfig.deepseek_v3(**SMALL)).eval()
    x_ND = torch.randn(6, 16)
    before = block(x_ND)
    with torch.no_grad():
        block.choice_bias_P.add_(5.0)
    torch.testing.assert_close(block(x_ND), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_profile_optimise_and_gradients(family: str) -> None:
    config = getattr(SparseBlockConfig, family)(**SMALL)
    block = SparseBlock(config).eval()
    batches = [sample(seed, dim=16) for seed in range(2)]
    profile = brt.profile(block, batches)
    assert [router.num_paths for router in profile.routers.values()] == [config.num_experts]
    fast = brt.optimize(block, profile, sample=batches[0], measure=False)
    (x_BSD,) = sample(7, dim=16)
    torch.testing.assert_close(fast(x_BSD), block(x_BSD), rtol=1e-5, atol=1e-5)
    block.train()(x_BSD).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert block.gate.weight.grad is not None
    assert bool(block.gate.weight.grad.any())


def test_protocols_of_the_presets() -> None:
    assert SparseBlockConfig.mixtral().protocol == TopK(2, softmax="before", renormalise=True)
    assert SparseBlockConfig.gpt_oss().protocol == TopK(4, softmax="after")


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_workload_variants_agree(family: Any) -> None:
    workload = sparse_block(
        torch.device("cpu"), torch.float32, family=family, dim=16, hidden=24, num_experts=8, k=2,
        batch=2, tokens=5,
    )  # fmt: skip
    assert workload.reference is not None
    for variant in workload.variants:
        if variant.name == "transformers":
            pytest.importorskip("transformers", minversion="5.0")
        run = variant.make()
        for arguments in workload.sets:
            wanted: Tensor = workload.reference(*arguments)
            error = (run(*arguments) - wanted).abs().max() / wanted.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


def test_offered() -> None:
    with plugins.using(_plugin):
        assert plugins.get("models", "deepseek-v3-block").factory()(*sample()).shape == (2, 24, 64)
        assert "sparse-block" in plugins.collect("workloads")
        assert isinstance(
            plugins.get("protocols", "group-limited-top-k").factory(k=2), brt.protocols.Protocol
        )
