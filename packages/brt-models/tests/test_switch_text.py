"""The language model of bytes: causal, as good as its record says, and trained alike twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from brt.errors import BrtError
from brt_models import english, switch_text, weight_files
from brt_models.switch_text import SwitchText, bits_per_byte, narrow, sample, small_config
from brt_models.switch_text.files import WEIGHTS
from brt_models.train import switch_text as training

# Bits a byte in the first bytes of the held-out text, which are easier than the rest of it; other
# Pythons word it a little differently
MEASURED, BITS = 8192, 1.55


def paragraphs(part: english.Part) -> set[str]:
    return {" ".join(p.split()) for p in english.text(part).split("\n\n")}


def test_parts_share_no_topic_and_no_paragraph() -> None:
    train, validation, held_out = (
        (set(english.names(part)), paragraphs(part)) for part in ("train", "validation", "held-out")
    )
    for one, other in ((train, validation), (train, held_out), (validation, held_out)):
        assert not one[0] & other[0]
        assert not one[1] & other[1]
    assert {"attribute-access", "formatstrings"} <= held_out[0]
    assert len(english.ids("train")) > 200_000
    with pytest.raises(BrtError, match="there are train, validation, held-out; got 'test'"):
        english.text("test")  # type: ignore[arg-type]


def test_bytes_and_back() -> None:
    assert english.decoded(english.encoded("caf\u00e9 \u2423")) == "caf\u00e9 \u2423"
    assert english.decoded(torch.tensor([0x61, 0xFF])) == "a\ufffd"


def test_no_byte_sees_a_later_one() -> None:
    model = narrow()
    (ids_BS,) = sample()
    changed_BS = ids_BS.clone()
    changed_BS[:, 40:] = (changed_BS[:, 40:] + 1) % 256
    with torch.inference_mode():
        one, other = model(ids_BS), model(changed_BS)
    torch.testing.assert_close(one[:, :40], other[:, :40])
    assert not torch.equal(one[:, 40:], other[:, 40:])


def test_one_expert_is_the_dense_model() -> None:
    model = narrow(num_experts=1)
    (ids_BS,) = sample()
    seen: list[tuple[Tensor, Tensor]] = []
    sparse = model.blocks[1].mlp
    sparse.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    with torch.inference_mode():
        model(ids_BS)
        ((x_BSD, out_BSD),) = seen
        torch.testing.assert_close(out_BSD, sparse.experts[0](x_BSD))
    assert training.macs_per_byte(model) == training.macs_per_byte(narrow(num_experts=4))


def test_bits_per_byte_counts_each_byte_once() -> None:
    model = narrow()
    ids_S = english.ids("validation")[:150]
    with torch.inference_mode():
        bits = 0.0
        for start, first in ((0, 0), (32, 32), (64, 32), (96, 32)):  # windows of 64, half new
            piece_S = ids_S[start : start + 65]
            nats_T = F.cross_entropy(model(piece_S[None, :-1])[0], piece_S[1:], reduction="none")
            bits += float(nats_T[first:].sum()) / math.log(2)
    assert bits_per_byte(model, ids_S, window=64, batch=2) == pytest.approx(bits / 149, rel=1e-5)
    assert bits_per_byte(model.train(), ids_S[:40], window=64) > 4
    assert model.training
    with pytest.raises(BrtError, match="need two bytes"):
        bits_per_byte(model, ids_S[:1])


def test_generate_goes_on_from_the_prompt() -> None:
    model = narrow()
    prompt_1S = english.encoded("The ")[None]
    one, same = (
        model.generate(prompt_1S, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(one, same)
    assert torch.equal(one[:, :4], prompt_1S)
    likeliest_1S = model.generate(prompt_1S, 3, temperature=0, window=4)
    with torch.inference_mode():
        assert likeliest_1S[0, -1] == model(likeliest_1S[:, -5:-1])[0, -1].argmax()
    with pytest.raises(BrtError, match="the prompt needs a byte"):
        model.generate(prompt_1S[:, :0], 3)


def test_save_and_load(tmp_path: Path) -> None:
    model = narrow()
    switch_text.save(model, tmp_path / "m.safetensors", {})
    again = switch_text.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    (ids_BS,) = sample()
    with torch.inference_mode():
        assert torch.equal(again(ids_BS), model(ids_BS))
    with pytest.raises(BrtError, match=r"switch_text.load: cannot read"):
        switch_text.load(tmp_path / "none.safetensors")


def test_losses_of_the_routers_count() -> None:
    ids_BS = sample()[0]
    torch.manual_seed(0)
    model = SwitchText(replace(narrow().config, dropout_rate=0, router_jitter_noise=0)).train()
    found = training.loss(model, ids_BS)
    config = model.config
    assert found.total.item() == pytest.approx(
        found.words.item()
        + config.router_aux_loss_coef * found.load_balance.item()
        + config.router_z_loss_coef * found.router_z.item()
    )
    assert config.router_aux_loss_coef > 0
    assert config.router_z_loss_coef > 0
    logits_BSV = model(ids_BS[:, :-1])
    expected = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())
    torch.testing.assert_close(found.words, expected)


def test_a_recipe_without_steps() -> None:
    with pytest.raises(BrtError, match="steps, batch, length, measure_every must be >= 1"):
        training.Recipe(steps=0)


def test_shipped_weights_predict_as_their_record_says() -> None:
    model = switch_text.pretrained()
    assert model.config == small_config()
    quality = weight_files.record_of(weight_files.shipped(WEIGHTS))["quality"]
    switch, dense = quality["switch, 8 experts"], quality["dense"]
    assert switch["macs_per_byte"] == dense["macs_per_byte"] == training.macs_per_byte(model)
    assert switch["held_out_bits_per_byte"] < dense["held_out_bits_per_byte"] + 0.01
    found = bits_per_byte(model, english.ids("held-out")[:MEASURED])
    assert found == pytest.approx(BITS, abs=0.08)


@pytest.mark.slow
def test_all_of_the_held_out_text() -> None:
    quality = weight_files.record_of(weight_files.shipped(WEIGHTS))["quality"]
    found = bits_per_byte(switch_text.pretrained(), english.ids("held-out"))
    assert found == pytest.approx(quality["switch, 8 experts"]["held_out_bits_per_byte"], abs=0.05)


@pytest.mark.slow
def test_the_script_writes_the_same_weights_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = ["--quick", "--threads", "1", "--out", str(tmp_path / name)]
        result = CliRunner().invoke(training.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "curves.png",
            "figures.json",
            WEIGHTS,
        ]
    one, two = (tmp_path / name / WEIGHTS for name in ("one", "two"))
    weights, again = load_file(one), load_file(two)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    assert weight_files.record_of(one) == weight_files.record_of(two)
    for row in json.loads((tmp_path / "one" / "figures.json").read_text())["quality"].values():
        assert row["held_out_bits_per_byte"] < 6  # of 8 before the first step
