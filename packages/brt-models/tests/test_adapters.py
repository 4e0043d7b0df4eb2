"""`brt.adapt` on transformers: every mixture class, and whole models.

Legend: N tokens, K choices per token, P experts, D features.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import brt
from brt import plugins
from brt.cli import make_app
from brt_models import _plugin
from brt_models.adapters import coverage
from brt_models.adapters.activations import activation_of, gate_of
from brt_models.adapters.families import LEFT
from brt_models.adapters.stacked import Layout

transformers = pytest.importorskip("transformers", minversion="5.0")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NUM_TOKENS, DIM = 11, 16


@pytest.fixture(autouse=True)
def _offered() -> Iterator[None]:
    with plugins.using(_plugin):
        yield


@pytest.fixture(scope="module")
def mixtures() -> list[coverage.Mixture]:
    return list(coverage.mixtures())


def test_every_mixture_is_adapted_or_named(mixtures: list[coverage.Mixture]) -> None:
    unknown = [f"{m.family}.{m.name}" for m in mixtures if not m.adapter and not m.why]
    assert not unknown, f"neither adapted nor named in LEFT with a reason: {unknown}"
    adapted = [m for m in mixtures if m.adapter]
    assert len(adapted) > 50
    assert {m.name for m in mixtures if m.name in LEFT} >= {"NllbMoeSparseMLP", "DogeCDMoE"}


def test_the_table_of_the_documentation(mixtures: list[coverage.Mixture]) -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "adapters.md").read_text()
    is_pinned = (
        f"transformers=={transformers.__version__}\n" in (root / "constraints.txt").read_text()
    )
    if not is_pinned and f"transformers {transformers.__version__}" not in page:
        pytest.skip(f"the page is about another transformers than {transformers.__version__}")
    for line in coverage.table().splitlines():
        assert line in page, f"python -m brt_models.adapters.coverage: {line}"


def inputs_of(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a mixture is called with: tokens, and choices where the gate is outside."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(names) == 1:
        return (torch.randn(2, NUM_TOKENS, DIM).to(dtype),)
    if names == ["hidden_states", "router_logits"]:
        return torch.randn(NUM_TOKENS, DIM).to(dtype), torch.randn(NUM_TOKENS, 4).to(dtype)
    scores_NP = torch.rand(NUM_TOKENS, 4)
    weight_NK, choice_NK = scores_NP.topk(2)
    tokens = torch.randn(NUM_TOKENS, DIM)
    if type(module).__name__ == "DbrxExperts":
        tokens = tokens[None]
    return tokens.to(dtype), choice_NK, weight_NK.to(dtype)


def results(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs and gradients of a module, by name."""
    module.zero_grad()
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = module(*given)
    outs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    sum((o.float() * torch.randn(o.shape)).sum() for o in outs).backward()  # type: ignore[union-attr]
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(given) if x.is_floating_point()}
    found |= {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    return found


def difference(came: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference over the largest value, of all that has a name."""
    assert set(wanted) <= set(came)
    worst = 0.0
    for name, want in wanted.items():
        assert came[name].shape == want.shape, name
        scale = max(float(want.abs().max()), 1e-3)
        worst = max(worst, float((came[name].float() - want.float()).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_adapted_class_gives_the_same(
    mixtures: list[coverage.Mixture], dtype: torch.dtype
) -> None:
    failed = []
    for mixture in mixtures:
        if not mixture.adapter:
            continue
        torch.manual_seed(0)
        models = f"transformers.models.{mixture.family}.modeling_{mixture.family}"
        cls = getattr(importlib.import_module(models), mixture.name)
        own = coverage.build(cls).to(dtype)
        ours = copy.deepcopy(own)
        names = set(ours.state_dict())
        adapted = brt.adapt(ours)
        assert [adapter for _, adapter in adapted.changed] == [mixture.adapter], mixture
        assert set(ours.state_dict()) == names
        assert isinstance(ours, cls)
        inputs = inputs_of(own, dtype)
        try:
            found = difference(results(ours, inputs), results(own, inputs))
        except Exception as error:
            failed.append(f"{mixture.name}: {type(error).__name__}: {error}")
            continue
        if not found <= TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2):
            failed.append(f"{mixture.name}: {found:.2g}")
    assert not failed, "\n".join(failed)


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    sizes = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **sizes))


def deepseek_v3() -> nn.Module:
    sizes = SMALL | {
        "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 20,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))


def gpt_oss() -> nn.Module:
    sizes = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


def olmoe() -> nn.Module:
    sizes = SMALL | {"num_experts": 6, "num_experts_per_tok": 3}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    maker.__name__: maker for maker in (mixtral, qwen3_moe, deepseek_v3, gpt_oss, olmoe)
}


def small_switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=2,
        num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str, tmp_path: Path) -> None:
    own = MODELS[name]().eval()
    ours = copy.deepcopy(own)
    adapted = brt.adapt(ours)
    assert adapted.changed
    assert not adapted.left
    ids = torch.randint(3, 64, (2, 9))

    def loss_of(model: Any) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, labels=ids)
        return out.logits, out.loss

    for a, b in zip(loss_of(ours), loss_of(own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for model in (own, ours):
        loss_of(model)[1].backward()
    for (key, a), (_, b) in zip(ours.named_parameters(), own.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=key)
    came = ours.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(came, own.generate(ids, max_new_tokens=4, do_sample=False))
    # Checkpoints of either load into the other
    ours.save_pretrained(tmp_path)
    again = type(own).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, own(input_ids=ids).logits)
    # The very parameters: what trains one trains the other
    again.load_state_dict(own.state_dict())
    before = dict(again.named_parameters())
    brt.adapt(again)
    assert all(before[key] is parameter for key, parameter in again.named_parameters())


def test_switch_transformers() -> None:
    own = small_switch().eval()
    ours = copy.deepcopy(own)
    adapted = brt.adapt(ours)
    assert [path for path, _ in adapted.changed] == [
        "encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp",
    ]  # fmt: skip
    ids = torch.randint(3, 64, (2, 9))
    came = ours(input_ids=ids, decoder_input_ids=ids)
    wanted = own(input_ids=ids, decoder_input_ids=ids)
    torch.testing.assert_close(came.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    texts = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (ours, own)]
    assert torch.equal(*texts)


def test_profile_and_optimise_an_adapted_model() -> None:
    model = small_switch().eval()
    brt.adapt(model)
    batches = [{k: torch.randint(3, 64, (2, 9)) for k in ("input_ids", "decoder_input_ids")}]
    profile = brt.profile(model, batches)
    assert list(profile.routers) == [
        "encoder.block.1.layer.1.mlp.brt_scatter#0", "decoder.block.1.layer.2.mlp.brt_scatter#0",
    ]  # fmt: skip
    fast = brt.optimize(model, profile, sample=batches[0], measure=False)
    torch.testing.assert_close(fast(**batches[0]).logits, model(**batches[0]).logits)


def test_the_interface_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from brt_models.adapters import transformers_interface

    model = gpt_oss().eval()
    ids = torch.randint(3, 64, (2, 9))
    wanted = model(input_ids=ids).logits
    model.set_experts_implementation(transformers_interface.NAME)
    ran: list[int] = []
    monkeypatch.setattr(
        brt.ExpertRouter, "_observe", lambda self, route, scores: ran.append(self.num_paths)
    )
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert ran == [4, 4]
    assert "brt_router" not in dict(model.named_modules())


def test_what_is_left_is_said() -> None:
    from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    config = NllbMoeConfig(d_model=16, num_experts=4)
    model = nn.Sequential(NllbMoeSparseMLP(config, 24))
    adapted = brt.adapt(model)
    assert not adapted.changed
    assert adapted.left == (("0", LEFT["NllbMoeSparseMLP"]),)
    assert "left: " in str(adapted)
    odd = nn.Module()
    odd.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 6))
    odd.down_proj = nn.Parameter(torch.zeros(2, 5, 4))
    assert Layout.of(odd) is None  # nothing calls it with choices


class Odd(nn.Module):
    def __init__(self, rows: int, act: bool = True) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, rows, 6))
        self.down_proj = nn.Parameter(torch.zeros(2, 6, 4))
        if act:
            self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        return x


def test_the_command(tmp_path: Path) -> None:
    app, runner = make_app(), CliRunner()
    done = runner.invoke(app, ["adapt", "MixtralForCausalLM", "--json"], catch_exceptions=False)
    rows = json.loads(done.stdout)
    assert len(rows) == 32
    assert rows[3]["module"] == "model.layers.3.mlp.experts"
    olmoe().save_pretrained(tmp_path)
    done = runner.invoke(app, ["adapt", str(tmp_path)], catch_exceptions=False)
    assert "OlmoeForCausalLM" in done.stdout
    assert "stacked-experts" in done.stdout
    with pytest.raises(brt.BrtError, match="no adapter knows a model class"):
        runner.invoke(app, ["adapt", "Nothing"], catch_exceptions=False)


def test_experts_that_do_not_fit_are_left() -> None:
    for module, why in ((Odd(7), "do not fit together"), (Odd(8, act=False), "neither act_fn")):
        (left,) = brt.adapt(nn.Sequential(module)).left
        assert left[0] == "0"
        assert why in left[1]
    assert brt.adapt(nn.Sequential(Odd(8))).changed


def test_activations_are_told_by_what_they_compute() -> None:
    assert activation_of(nn.SiLU()) == "silu"
    assert activation_of(nn.GELU("tanh")) == "gelu_tanh"
    assert activation_of(transformers.activations.ACT2FN["gelu"]) == "gelu"
    assert activation_of(torch.tanh) is None
    assert activation_of(lambda x: x.clamp(max=30).relu()) is None
    assert gate_of(lambda x: torch.sigmoid(x[..., :60]) * x[..., :60] * x[..., 60:]) == "swiglu"
    assert gate_of(lambda x: x[..., ::2] * x[..., 1::2]) is None
    assert gate_of(lambda x: x.view(3, 5, 7)) is None


def test_ids_of_no_expert_take_no_part() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    own = coverage.build(MixtralExperts)
    ours = copy.deepcopy(own)
    brt.adapt(ours)
    x, choice, weight = inputs_of(own, torch.float32)
    choice[2] = 4
    weight[2] = 0
    torch.testing.assert_close(ours(x, choice, weight), own(x, choice % 4, weight))
