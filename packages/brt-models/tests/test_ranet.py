"""RANet against a Python `if` for each image, its names, and bad input."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin, ranet
from brt_models.ranet import RANet, RANetConfig, exits_of, thresholds_for, thresholds_for_shares
from brt_models.ranet.layers import FusionBlock
from brt_models.workloads.msdnet import exit_workload
from brt_models.workloads.ranet import early_exit

TINY = RANetConfig(channels=4, head_channels=4, num_classes=3)
CONFIGS = {
    "three resolutions": TINY,
    "two exits each": replace(TINY, num_blocks=2, block_step=2, scales=(1, 2, 2)),
    "growing blocks": replace(TINY, step_mode="grow", step=1),
    "imagenet": replace(TINY, stem="imagenet"),
    "one": replace(TINY, scales=(1,), factors=(1,), bottlenecks=(1,)),
}
SHARES = {"everywhere": (2, 1, 1), "first": (1, 0, 0), "last": (0, 0, 1), "not second": (1, 0, 1)}


def images(num: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tiny(share_K: tuple[float, ...] | None = None, x: Tensor | None = None) -> RANet:
    """A model that lets these shares of the images leave at each exit."""
    torch.manual_seed(0)
    model = RANet(TINY).eval()
    if share_K is not None:
        model.set_thresholds(thresholds_for_shares(share_K, exits_of(model, [x])))
    return model


def every_exit(model: RANet, x: Tensor) -> list[Tensor]:
    """The logits of all exits, sub-network after sub-network."""
    logits: list[Tensor] = []
    low: list[list[Tensor]] = []
    for start, flow in zip(model.FirstLayer(x), model.scale_flows, strict=True):
        made = []
        for i, block in enumerate(flow):
            fuses = isinstance(block, FusionBlock)
            start, out = block(start, low[i]) if fuses else block(start)
            made.append(out)
            if not fuses:
                logits.append(model.classifier[len(logits)](start))
        low = made
    return logits


def plain(model: RANet, x_NCHW: Tensor) -> Tensor:
    """One image after another."""
    answers = [x_NCHW.new_empty(0, 3)]
    for x in x_NCHW.split(1) if len(x_NCHW) else ():
        for logits, threshold in zip(every_exit(model, x), (*model.thresholds, 0.0), strict=True):
            if float(logits.detach().softmax(1).max()) >= threshold:
                answers.append(logits)
                break
    return torch.cat(answers)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("num_images", [0, 1, 8])
@torch.inference_mode()
def test_equals_a_python_if_for_each_image(num_images: int, shares: str) -> None:
    model = tiny(SHARES[shares], images(8))
    x = images(8)[:num_images]
    torch.testing.assert_close(model(x), plain(model, x))


@pytest.mark.parametrize("case", CONFIGS)
@torch.inference_mode()
def test_configs_give_every_exit(case: str) -> None:
    config = CONFIGS[case]
    model, x = RANet(config).eval(), images(2, 64 if config.stem == "imagenet" else 32)
    wanted = every_exit(model, x)
    assert len(wanted) == config.num_exits
    for came, right in zip(model.all_exits(x), wanted, strict=True):
        torch.testing.assert_close(came, right)
    model.set_thresholds(2.0)
    torch.testing.assert_close(model(x), wanted[-1])


@torch.inference_mode()
def test_higher_resolutions_do_not_run_for_easy_images() -> None:
    model = tiny((1, 1, 0), images(4))
    ran: list[tuple[int, int]] = []
    for sub, flow in enumerate(model.scale_flows):
        flow[0].register_forward_hook(lambda m, args, out, sub=sub: ran.append((sub, len(out[0]))))
    model(images(4))
    assert ran == [(0, 4), (1, 2)]


def test_training_gives_every_exit_and_gradients() -> None:
    model = tiny().train()
    outs = model(images(4))
    assert [out.shape for out in outs] == [(4, 3)] * 3
    sum(nn.functional.cross_entropy(out, torch.arange(4) % 3) for out in outs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("shares", ["everywhere", "first"])
def test_optimised_gives_the_same(shares: str) -> None:
    x = images(8)
    model = tiny(SHARES[shares], x)
    fast = brt.optimize(model, brt.profile(model, x.split(4)), sample=x, measure=False)
    with torch.inference_mode():
        for other in (x, x[:1], images(4, seed=1)):
            torch.testing.assert_close(fast(other), model(other))


def test_gradients_in_eval_mode() -> None:
    model = tiny((1, 1, 0), images(4))
    x, wanted = images(4).requires_grad_(), images(4).requires_grad_()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    plain(model, wanted).sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)


def test_thresholds_keep_to_a_budget() -> None:
    model, x = tiny(), images(20)
    macs_K = model.macs_K(x)
    assert list(macs_K) == sorted(macs_K)
    model.set_thresholds(thresholds_for(macs_K[1], exits_of(model, x.split(10)), macs_K))
    with torch.inference_mode():
        _, where = model.with_exits(x)
    load_K = [cells.num_rows for cells in where]
    assert sum(load_K) == 20
    spent = sum(load * macs for load, macs in zip(load_K, macs_K, strict=False))
    assert 0.8 * macs_K[1] < spent / 20 <= macs_K[1]


def test_names_and_shapes_are_those_of_the_authors_networks() -> None:
    with torch.device("meta"):
        state = RANet(RANetConfig.cifar()).state_dict()
        large = RANet(RANetConfig.imagenet()).state_dict()
    assert len(state) == 1774
    assert sum(t.numel() for t in state.values()) == 3272191
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in state.items())
    # Of the names and shapes that the authors' class gives for their CIFAR script
    digest = "eee9a0c8bf68da5a"
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    # Their ImageNet script: 3317 names, 88.0 million
    assert len(large) == 3317
    assert sum(t.numel() for t in large.values()) == 88025021


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factors": (1, 2)}, "one number a sub-network; got 3, 2 and 3"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"scales": (1, 1, 2)}, "start with one 1 and rise by at most 1"),
        ({"scales": (1, 3, 3)}, "start with one 1 and rise by at most 1"),
        ({"reduction": 0.0}, "reduction must be over 0"),
        ({"compress": 1.0}, "compress between 0 and 1"),
        ({"compress": 0.1}, "leaves no feature of growth=4"),
        ({"step_mode": "odd"}, "step_mode is even or grow"),
        ({"stem": "large"}, "stem small or imagenet"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY, **fields)


def test_plugin() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "ranet")
        assert "ranet" in plugins.collect("workloads")
    model, (x,) = spec.factory(), spec.sample()
    assert not model.training
    with torch.inference_mode():
        assert model(x).shape == (8, 10)
    assert sum(p.numel() for p in ranet.small().parameters()) < 100_000


@pytest.mark.parametrize("batch", [1, 5])
@torch.inference_mode()
def test_variants_agree(batch: int) -> None:
    workload = exit_workload("ranet", tiny(), 32, "40/20/40", batch, {})
    assert "8/4/8 leave at each exit" in workload.shapes
    assert workload.reference is not None
    wanted = [workload.reference(*arguments) for arguments in workload.sets]
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue
        run = variant.make()
        for arguments, right in zip(workload.sets, wanted, strict=True):
            error = (run(*arguments) - right).abs().max() / right.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


def test_workload_of_no_preset() -> None:
    with pytest.raises(BrtError, match="no preset 'mnist': imagenet, cifar"):
        early_exit(torch.device("cpu"), torch.float32, preset="mnist")
