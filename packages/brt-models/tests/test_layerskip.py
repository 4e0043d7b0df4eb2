"""LayerSkip: equal to a Llama, to loops in plain Python, and to greedy decoding.

Legend: B sequences, S tokens of one, V words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import brt
from brt import plugins
from brt.errors import BrtError, CheckpointError
from brt_models import _plugin, layerskip
from brt_models.layerskip import Curriculum, LayerSkip, LayerSkipConfig, loss, speculate
from brt_models.layerskip.training import dropout_of, exit_weight
from brt_models.workloads.layerskip import decoding

TINY: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "as many keys as heads": {"num_key_value_heads": 4},
    "stretched positions": {"rope_parameters": LLAMA3},
    "tied": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
}


def made(seed: int = 0, **changes: Any) -> LayerSkip:
    """A network in float64, in which no rounding decides between two words."""
    torch.manual_seed(seed)
    model = LayerSkip(LayerSkipConfig(**(TINY | changes))).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def words(*shape: int) -> Tensor:
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(3))


def theirs(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(TINY | {"pad_token_id": 0} | changes))
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("case", LLAMAS)
@torch.no_grad()
def test_equals_the_llama_of_transformers(case: str, tmp_path: Path) -> None:
    llama = theirs(**LLAMAS[case])
    llama.save_pretrained(tmp_path)
    model = layerskip.load(tmp_path)
    assert not model.training
    ids_BS = words(2, 40)
    wanted = llama(ids_BS).logits
    torch.testing.assert_close(model.full(ids_BS), wanted, rtol=1e-5, atol=1e-5)
    # With nobody leaving early, a token through the loop and the cache gives the same
    model.set_threshold(2.0)
    torch.testing.assert_close(model(ids_BS), wanted[:, -1], rtol=1e-5, atol=1e-5)
    layerskip.save(model, tmp_path / "again")
    back, report = type(llama).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(back.eval()(ids_BS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert layerskip.load(tmp_path / "again").config == model.config


@torch.no_grad()
def test_names_are_those_of_the_llama(tmp_path: Path) -> None:
    model = made()
    assert model.state_dict().keys() == theirs().state_dict().keys()
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hugging_face()))
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = layerskip.load(tmp_path, torch.bfloat16)
    assert loaded.config == model.config
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def by_loop(model: LayerSkip, ids_S: Tensor, num_new: int) -> tuple[list[int], list[int]]:
    """(the words of one sequence, the layers of each new one), every token after the other.

    Of each token it keeps what every layer was given; those behind its exit were given what it
    left with.
    """
    ids, depths = ids_S.tolist(), []
    given: list[list[Tensor]] = [[] for _ in model.model.layers]
    while True:
        num_read = len(given[0])
        is_last = num_read == len(ids) - 1
        x_D = model.model.embed_tokens(torch.tensor(ids[num_read]))
        depth = None
        for i, layer in enumerate(model.model.layers):
            given[i].append(x_D)
            if depth is not None:
                continue
            every_1SD = torch.stack(given[i])[None]
            x_D = layer(every_1SD, torch.arange(num_read + 1)[None])[0, -1]
            logits_V = model.head(x_D)
            sure = bool(logits_V.softmax(0).max() >= model.threshold)
            if i == len(given) - 1 or (is_last and sure and i + 1 >= model.config.min_layers):
                depth = i + 1
        if not is_last:
            continue
        if len(depths) == num_new:
            return ids, depths
        ids.append(int(logits_V.argmax()))
        assert depth is not None
        depths.append(depth)


@pytest.mark.parametrize("min_layers", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 6])
@torch.no_grad()
def test_tokens_leave_as_in_a_loop_over_tokens(length: int, min_layers: int) -> None:
    model = made(threshold=0.2, min_layers=min_layers)
    ids_BS = words(4, length)
    found_BT, depth_BT = model.generate(ids_BS, 8)
    for ids_S, found_T, depth_T in zip(ids_BS, found_BT, depth_BT, strict=True):
        assert (found_T.tolist(), depth_T.tolist()) == by_loop(model, ids_S, 8)
    if min_layers < 5:
        assert len(set(depth_BT.flatten().tolist())) > 2, "no mix of exits to compare"


@torch.no_grad()
def test_thresholds() -> None:
    model, ids_BS = made(), words(3, 5)
    model.set_threshold(2.0)
    logits_BV, depth_B = model.with_depth(ids_BS)
    assert depth_B.tolist() == [5, 5, 5]
    torch.testing.assert_close(logits_BV, model.full(ids_BS)[:, -1])
    model.set_threshold(1e-9)
    assert model.with_depth(ids_BS)[1].tolist() == [1, 1, 1]
    assert model.threshold == 1e-9
    assert model(words(0, 5)).shape == (0, 32)
    ids_BT, depth_BN = model.generate(ids_BS, 0)
    assert torch.equal(ids_BT, ids_BS)
    assert depth_BN.shape == (3, 0)


@torch.no_grad()
def test_loop_is_profiled() -> None:
    model = made(threshold=0.2)
    profile = brt.profile(model, [(words(8, 6),)])
    _, depth_B = model.with_depth(words(8, 6))
    for step, (key, router) in enumerate(profile.routers.items()):
        assert key == f"loop#{step}"
        assert router.cells == int((depth_B > step).sum())


@torch.no_grad()
def test_optimise_leaves_it_as_it_is() -> None:
    model, batch = made(threshold=0.2), (words(8, 6),)
    with pytest.warns(UserWarning, match="nothing to work on"):
        fast = brt.optimize(model, brt.profile(model, [batch]), sample=batch)
    torch.testing.assert_close(fast(words(3, 9)), model(words(3, 9)))


def greedy(model: LayerSkip, ids_BS: Tensor, num_new: int) -> Tensor:
    for _ in range(num_new):
        ids_BS = torch.cat([ids_BS, model.full(ids_BS)[:, -1:].argmax(-1)], 1)
    return ids_BS


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
@pytest.mark.parametrize("exit_layer", [1, 4])
@torch.no_grad()
def test_speculation_equals_greedy_decoding(exit_layer: int, num_drafts: int) -> None:
    model = made(seed=1)
    # Layers behind the draft that change some words and not others
    for layer in model.model.layers[exit_layer:]:
        layer.mlp.down_proj.weight.mul_(0.3)  # type: ignore[union-attr, operator]
        layer.self_attn.o_proj.weight.mul_(0.3)  # type: ignore[union-attr, operator]
    ids_BS = words(5, 4)
    found = speculate(model, ids_BS, 12, exit_layer=exit_layer, num_drafts=num_drafts)
    assert torch.equal(found.ids_BS, greedy(model, ids_BS, 12))
    assert 0 < found.num_accepted < found.num_drafted, "drafts all right, or all wrong"
    assert torch.equal(model.greedy(ids_BS, 12), found.ids_BS)
    for row, ids_S in enumerate(ids_BS.split(1)):
        alone = speculate(model, ids_S, 12, exit_layer=exit_layer, num_drafts=num_drafts)
        assert torch.equal(alone.ids_BS[0], found.ids_BS[row])


@torch.no_grad()
def test_speculation_of_a_draft_that_is_always_right() -> None:
    model = made()
    for layer in model.model.layers[2:]:  # they add nothing
        layer.mlp.down_proj.weight.zero_()  # type: ignore[union-attr, operator]
        layer.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr, operator]
    found = speculate(model, words(2, 1), 12, exit_layer=2, num_drafts=4)
    assert torch.equal(found.ids_BS, greedy(model, words(2, 1), 12))
    assert (found.num_rounds, found.num_drafted, found.num_accepted) == (3, 24, 24)
    nothing = speculate(model, words(0, 3), 4, exit_layer=1)
    assert nothing.ids_BS.shape == (0, 7)
    for bad in ({"exit_layer": 5}, {"exit_layer": 0}, {"exit_layer": 1, "num_drafts": 0}):
        with pytest.raises(BrtError, match="exit_layer must be from 1 to below 5"):
            speculate(model, words(1, 3), **bad)


def test_dropout_and_weights_are_those_of_the_paper() -> None:
    rates = [dropout_of(layer, 5, 0.2) for layer in range(5)]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[2] == pytest.approx(0.2 * (2**0.5 - 1))
    # Scale times 0, 0+1, 0+1+2, ...; of the last one L - 1 + scale * (0 + 1 + ... + L - 2)
    assert [exit_weight(layer, 5, 0.5) for layer in range(5)] == [0, 0.5, 1.5, 3, 7]
    assert exit_weight(0, 1, 0.5) == 1


def test_curricula() -> None:
    every = range(8)

    def exits(curriculum: Curriculum, step: int) -> list[int]:
        return [layer for layer in every if curriculum.has_exit(layer, 8, step)]

    assert exits(Curriculum(), 3) == list(every)
    rotating = Curriculum("rotational", every=4)
    assert [exits(rotating, step) for step in (0, 1, 4)] == [[0, 4, 7], [1, 5, 7], [0, 4, 7]]
    gradual = Curriculum("gradual", num_steps=160)
    assert [exits(gradual, step) for step in (0, 9, 10, 35)] == [[7], [7], [6, 7], [4, 5, 6, 7]]
    assert exits(gradual, 80) == list(every)
    rising = Curriculum(rising_dropout=True, num_steps=11)
    assert [rising.dropout_scale(step) for step in (0, 10)] == [0, pytest.approx(1)]
    assert Curriculum().dropout_scale(5) == 1
    with pytest.raises(BrtError, match="no exits 'some'"):
        Curriculum("some")  # type: ignore[arg-type]
    with pytest.raises(BrtError, match="must be at least 1"):
        Curriculum(every=0)


@torch.no_grad()
def test_loss_is_the_weighted_sum_over_layers() -> None:
    model, ids_BS = made(exit_scale=0.5), words(3, 7)
    x_BSD, position_BS = model.model.embed_tokens(ids_BS), torch.arange(7).expand(3, 7)
    losses = []
    for layer in model.model.layers:
        x_BSD = layer(x_BSD, position_BS)
        words_BSV = model.head(x_BSD[:, :-1]).log_softmax(-1)
        losses.append(-words_BSV.gather(2, ids_BS[:, 1:, None]).mean())
    weights = torch.tensor([0, 0.5, 1.5, 3, 7])
    wanted = (torch.stack(losses) * weights).sum() / weights.sum()
    torch.testing.assert_close(loss(model, ids_BS), wanted)
    rotating = Curriculum("rotational", every=2)
    wanted = (0.5 * losses[1] + 3 * losses[3] + 7 * losses[4]) / 10.5
    torch.testing.assert_close(loss(model, ids_BS, 1, rotating), wanted)


def test_training_drops_layers_and_reaches_every_parameter() -> None:
    model, ids_BS = made(layer_dropout=0.9), words(4, 6)
    plain = loss(model, ids_BS)
    model.train()
    torch.manual_seed(0)
    dropped = loss(model, ids_BS)
    assert not torch.isclose(dropped, plain)
    none_yet = Curriculum(rising_dropout=True, num_steps=9)
    torch.testing.assert_close(loss(model, ids_BS, 0, none_yet), plain)
    plain.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    model = made().float()
    layerskip.save(model, tmp_path)
    state = model.state_dict()
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(24, 16)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as failure:
        layerskip.load(tmp_path)
    assert len(failure.value.complaints) == 3
    tied = made(tie_word_embeddings=True).config.to_hugging_face()
    (tmp_path / "config.json").write_text(json.dumps(tied))
    torch.save(made().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="with which it is tied"):
        layerskip.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "opt"}, "config of a 'opt' model, not of 'llama'"),
        ({"attention_bias": True}, "attention_bias is True, not False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"num_attention_heads": None}, "without num_attention_heads"),
        ({"num_attention_heads": 3, "head_dim": None}, "3 do not share hidden_size=16 evenly"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"vocab_size": "many"}, "vocab_size must be >= 1, got 'many'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "positions of kind 'yarn'; there are"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "kind 'llama3' without factor, low_"),
    ],
    ids=str,
)
def test_configs_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    given = {"model_type": "llama"} | TINY | fields
    with pytest.raises(BrtError, match=message):
        LayerSkipConfig.from_hugging_face(given)


def test_configs_of_older_releases() -> None:
    given = {k: v for k, v in TINY.items() if k not in ("head_dim", "num_key_value_heads")}
    older = {k: v for k, v in LLAMA3.items() if k != "rope_theta"} | {"type": "llama3"}
    found = LayerSkipConfig.from_hugging_face(
        {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": older} | given
    )
    assert (found.head_dim, found.num_key_value_heads) == (4, 4)
    assert (found.rope_theta, found.rope_llama3) == (500.0, (8.0, 1.0, 4.0, 16))


def test_bad_settings_and_tokens() -> None:
    for fields, message in (
        ({"threshold": 0.0}, "threshold must be over 0"),
        ({"min_layers": 6}, "min_layers one of 5"),
        ({"layer_dropout": 1.0}, r"layer_dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(BrtError, match=message):
            LayerSkipConfig(**(TINY | fields))
    model = made()
    for ids_BS in (words(2, 0), words(2), torch.zeros(2, 3)):
        with pytest.raises(BrtError, match=r"tokens must be integers \[B, S\]"):
            model(ids_BS)
    with pytest.raises(BrtError, match="65 tokens, but max_position_embeddings=64"):
        model.generate(words(1, 5), 60)


@torch.inference_mode()
def test_workload_variants_agree() -> None:
    workload = decoding(
        torch.device("cpu"), torch.float64, dim=16, num_layers=4, batch=2, prompt=3, new_tokens=6
    )
    assert workload.reference is not None
    for variant in workload.variants:
        run = variant.make()
        for arguments in workload.sets:
            assert torch.equal(run(*arguments), workload.reference(*arguments)), variant.name


def test_offered() -> None:
    with plugins.using(_plugin):
        assert "layerskip" in plugins.collect("workloads")
        spec = plugins.get("models", "layerskip")
    assert spec.factory()(*spec.sample()).shape == (16, 256)
    assert spec.load is layerskip.load
