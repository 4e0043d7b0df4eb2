"""Dynamic routing against a Python `if` at every gate, its names, and bad input."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin, dynamic_routing
from brt_models.dynamic_routing import (
    Cell,
    DynamicRouting,
    DynamicRoutingConfig,
    budget_loss,
    scatter_gates,
)
from brt_models.workloads.dynamic_routing import PythonGates, gate_workload

TINY = DynamicRoutingConfig(num_layers=3, num_scales=3, channels=4, num_classes=3, small_gate=False)
CONFIGS = {
    "plain": TINY,
    "small gates": replace(TINY, small_gate=True),
    "one scale": replace(TINY, num_scales=1),
    "two scales, one layer": replace(TINY, num_layers=1, num_scales=2),
    "four scales": replace(TINY, num_layers=5, num_scales=4, small_gate=True),
}


def images(num: int, size: int = 64, seed: int = 0) -> Tensor:
    """Images whose contrast differs, so that gates do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, size, 2 * size, generator=generator)
    return x * torch.linspace(0.2, 3, max(num, 1))[:num, None, None, None]


def tiny(config: DynamicRoutingConfig = TINY, seed: int = 0) -> DynamicRouting:
    """A model with gates of every kind."""
    torch.manual_seed(seed)
    model = DynamicRouting(config).eval()
    scatter_gates(model, seed)
    for cell in model.modules():
        if isinstance(cell, Cell):
            nn.init.normal_(cell.gate_conv_beta[2].weight, 0, 0.5)
    return model


# Convolutions of one image and of four round differently, through 16 layers
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def open_gates(model: DynamicRouting, bias: float) -> DynamicRouting:
    """Every gate the same for all images."""
    for cell in model.modules():
        if isinstance(cell, Cell):
            nn.init.zeros_(cell.gate_conv_beta[2].weight)
            nn.init.constant_(cell.gate_conv_beta[2].bias, bias)
    return model


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("num_images", [0, 1, 4])
@torch.inference_mode()
def test_equals_a_python_if_at_every_gate(num_images: int, case: str) -> None:
    for seed in range(2):
        model = tiny(CONFIGS[case], seed)
        x = images(4, 128 if CONFIGS[case].divisor > 64 else 64)[:num_images]
        if not num_images:
            assert model(x).shape == (0, 3, *x.shape[2:])
            continue
        torch.testing.assert_close(model(x), PythonGates(model)(x), **CLOSE)


@torch.inference_mode()
def test_images_go_different_ways() -> None:
    model = tiny(seed=1)
    profile = brt.profile(model, images(4).split(1))
    load_RP = [router.rows_FP.sum(0).tolist() for router in profile.routers.values()]
    assert any(0 < load < 4 for load_P in load_RP for load in load_P)


@pytest.mark.parametrize("bias", [-1.0, 1.0], ids=["shut", "open"])
@torch.inference_mode()
def test_all_gates_alike(bias: float) -> None:
    model, x = open_gates(tiny(), bias), images(2)
    torch.testing.assert_close(model(x), PythonGates(model)(x), **CLOSE)
    if bias > 0:
        # Every cell is reached: nothing is computed on zeros in training either
        features, share = model.backbone.dense(x)
        torch.testing.assert_close(model.sem_seg_head(features), model(x))
        assert 0.5 < float(share) < 1
    else:
        ran: list[str] = []
        for name, cell in model.named_modules():
            if isinstance(cell, Cell):
                cell.cell_ops.register_forward_hook(lambda *_, name=name: ran.append(name))
        model(x)
        assert not ran


def test_training_keeps_to_the_budget() -> None:
    model = tiny().train()
    out, share = model(images(2))
    assert out.shape == (2, 3, 64, 128)
    config = replace(TINY, budget_weight=2.0, budget_share=0.25)
    loss = budget_loss(share, config)
    torch.testing.assert_close(loss, 2.0 * (share - 0.25) ** 2)
    (out.square().mean() + loss).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shares_of_open_and_shut_gates() -> None:
    model, x = tiny().train(), images(2)
    assert float(open_gates(model, 20.0)(x)[1].detach()) == pytest.approx(1.0)
    assert float(open_gates(model, -1.0)(x)[1].detach()) == 0.0


def test_gradients_in_eval_mode() -> None:
    model, x = tiny(seed=1), images(3)
    model(x).square().mean().backward()
    came = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    PythonGates(model)(x).square().mean().backward()
    for name, p in model.named_parameters():
        got, wanted = came[name], p.grad
        assert got is not None, name
        # What no image reaches gets zeros, and none from Python
        torch.testing.assert_close(got, torch.zeros_like(p) if wanted is None else wanted)


@pytest.mark.parametrize("case", ["plain", "small gates", "open", "shut"])
def test_optimised_gives_the_same(case: str) -> None:
    model = tiny(CONFIGS.get(case, TINY), seed=1)
    if case in ("open", "shut"):
        open_gates(model, 1.0 if case == "open" else -1.0)
    x = images(4)
    fast = brt.optimize(model, brt.profile(model, x[:2].split(1)), sample=x[:1], measure=False)
    with torch.inference_mode():
        for other in (x[:1], x[3:], x, images(2, seed=5)):
            torch.testing.assert_close(fast(other), model(other), rtol=1e-4, atol=1e-4)


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        model = DynamicRouting(DynamicRoutingConfig.cityscapes("Raw"))
    state = model.backbone.state_dict()
    assert len(state) == 1906
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in state.items())
    # Of the names and shapes that the authors' class gives for 16 layers
    digest = "d927400bc8757967"
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    whole = model.state_dict()
    assert "backbone.all_cell_list.1.2.cell_ops._ops.0.op.3.norm.weight" in whole
    assert "sem_seg_head.layer_decoder_list.3.norm.bias" in whole
    assert {name for name in whole if "predictor" in name} == {
        "sem_seg_head.predictor.weight",
        "sem_seg_head.predictor.bias",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_scales": 5}, "3 layers reach 4 scales, not 5"),
        ({"channels": 3}, "channels must be even, got 3"),
        ({"budget_share": 2.0}, "budget_share from 0 to 1"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY, **fields)


def test_what_is_no_image_or_network() -> None:
    with pytest.raises(BrtError, match="no network 'D': A, B, C, Raw"):
        DynamicRoutingConfig.cityscapes("D")
    with pytest.raises(BrtError, match=r"multiples of 16, got \[64, 40\]; pad the images"):
        tiny()(torch.zeros(1, 3, 64, 40))
    with pytest.raises(BrtError, match=r"floats \[N, 3, H, W\]"):
        tiny()(torch.zeros(1, 1, 64, 64))


def test_plugin() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "dynamic-routing")
        assert "dynamic-routing" in plugins.collect("workloads")
    model, (x,) = spec.factory(), spec.sample()
    assert not model.training
    assert not torch.equal(x, spec.sample(seed=1)[0])
    with torch.inference_mode():
        assert model(x).shape == (1, 5, 128, 256)
    assert sum(p.numel() for p in dynamic_routing.small().parameters()) < 100_000


@torch.inference_mode()
def test_variants_agree() -> None:
    workload = gate_workload(tiny(seed=1), (32, 64), {})
    assert workload.reference is not None
    wanted = [workload.reference(*arguments) for arguments in workload.sets]
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue
        assert variant.flops
        run = variant.make()
        for arguments, right in zip(workload.sets, wanted, strict=True):
            error = (run(*arguments) - right).abs().max() / right.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


def test_workload_of_a_size_that_does_not_divide() -> None:
    with pytest.raises(BrtError, match="multiples of 16, got 40 and 64"):
        gate_workload(tiny(), (40, 64), {})
