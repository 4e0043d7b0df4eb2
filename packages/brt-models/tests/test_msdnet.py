"""MSDNet against a Python `if` for each image, its thresholds, its names, and bad input.

Shape letters: K exits, N images, C classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin, msdnet
from brt_models.msdnet import MSDNet, MSDNetConfig, exits_of, thresholds_for, thresholds_for_shares
from brt_models.msdnet.thresholds import NEVER, mean_cost, taken_exits
from brt_models.workloads.msdnet import MIXES, PythonExit, exit_workload, parse_mix, sharpened

TINY = MSDNetConfig(steps=(1, 1, 1), channels=4, growth=2, head_channels=4, num_classes=3)
CONFIGS = {
    "max": TINY,
    "min": replace(TINY, prune="min"),
    "no reduction": replace(TINY, reduction=0.0),
    "one scale": replace(TINY, factors=(1,), bottlenecks=(1,)),
    "one exit": replace(TINY, steps=(3,)),
    "imagenet": replace(TINY, stem="imagenet", factors=(1, 2), bottlenecks=(1, 2)),
}
# Shares of the images that leave at each of three exits
SHARES = {
    "everywhere": (2, 1, 1),
    "first": (1, 0, 0),
    "last": (0, 0, 1),
    "second": (0, 1, 0),
    "not second": (1, 0, 1),
}


def images(num: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tiny(share_K: tuple[float, ...] | None = None, x: Tensor | None = None) -> MSDNet:
    """A model that lets these shares of the images leave at each exit."""
    torch.manual_seed(0)
    model = MSDNet(TINY).eval()
    if share_K is not None:
        model.set_thresholds(thresholds_for_shares(share_K, exits_of(model, [x])))
    return model


def plain(model: MSDNet, x_NCHW: Tensor) -> tuple[Tensor, list[int]]:
    """(logits, exit of each image), one image after another."""
    answers, exits = [], []
    for scales in x_NCHW.split(1) if len(x_NCHW) else ():
        for k, (block, head) in enumerate(zip(model.blocks, model.classifier, strict=True)):
            scales = block(scales)
            logits = head(scales[-1])
            last = k == len(model.blocks) - 1
            if last or float(logits.detach().softmax(1).max()) >= model.thresholds[k]:
                answers.append(logits)
                exits.append(k)
                break
    return torch.cat(answers) if answers else x_NCHW.new_empty(0, 3), exits


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("num_images", [0, 1, 8])
@torch.inference_mode()
def test_equals_a_python_if_for_each_image(num_images: int, shares: str) -> None:
    model = tiny(SHARES[shares], images(8))
    x = images(8)[:num_images]
    out, where = model.with_exits(x)
    wanted, exits = plain(model, x)
    torch.testing.assert_close(out, wanted)
    for k, left in enumerate(where):
        assert left.index_R(x.device).tolist() == [n for n, e in enumerate(exits) if e == k]


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_give_the_same_with_and_without_exits(case: str) -> None:
    config = CONFIGS[case]
    x = images(3, 64 if config.stem == "imagenet" else 32)
    with torch.inference_mode():
        model = MSDNet(config, thresholds=NEVER).eval()
        torch.testing.assert_close(model(x), model.all_exits(x)[-1])
        model.set_thresholds(0.0)
        torch.testing.assert_close(model(x), model.all_exits(x)[0])


@torch.inference_mode()
def test_blocks_that_no_image_reaches_do_not_run() -> None:
    model = tiny((1, 1, 0), images(4))
    ran: list[tuple[int, int]] = []
    for k, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, k=k: ran.append((k, len(out[-1]))))
    model(images(4))
    assert ran == [(0, 4), (1, 2)]


def test_training_gives_every_exit_and_gradients() -> None:
    model = tiny().train()
    outs = model(images(4))
    assert [out.shape for out in outs] == [(4, 3)] * 3
    sum(nn.functional.cross_entropy(out, torch.arange(4) % 3) for out in outs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_blocks_that_no_image_reaches_get_zero_gradients() -> None:
    model = tiny((1, 0, 0), images(4))
    x = images(4).requires_grad_()
    model(x).sum().backward()
    for k, block in enumerate(model.blocks):
        grads = [p.grad for p in block.parameters()]
        assert all(g is not None for g in grads)
        assert any(bool(g.any()) for g in grads) == (k == 0)
    wanted = images(4).requires_grad_()
    plain(model, wanted)[0].sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)


@pytest.mark.parametrize("shares", ["everywhere", "first", "last"])
def test_optimised_gives_the_same(shares: str) -> None:
    x = images(8)
    model = tiny(SHARES[shares], x)
    profile = brt.profile(model, x.split(4))
    fast = brt.optimize(model, profile, sample=x, measure=False)
    with torch.inference_mode():
        # Images of the profile, and others, which leave elsewhere
        for other in (x, x[:1], images(8, seed=1), 3 * images(8, seed=2), x[:0]):
            torch.testing.assert_close(fast(other), plain(model, other)[0])
    if shares == "first":
        assert any(record.name == "drop-dead-paths" and record.changed for record in passes(fast))


def passes(fast: brt.Optimized) -> list[brt.passes.Record]:
    return [record for region in fast.report.regions for record in region.records]


def test_shares_are_met() -> None:
    logits_KNC = torch.randn(3, 40, 5)
    for share_K in ((0.5, 0.3, 0.2), (0.1, 0.0, 0.9), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)):
        exit_N = taken_exits(thresholds_for_shares(share_K, logits_KNC), logits_KNC)
        assert exit_N.bincount(minlength=3).tolist() == [round(40 * s) for s in share_K]


def test_images_of_equal_confidence_leave_together() -> None:
    logits_KNC = torch.randn(3, 1, 5).expand(3, 10, 5)
    exit_N = taken_exits(thresholds_for_shares((0.3, 0.3, 0.4), logits_KNC), logits_KNC)
    assert exit_N.tolist() == [0] * 10


def test_thresholds_keep_to_the_budget() -> None:
    logits_KNC, cost_K = torch.randn(3, 200, 5), (1.0, 3.0, 4.0)
    spent = []
    for budget in (1.0, 1.3, 2.0, 2.5, 3.0, 3.5, 4.0, 9.0):
        thresholds = thresholds_for(budget, logits_KNC, cost_K)
        spent.append(mean_cost(thresholds, logits_KNC, cost_K))
        assert budget - 0.05 < spent[-1] <= budget or budget == 9.0
    assert spent == sorted(spent)
    assert spent[0] == 1.0
    assert spent[-1] == 4.0


def test_shares_follow_powers_of_a_ratio() -> None:
    """Half the images at each exit of those at the one before, where that is what is paid for."""
    logits_KNC, cost_K = torch.randn(3, 700, 5), (1.0, 2.0, 3.0)
    thresholds = thresholds_for((400 + 2 * 200 + 3 * 100) / 700, logits_KNC, cost_K)
    load_K = taken_exits(thresholds, logits_KNC).bincount(minlength=3)
    assert load_K.tolist() == [400, 200, 100]


@pytest.mark.parametrize(
    ("budget", "shape", "cost_K", "message"),
    [
        (0.5, (2, 3, 4), (1.0, 2.0), "budget of 0.5 is less than the first exit costs, 1"),
        (2.0, (2, 3, 4), (1.0, 1.0), "2 rising costs are needed"),
        (2.0, (3, 3, 4), (1.0, 2.0), "3 rising costs are needed"),
        (2.0, (2, 0, 4), (1.0, 2.0), r"at least one image .*got \[2, 0, 4\]"),
        (2.0, (2, 3), (1.0, 2.0), r"got \[2, 3\]"),
    ],
    ids=["too little", "equal costs", "two costs", "no images", "no exits"],
)
def test_budgets_that_make_no_thresholds(
    budget: float, shape: tuple[int, ...], cost_K: tuple[float, ...], message: str
) -> None:
    with pytest.raises(BrtError, match=message):
        thresholds_for(budget, torch.zeros(shape), cost_K)


def test_shares_that_make_no_thresholds() -> None:
    for share_K in ((1, 0), (1, -1, 1), (0, 0, 0)):
        with pytest.raises(BrtError, match="shares must be 3 numbers"):
            thresholds_for_shares(share_K, torch.zeros(3, 4, 5))


def test_multiply_adds_are_those_of_the_convolutions() -> None:
    model = MSDNet(replace(TINY, factors=(1,), bottlenecks=(1,), steps=(1, 1))).eval()
    pixels, stem = 32 * 32, 27 * 4
    layers = [(4 * 2 + 9 * 2 * 2), (6 * 2 + 9 * 2 * 2)]
    heads = [9 * 6 * 4 * 256 + 9 * 16 * 64 + 12, 9 * 8 * 4 * 256 + 9 * 16 * 64 + 12]
    first = pixels * (stem + layers[0]) + heads[0]
    assert model.macs_K(images(2)) == (first, first + pixels * layers[1] + heads[1])


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        state = MSDNet(MSDNetConfig.imagenet()).state_dict()
    assert len(state) == 1127
    assert sum(t.numel() for t in state.values()) == 23993346
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in state.items())
    # Of the names and shapes that the authors' class gives for blocks=5 step=4 base=4
    digest = "7aabdffa05cec853"
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    assert "blocks.1.2.m.0.net.0.weight" in state
    assert "blocks.0.1.layers.1.conv_down.net.3.weight" in state
    assert "classifier.4.m.1.net.1.running_mean" in state


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": ()}, "layers for each block"),
        ({"steps": (1, 0)}, "layers for each block"),
        ({"factors": (1, 2)}, "one number a scale; got 2 and 3"),
        ({"growth": 0}, "growth must be at least 1, got 0"),
        ({"head_channels": 0}, "head_channels must be at least 1"),
        ({"growth": 1, "factors": (1, 1, 1)}, "must be even"),
        ({"reduction": 1.0}, "from 0 to below 1"),
        ({"prune": "mean"}, "no prune 'mean': max, min"),
        ({"stem": "large"}, "no stem 'large': small, imagenet"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY, **fields)


def test_what_is_no_image_or_threshold() -> None:
    model = tiny()
    with pytest.raises(BrtError, match="2 exits before the last"):
        model.set_thresholds((0.5,))
    for x in (images(1)[0], images(1)[:, :1], images(1).long()):
        with pytest.raises(BrtError, match=r"images must be floats \[N, 3, H, W\]"):
            model(x)


def test_plugin() -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", "msdnet")
        assert "msdnet" in plugins.collect("workloads")
    model, (x,) = spec.factory(), spec.sample()
    assert not model.training
    assert not torch.equal(x, spec.sample(seed=1)[0])
    with torch.inference_mode():
        assert model(x).shape == (8, 10)


@pytest.mark.parametrize("batch", [1, 6])
@torch.inference_mode()
def test_variants_agree(batch: int) -> None:
    workload = exit_workload("msdnet", tiny(), 32, "50/25/25", batch, {})
    assert f"{'10/5/5' if batch == 1 else '12/6/6'} leave at each exit" in workload.shapes
    assert workload.reference is not None
    wanted = [workload.reference(*arguments) for arguments in workload.sets]
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue
        run = variant.make()
        for arguments, right in zip(workload.sets, wanted, strict=True):
            error = (run(*arguments) - right).abs().max() / right.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"


@torch.inference_mode()
def test_random_weights_are_sharpened() -> None:
    model = sharpened(tiny(), 32)
    assert not model.training
    for logits_NC in model.all_exits(images(8)):
        assert 1 < float(logits_NC.std()) < 4


def test_mixes() -> None:
    assert all(sum(parse_mix("msdnet", mix, 5)) == 100 for mix in MIXES)
    for mix in ("1/2", "a/b/c", "0/0/0", "1/-1/1"):
        with pytest.raises(BrtError, match="mix must be 3 shares like 20/20/20"):
            parse_mix("msdnet", mix, 3)


@torch.inference_mode()
def test_hand_written_exits_are_right() -> None:
    model = tiny((2, 1, 1), images(8))
    for x in (images(8), images(1), images(2, seed=3)):
        torch.testing.assert_close(PythonExit(model)(x), plain(model, x)[0])


def test_small_is_for_small_images() -> None:
    assert sum(p.numel() for p in msdnet.small().parameters()) < 200_000
