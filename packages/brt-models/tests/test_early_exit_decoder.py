"""Early-exit decoder: against a loop over sequences, generation, training.

Legend: B sequences, S tokens of one.
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
from brt_models import early_exit_decoder as early
from brt_models.early_exit_decoder import EarlyExitConfig, EarlyExitDecoder
from brt_models.workloads.dynamic_depth import early_exit_decoder

SMALL: dict[str, Any] = {
    "num_words": 32, "dim": 16, "hidden": 24, "num_heads": 2, "num_layers": 5, "every": 2,
    "threshold": 0.06,
}  # fmt: skip


def made(**changes: Any) -> EarlyExitDecoder:
    return EarlyExitDecoder(EarlyExitConfig(**(SMALL | changes))).eval()


def words(*shape: int) -> Tensor:
    return torch.randint(0, 32, shape)


def by_loop(model: EarlyExitDecoder, ids_S: Tensor) -> tuple[Tensor, int]:
    """(logits of the next word of one sequence, the layers that it ran)."""
    x_1SD = model.embed(ids_S[None])
    position_1S = torch.arange(len(ids_S))[None]
    num_run = 0
    for stage in model.stages:
        for layer in stage.layers:
            x_1SD = layer(x_1SD, position_1S)
            num_run += 1
        logits_V = model.head.linear(model.head.norm(x_1SD[0, -1]))
        if float(logits_V.softmax(0).max()) >= model.threshold:
            break
    return logits_V, num_run


@pytest.mark.parametrize("threshold", [0.0, 0.06, 2.0])
@pytest.mark.parametrize("shape", [(9, 7), (1, 1), (4, 2)])
@torch.no_grad()
def test_equals_a_loop(threshold: float, shape: tuple[int, int]) -> None:
    model, ids_BS = made(threshold=threshold), words(*shape)
    wanted = [by_loop(model, ids_S) for ids_S in ids_BS]
    logits_BV = torch.stack([logits_V for logits_V, _ in wanted])
    torch.testing.assert_close(model(ids_BS), logits_BV, rtol=1e-5, atol=1e-5)
    assert model.depth(ids_BS).tolist() == [num_run for _, num_run in wanted]


@torch.no_grad()
def test_sequences_leave_at_different_layers() -> None:
    assert len(set(made().depth(words(60, 7)).tolist())) > 1
    assert made()(words(0, 3)).shape == (0, 32)


@torch.no_grad()
def test_generates_word_by_word() -> None:
    model, ids_BS = made(), words(3, 4)
    found = model.generate(ids_BS, max_new_tokens=5)
    for row, ids_S in zip(found, ids_BS, strict=True):
        for _ in range(5):
            ids_S = torch.cat([ids_S, by_loop(model, ids_S)[0].argmax()[None]])
        assert torch.equal(row, ids_S)


def test_gradients_reach_every_parameter() -> None:
    model = made().train()
    model.loss(words(4, 6)).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model.eval()(words(4, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_the_loss_of_layer_skip() -> None:
    model, ids_BS = made(num_layers=3, every=1, exit_scale=0.5), words(3, 6)
    assert [model.config.weight_of(i) for i in range(3)] == [0.0, 0.5, 2.5]
    x_BSD, parts = model.embed(ids_BS), []
    for stage in model.stages:
        x_BSD = stage(x_BSD)
        log_BSV = model.head.linear(model.head.norm(x_BSD)).log_softmax(-1)[:, :-1]
        parts.append(-log_BSV.gather(2, ids_BS[:, 1:, None]).mean())
    wanted = (0.5 * parts[1] + 2.5 * parts[2]) / 3
    torch.testing.assert_close(model.loss(ids_BS), wanted)


def test_deeper_layers_are_dropped_more() -> None:
    config = EarlyExitConfig(**(SMALL | {"layer_dropout": 0.2}))
    rates = [config.dropout_of(i) for i in range(5)]
    assert rates[0] == 0.0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)
    one = made(num_layers=1)
    assert one.config.dropout_of(0) == 0.0
    assert one.config.exits == (1,)
    assert float(one.loss(words(2, 3)).detach()) > 0


@torch.no_grad()
def test_profile_and_optimise() -> None:
    model = early.small()
    batches = [early.sample(seed) for seed in range(3)]
    profile = brt.profile(model, batches)
    first = profile.routers["scatters.0#0"]
    assert 0 < int(first.rows_FP[:, 0].sum()) < int(first.cells_F.sum())
    fast = brt.optimize(model, profile, sample=batches[0], measure=False)
    for (ids_BS,) in (batches[1], early.sample(9)):
        torch.testing.assert_close(fast(ids_BS), model(ids_BS), rtol=1e-5, atol=1e-5)
    never = early.small(threshold=2.0)
    fast = brt.optimize(never, brt.profile(never, batches), sample=batches[0], measure=False)
    torch.testing.assert_close(fast(*early.sample(9)), never(*early.sample(9)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"every": 0}, "must be >= 1"),
        ({"dim": 18}, "multiple of twice num_heads=2"),
        ({"layer_dropout": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BrtError, match=says):
        EarlyExitConfig(**(SMALL | changes))


@torch.inference_mode()
def test_workload_variants_agree() -> None:
    workload = early_exit_decoder(
        torch.device("cpu"), torch.float32, dim=16, num_layers=4, batch=6, tokens=5
    )
    assert workload.reference is not None
    for variant in workload.variants:
        run = variant.make()
        for arguments in workload.sets:
            wanted = workload.reference(*arguments)
            error = (run(*arguments) - wanted).abs().max() / wanted.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


def test_offered() -> None:
    with plugins.using(_plugin):
        assert not plugins.get("models", "early-exit-decoder").factory().training
        assert "early-exit-decoder" in plugins.collect("workloads")
