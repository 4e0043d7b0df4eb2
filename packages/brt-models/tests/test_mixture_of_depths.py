"""Mixture-of-Depths: against a loop over sequences, causality, training.

Legend: B sequences, S tokens of one, D features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin
from brt_models import mixture_of_depths as mod
from brt_models.decoder_layer import DecoderLayer, rotated
from brt_models.mixture_of_depths import MixtureOfDepths, MixtureOfDepthsConfig, RoutedLayer
from brt_models.workloads.dynamic_depth import TokenLoop, mixture_of_depths

SMALL: dict[str, Any] = {
    "num_words": 32, "dim": 16, "hidden": 24, "num_heads": 2, "capacity": 0.3,
}  # fmt: skip
SHAPES = [(2, 11), (1, 1), (3, 4), (0, 5)]


def made(**changes: Any) -> MixtureOfDepths:
    return MixtureOfDepths(MixtureOfDepthsConfig(**(SMALL | changes))).eval()


def words(batch: int, length: int) -> Tensor:
    """No word twice in a sequence: equal scores may go either way."""
    return torch.rand(batch, 32).argsort(1)[:, :length]


def attends(layer: DecoderLayer, x_SD: Tensor, positions: list[int]) -> Tensor:
    """What a layer adds to tokens, one query at a time."""
    normed_SD = layer.attention_norm(x_SD)
    q, k, v = (
        part.view(len(x_SD), layer.num_heads, -1).transpose(0, 1)
        for part in layer.qkv(normed_SD).chunk(3, -1)
    )
    at = torch.tensor(positions)[None]
    q, k = rotated(q[None], at)[0], rotated(k[None], at)[0]
    read = []
    for s, position in enumerate(positions):
        seen = [t for t, other in enumerate(positions) if other <= position]
        heads = [
            ((k[h, seen] @ q[h, s]) / q.shape[-1] ** 0.5).softmax(0) @ v[h, seen]
            for h in range(layer.num_heads)
        ]
        read.append(torch.cat(heads))
    read_SD = layer.out(torch.stack(read))
    gate_SH, up_SH = layer.up(layer.mlp_norm(x_SD + read_SD)).chunk(2, -1)
    return read_SD + layer.down(torch.nn.functional.silu(gate_SH) * up_SH)


def by_loop(model: MixtureOfDepths, ids_BS: Tensor, training: bool) -> Tensor:
    """The same, sequence by sequence."""
    out = []
    for ids_S in ids_BS:
        x_SD = model.embed(ids_S)
        for layer in model.layers:
            if isinstance(layer, DecoderLayer):
                x_SD = x_SD + attends(layer, x_SD, list(range(len(ids_S))))
                continue
            assert isinstance(layer, RoutedLayer)
            score_S = layer.gate(x_SD)[:, 0]
            if training:
                num_taken = -(-round(10 * model.config.capacity) * len(ids_S) // 10)
                taken = sorted(score_S.argsort(descending=True)[:num_taken].tolist())
            else:
                taken = (layer.predictor(x_SD)[:, 0] > 0).nonzero()[:, 0].tolist()
            new_SD = x_SD.clone()
            if taken:
                update = attends(layer.layer, x_SD[taken], taken)
                new_SD[taken] = x_SD[taken] + score_S[taken, None] * update
            x_SD = new_SD
        out.append(model.head(model.norm(x_SD)))
    return torch.stack(out) if out else torch.zeros(*ids_BS.shape, 32)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_equals_a_loop(shape: tuple[int, int], every: int, training: bool) -> None:
    model = made(every=every).train(training)
    ids_BS = words(*shape)
    wanted = by_loop(model, ids_BS, training)
    torch.testing.assert_close(model(ids_BS), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_token_and_every_token() -> None:
    model, ids_BS = made(), words(2, 7)
    for bias in (-100.0, 100.0):
        for layer in model.layers:
            if isinstance(layer, RoutedLayer):
                layer.predictor[2].bias.fill_(bias)
        wanted = by_loop(model, ids_BS, training=False)
        torch.testing.assert_close(model(ids_BS), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_evaluation_sees_no_later_token() -> None:
    model, ids_BS = made(), words(2, 12)
    other_BS = torch.cat([ids_BS[:, :8], words(2, 4)], 1)
    before, after = model(ids_BS)[:, :8], model(other_BS)[:, :8]
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_training_takes_the_same_share_of_each_sequence() -> None:
    model = made().train()
    profile = brt.profile(model, [(words(3, 10),)], training=True)
    chosen = profile.routers["layers.1.choose#0"]
    assert int(chosen.rows_FP.sum()) == 3 * 3


def test_gradients() -> None:
    model = made().train()
    ids_BS = words(2, 9)
    next_word, predicted = model.loss(ids_BS)
    predicted.backward(retain_graph=True)
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all("predictor" in name for name in moved)
    next_word.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert bool(model.layers[1].gate.weight.grad.any())


def test_the_predictor_learns_the_choice() -> None:
    model = made(capacity=0.5).train()
    ids_BS = words(8, 16)
    layer = model.layers[1]
    x_BSD = model.embed(ids_BS)
    optimizer = torch.optim.Adam(layer.predictor.parameters(), lr=0.03)
    first = float(layer.predictor_loss(x_BSD).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = layer.predictor_loss(x_BSD)
        loss.backward(inputs=list(layer.predictor.parameters()))
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first


@torch.no_grad()
def test_profile_and_optimise() -> None:
    model = mod.small()
    batches = [mod.sample(seed) for seed in range(2)]
    fast = brt.optimize(model, brt.profile(model, batches), sample=batches[0], measure=False)
    for (ids_BS,) in (batches[1], mod.sample(5), (torch.randint(0, 256, (1, 3)),)):
        torch.testing.assert_close(fast(ids_BS), model(ids_BS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 0}, "must be >= 1"),
        ({"dim": 18}, "multiple of twice num_heads=2"),
        ({"capacity": 0.0}, r"in \(0, 1\]"),
        ({"capacity": 1.5}, r"in \(0, 1\]"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BrtError, match=says):
        MixtureOfDepthsConfig(**(SMALL | changes))


@torch.inference_mode()
def test_workload_variants_agree() -> None:
    workload = mixture_of_depths(
        torch.device("cpu"), torch.float32, dim=16, num_layers=4, batch=2, tokens=24
    )
    assert workload.reference is not None
    for variant in workload.variants:
        run = variant.make()
        for arguments in workload.sets:
            wanted = workload.reference(*arguments)
            error = (run(*arguments) - wanted).abs().max() / wanted.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


@torch.no_grad()
def test_offered() -> None:
    with plugins.using(_plugin):
        model = plugins.get("models", "mixture-of-depths").factory()
        assert "mixture-of-depths" in plugins.collect("workloads")
    (ids_BS,) = mod.sample()
    torch.testing.assert_close(model(ids_BS), TokenLoop(model)(ids_BS), rtol=1e-5, atol=1e-5)
