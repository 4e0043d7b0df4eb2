"""Switch Transformer: against transformers, against plain loops, its files and its training.

Legend: B sequences, S tokens of the input, T tokens of the output, P experts, D features.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin, switch
from brt_models.switch.attention import position_bucket
from brt_models.switch.sparse import SparseMLP
from brt_models.workloads.switch import sparse_layer

TINY: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 4,
    "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
    "num_heads": 4, "num_experts": 4, "expert_capacity": 8,
}  # fmt: skip
CASES = {
    "as published": {},
    "every layer sparse": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4},
    "stacks of different depth": {"num_layers": 2, "num_sparse_encoder_layers": 1},
    "biased router": {"router_bias": True},
    "head of its own": {"tie_word_embeddings": False},
    "silu": {"dense_act_fn": "silu"},
    "few buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9},
}


def tiny(**changes: Any) -> switch.SwitchTransformer:
    return switch.SwitchTransformer(switch.SwitchConfig(**(TINY | changes))).eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, 64, (batch, length))


def theirs(**changes: Any) -> Any:
    """transformers' model; it never drops a token, since its 5.0."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.SwitchTransformersConfig(**(TINY | changes), decoder_start_token_id=0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gates that use every expert, and biases that are not zero
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0))
            if name.endswith("layer_norm.weight"):
                parameter.abs_()
        # Untied, transformers 5 gives each stack an embedding of its own, which no checkpoint has
        model.encoder.embed_tokens.weight.copy_(model.shared.weight)
        model.decoder.embed_tokens.weight.copy_(model.shared.weight)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers_where_no_token_is_dropped(case: str, tmp_path: Path) -> None:
    # transformers 5 never drops: compared with the option that never drops either
    wanted = theirs(**CASES[case])
    wanted.save_pretrained(tmp_path)
    model = switch.load(tmp_path, never_drop=True)
    ids_BS, ids_BT = ids(2, 21), ids(2, 9)
    found = model(ids_BS, ids_BT)
    expected = wanted(input_ids=ids_BS, decoder_input_ids=ids_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_equals_transformers_with_padding_and_long_inputs(tmp_path: Path) -> None:
    wanted = theirs()
    wanted.save_pretrained(tmp_path)
    model = switch.load(tmp_path, never_drop=True)
    ids_BS, ids_BT = ids(3, 200), ids(3, 150)
    mask_BS = (torch.arange(200) < torch.tensor([200, 3, 77])[:, None]).long()
    found = model(ids_BS, ids_BT, mask_BS)
    expected = wanted(input_ids=ids_BS, attention_mask=mask_BS, decoder_input_ids=ids_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_generates_what_transformers_does(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    wanted = theirs()
    wanted.save_pretrained(tmp_path)
    model = switch.load(tmp_path, never_drop=True)
    ids_BS = ids(4, 11)
    mask_BS = (torch.arange(11) < torch.tensor([11, 3, 7, 11])[:, None]).long()
    expected = wanted.generate(
        input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=12, do_sample=False
    )
    assert torch.equal(model.generate(ids_BS, mask_BS, max_new_tokens=12), expected)


@torch.no_grad()
def test_caches_change_nothing() -> None:
    model = tiny(expert_capacity=None)
    ids_BS, ids_BT = ids(2, 7), ids(2, 6)
    whole = model(ids_BS, ids_BT)
    memory_BSD, bias, _ = model.encode(ids_BS)
    pasts, parts = model.decoder.start(memory_BSD), []
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        logits, pasts, _ = model.decode(ids_BT[:, begin:end], pasts, bias)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_generation_ends_with_its_sequences() -> None:
    torch.manual_seed(3)
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    ids_BS = ids(4, 11)
    endless = model.generate(ids_BS, max_new_tokens=8).tolist()
    assert len({tuple(row) for row in endless}) > 1
    end = endless[0][3]  # the word that, as end token, ends the first sequence there
    model.config = replace(model.config, eos_token_id=end)
    found = model.generate(ids_BS, max_new_tokens=8).tolist()
    for row, longer in zip(found, endless, strict=True):
        length = longer.index(end) + 1 if end in longer else len(longer)
        assert row == (longer[:length] + [0] * 9)[: len(row)]
    with pytest.raises(BrtError, match="max_new_tokens must be >= 1, got 0"):
        model.generate(ids(1, 4), max_new_tokens=0)


def by_loop(layer: SparseMLP, x_BSD: Tensor, capacity: int | None) -> Tensor:
    """The published rule, token by token."""
    out_BSD = torch.zeros_like(x_BSD)
    for sequence, out_SD in zip(x_BSD, out_BSD, strict=True):
        taken = [0] * len(layer.experts)
        for x_D, out_D in zip(sequence, out_SD, strict=True):
            share_P = layer.gate(x_D).softmax(0)
            expert = int(share_P.argmax())
            if capacity is None or taken[expert] < capacity:
                out_D += share_P[expert] * layer.experts[expert](x_D)
            taken[expert] += 1
    return out_BSD


@pytest.mark.parametrize("capacity", [1, 3, 8, None])
@pytest.mark.parametrize("shape", [(2, 13), (1, 1), (3, 1), (0, 4), (2, 0)])
@torch.no_grad()
def test_capacity_is_counted_in_each_sequence(capacity: int | None, shape: tuple[int, int]) -> None:
    layer = SparseMLP(switch.SwitchConfig(**(TINY | {"expert_capacity": capacity}))).eval()
    x_BSD = torch.randn(*shape, 16)
    out_BSD, scores_BSP = layer(x_BSD)
    torch.testing.assert_close(out_BSD, by_loop(layer, x_BSD, capacity))
    assert scores_BSP.shape == (*shape, 4)


@torch.no_grad()
def test_overflow_gives_zero_and_the_residual_passes() -> None:
    model = tiny(expert_capacity=1)
    block = model.encoder.blocks[1]
    block.mlp.gate.weight.zero_()  # all like expert 0 best
    x_BSD = torch.randn(1, 5, 16)
    out_BSD, _ = block.mlp(x_BSD)
    assert bool(out_BSD[0, 0].any())
    assert not bool(out_BSD[0, 1:].any())


@torch.no_grad()
def test_the_gate_is_in_float32_under_autocast() -> None:
    layer = SparseMLP(switch.SwitchConfig(**TINY)).eval()
    x_BSD = torch.randn(2, 7, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, scores_BSP = layer(x_BSD)
    assert scores_BSP.dtype == torch.float32
    torch.testing.assert_close(scores_BSP, layer.gate(x_BSD.float()), rtol=1e-6, atol=1e-6)


def test_positions_fall_into_their_buckets() -> None:
    near, far = torch.arange(-7, 8), torch.tensor([-1000, -128, -127, 127, 128, 1000])
    assert position_bucket(near, True, 32, 128).tolist() == [
        *range(7, 0, -1),
        *([0]),
        *range(17, 24),
    ]
    assert position_bucket(near, False, 32, 128).tolist() == [*range(7, -1, -1), *([0] * 7)]
    assert position_bucket(far, True, 32, 128).tolist() == [15, 15, 15, 31, 31, 31]


def test_published_presets() -> None:
    for num_experts in (8, 16, 32, 64, 128, 256):
        config = switch.SwitchConfig.base(num_experts)
        assert config.num_experts == num_experts
        assert sum(config.sparse_layers(decoder=False)) == 6
        assert config.sparse_layers(decoder=True)[:4] == (False, True, False, True)
    with torch.device("meta"):
        model = switch.SwitchTransformer(switch.SwitchConfig.base(8))
    # 12 sparse layers of 8 experts, and what a T5 base with untied feed-forward layers has
    assert 6.1e8 < sum(p.numel() for p in model.parameters()) < 6.3e8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_sparse_encoder_layers": 5}, "there cannot be more"),
        ({"num_sparse_decoder_layers": 0}, "must be >= 1, got 0"),
        ({"expert_capacity": 0}, "None for all that come"),
        ({"dense_act_fn": "gated-gelu"}, "there are relu, gelu, silu"),
        ({"relative_attention_num_buckets": 6}, "multiple of 4"),
        ({"eos_token_id": 64}, "one of 64 tokens"),
        ({"dropout_rate": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_contradictory_configs(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BrtError, match=says):
        switch.SwitchConfig(**(TINY | changes))


def test_config_of_another_model() -> None:
    with pytest.raises(BrtError, match="'t5' model"):
        switch.SwitchConfig.from_hugging_face({"model_type": "t5"})
    for strange in ({"dropout_rate": "0.1"}, {"num_heads": "12"}, {"eos_token_id": [1, 2]}):
        with pytest.raises(BrtError, match=r"strange field|must be"):
            switch.SwitchConfig.from_hugging_face(strange)
    with pytest.raises(BrtError, match="there are models of 8, 16"):
        switch.SwitchConfig.base(7)


def whole(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")


def whole_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in
              ("encoder", "decoder")}  # fmt: skip
    torch.save(tensors | copies | {"lm_head.weight": tensors["shared.weight"]},
               folder / "pytorch_model.bin")  # fmt: skip


def shards(folder: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    from safetensors.torch import save_file

    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        held = {key: tensors[key] for key in part}
        if suffix == "safetensors":
            save_file(held, folder / name)
        else:
            torch.save(held, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


CONTAINERS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "safetensors": whole,
    "bin with tied copies": whole_bin,
    "sharded safetensors": lambda folder, tensors: shards(folder, tensors, "safetensors"),
    "sharded bin": lambda folder, tensors: shards(folder, tensors, "bin"),
}


def tensors_of(model: switch.SwitchTransformer, folder: Path) -> dict[str, Tensor]:
    """Weights as Hugging Face names them; leaves the config in the folder."""
    from safetensors.torch import load_file

    switch.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


@pytest.mark.parametrize("container", CONTAINERS)
@torch.no_grad()
def test_loads_every_container(container: str, tmp_path: Path) -> None:
    model = tiny()
    CONTAINERS[container](tmp_path, tensors_of(model, tmp_path))
    loaded = switch.load(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert switch.load(tmp_path, dtype=torch.bfloat16)(ids(1, 5), ids(1, 3)).dtype == torch.bfloat16


def test_names_are_those_of_hugging_face(tmp_path: Path) -> None:
    wanted = theirs()
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    ours = {switch.files.hugging_face_name(name) for name in tiny().state_dict()}
    assert len(wanted.state_dict()) == 120
    assert ours == wanted.state_dict().keys() - tied
    switch.save(tiny(), tmp_path)
    back, report = type(wanted).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids_BS, ids_BT = ids(1, 5), ids(1, 3)
    with torch.no_grad():
        expected = back.eval()(input_ids=ids_BS, decoder_input_ids=ids_BT).logits
        found = switch.load(tmp_path, never_drop=True)(ids_BS, ids_BT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    tensors = tensors_of(tiny(), tmp_path)
    del tensors["encoder.final_layer_norm.weight"]
    del tensors["decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight"]
    tensors["shared.weight"] = torch.zeros(60, 16)
    tensors["decoder.block.0.layer.0.layer_norm.weight"] = torch.zeros(
        16, dtype=torch.float8_e4m3fn
    )
    tensors["bert.pooler.weight"] = torch.zeros(1)
    whole(tmp_path, tensors)
    with pytest.raises(BrtError) as failure:
        switch.load(tmp_path)
    for part in (
        "5 complaints",
        "missing: encoder.norm.weight",
        "missing: decoder.blocks.1.mlp.experts.3.wo.weight",
        "not of this model: bert.pooler.weight",
        "embed.weight is [60, 16], not [64, 16]",
        "float8_e4m3fn",
    ):
        assert part in str(failure.value)


def test_a_copy_that_is_none(tmp_path: Path) -> None:
    tensors = tensors_of(tiny(), tmp_path)
    whole(tmp_path, tensors | {"lm_head.weight": torch.zeros(64, 16)})
    with pytest.raises(BrtError, match=r"lm_head\.weight is not the same as shared\.weight"):
        switch.load(tmp_path)


class Planted:
    """What a pickle may do where it is trusted."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.mark, "ran")


def test_damaged_files(tmp_path: Path) -> None:
    tensors = tensors_of(tiny(), tmp_path)
    with pytest.raises(BrtError, match="holds no weights"):
        switch.load(tmp_path)
    shards(tmp_path, tensors, "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BrtError, match="lacks 1 of 2 shards: model-00002"):
        switch.load(tmp_path)
    for shard in ('"../a.bin"', "[1]", "null"):
        index = '{"weight_map": {"a": ' + shard + "}}"
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(BrtError, match="not files beside it"):
            switch.load(tmp_path)
    whole(tmp_path, tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BrtError, match="cannot read"):
        switch.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BrtError, match="must hold a JSON object"):
        switch.load(tmp_path)


def test_a_pickle_with_code_runs_nothing(tmp_path: Path) -> None:
    tensors_of(tiny(), tmp_path)
    mark, path = tmp_path / "mark", tmp_path / "pytorch_model.bin"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Planted(mark))),
        lambda: torch.save({"shared.weight": Planted(mark)}, path),
    ):
        write()
        with pytest.raises(BrtError, match=r"could run code|cannot read"):
            switch.load(tmp_path)
    assert not mark.exists()
    torch.save({"epoch": 3}, path)
    with pytest.raises(BrtError, match="no state dict"):
        switch.load(tmp_path)


def test_losses_reach_every_parameter() -> None:
    model = tiny(router_jitter_noise=0.01).train()
    labels_BT = ids(2, 6)
    labels_BT[1, 3:] = -100
    kept = labels_BT.clone()
    found = switch.loss(model, ids(2, 9), labels_BT)
    assert torch.equal(labels_BT, kept)
    found.total.backward()
    assert all(p.grad is not None for p in model.parameters())
    for layer in (m for m in model.modules() if isinstance(m, SparseMLP)):
        assert layer.gate.weight.grad is not None
        assert bool(layer.gate.weight.grad.any())
    coefficients = model.config.router_z_loss_coef, model.config.router_aux_loss_coef
    total = found.words + coefficients[0] * found.router_z + coefficients[1] * found.load_balance
    torch.testing.assert_close(found.total, total)


@torch.no_grad()
def test_losses_are_those_of_the_papers() -> None:
    model = tiny()
    ids_BS, labels_BT = ids(2, 9), ids(2, 6)
    found = switch.loss(model, ids_BS, labels_BT)
    shifted_BT = torch.cat([torch.zeros(2, 1, dtype=torch.int64), labels_BT[:, :-1]], 1)
    logits_BTV, scores = model.with_scores(ids_BS, shifted_BT)
    words = -logits_BTV.log_softmax(-1).gather(2, labels_BT[..., None]).mean()
    torch.testing.assert_close(found.words, words)
    router_z = load_balance = 0.0
    for scores_BSP in scores:
        router_z += float(scores_BSP.exp().sum(-1).log().square().mean())
        for logits_SP in scores_BSP:
            wished_S = logits_SP.argmax(1)
            share_P = torch.stack([(wished_S == p).float().mean() for p in range(4)])
            load_balance += float(4 * (share_P * logits_SP.softmax(1).mean(0)).sum()) / 2
    assert float(found.router_z) == pytest.approx(router_z, rel=1e-5)
    assert float(found.load_balance) == pytest.approx(load_balance, rel=1e-5)


@torch.no_grad()
def test_profile_and_optimise() -> None:
    model = tiny(expert_capacity=3)
    block = model.encoder.blocks[1]
    block.mlp.gate.weight[2:] = 0  # experts that hardly any token likes
    batches = [(ids(2, 13), ids(2, 5)) for _ in range(3)]
    profile = brt.profile(model, batches)
    assert len(profile.routers) == 4
    fast = brt.optimize(model, profile, sample=batches[0], measure=False)
    assert [region.path for region in fast.report.regions] == [""]  # the whole model
    for batch in (batches[1], (ids(2, 13), ids(2, 5)), (ids(1, 1), ids(1, 1))):
        torch.testing.assert_close(fast(*batch), model(*batch), rtol=1e-5, atol=1e-5)


def test_narrow_models_take_little() -> None:
    model = switch.narrow(8)
    assert sum(p.numel() for p in model.parameters()) < 2e6
    assert replace(model.config, d_model=768).num_layers == 12
    first, again, other = switch.sample(), switch.sample(seed=0), switch.sample(seed=1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert model(*first).shape == (2, 16, 256)


@torch.inference_mode()
def test_workload_variants_agree() -> None:
    sizes = {"num_experts": 4, "d_model": 16, "d_ff": 32, "batch": 2, "tokens": 9}
    workload = sparse_layer(torch.device("cpu"), torch.float32, **sizes)
    assert workload.reference is not None
    for variant in (v for v in workload.variants if v.is_checked):
        if variant.name == "transformers":
            pytest.importorskip("transformers", minversion="5.0")
        run = variant.make()
        for arguments in workload.sets:
            wanted = workload.reference(*arguments)
            error = (run(*arguments) - wanted).abs().max() / wanted.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


def test_offered_models() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "switch-base-8")
        assert "switch-layer" in plugins.collect("workloads")
    assert spec.factory(num_experts=4).config.num_experts == 4
    assert not spec.factory().training
