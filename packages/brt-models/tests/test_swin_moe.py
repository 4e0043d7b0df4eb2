"""Swin-MoE: mixtures against a loop over tokens, windows against full attention, checkpoints."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Swinv2Config, Swinv2ForImageClassification

import brt
from brt import plugins
from brt.errors import BrtError
from brt_models import _plugin
from brt_models.swin_moe import (
    Mixture,
    SwinMoE,
    SwinMoEConfig,
    load_ranks,
    merge_ranks,
    sample,
    save_ranks,
    split_experts,
    split_ranks,
)
from brt_models.swin_moe.network import Block, Mlp
from brt_models.workloads.swin_moe import mixture as mixture_workload
from brt_models.workloads.swinv2_moe import network as network_workload

TINY = SwinMoEConfig(
    image_size=16, patch_size=2, num_classes=3, embed_dim=8, depths=(2, 2), num_heads=(2, 2),
    window_size=4, moe_blocks=((1,), (0,)), num_experts=4, cosine_size=6,
)  # fmt: skip
MIXTURES = {
    "top 1": TINY,
    "tight": replace(TINY, capacity_factor=0.5),
    "first come": replace(TINY, capacity_factor=0.5, batch_prioritized=False),
    "top 2": replace(TINY, top_k=2),
    "top 2, normalised": replace(TINY, top_k=2, normalise_gate=True),
    "cosine": replace(TINY, cosine_router=True),
    "no capacity": replace(TINY, capacity_factor=None),
}


def tiny(config: SwinMoEConfig = TINY) -> SwinMoE:
    torch.manual_seed(0)
    model = SwinMoE(config).eval()
    for name, p in model.named_parameters():
        if "batched" in name or "wg" in name or "sim_matrix" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def images(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def scores_of(layer: Mixture, x_NC: Tensor) -> Tensor:
    """The gate, written again."""
    state = {name.removeprefix("_moe_layer.gates.0."): t for name, t in layer.state_dict().items()}
    if "wg.weight" in state:
        return (x_NC @ state["wg.weight"].T).softmax(1)
    down = x_NC @ state["cosine_projector.weight"].T + state["cosine_projector.bias"]
    towards = state["sim_matrix"] / state["sim_matrix"].norm(dim=0)
    angle = down / down.norm(dim=1, keepdim=True) @ towards
    return (angle * state["temperature"].exp()).softmax(1)


def plain(config: SwinMoEConfig, layer: Mixture, x_NC: Tensor) -> Tensor:
    """Token by token; first choices of all before any second one."""
    probs_NP = scores_of(layer, x_NC)
    weight_NK, choice_NK = probs_NP.topk(config.top_k)
    if config.normalise_gate:
        weight_NK = weight_NK / weight_NK.sum(1, keepdim=True)
    room = [len(x_NC)] * config.num_experts
    if config.capacity_factor is not None:
        even = -(-len(x_NC) // config.num_experts)
        room = [config.top_k * max(int(config.capacity_factor * even), 1)] * config.num_experts
    order = torch.arange(len(x_NC))
    if config.batch_prioritized:
        order = probs_NP.amax(1).argsort(descending=True, stable=True)
    experts, out_NC = layer._moe_layer.experts, torch.zeros_like(x_NC)
    for k in range(config.top_k):
        for n in order.tolist():
            p = int(choice_NK[n, k])
            if room[p]:
                room[p] -= 1
                hidden = experts.batched_fc1_w[p] @ x_NC[n] + experts.batched_fc1_bias[p]
                hidden = torch.nn.functional.gelu(hidden)
                row = experts.batched_fc2_w[p].T @ hidden + experts.batched_fc2_bias[p]
                out_NC[n] += weight_NK[n, k] * row
    return out_NC


@pytest.mark.parametrize("case", MIXTURES)
@torch.inference_mode()
def test_mixture_equals_a_loop_over_tokens(case: str) -> None:
    config = MIXTURES[case]
    layer = tiny(config).layers[0].blocks[1].mlp
    for batch in (1, 2):
        x_BLC = torch.randn(batch, 10, 8)
        wanted = plain(config, layer, x_BLC.flatten(0, 1))
        torch.testing.assert_close(layer(x_BLC).flatten(0, 1), wanted)
    if case in ("tight", "first come"):
        assert (wanted == 0).all(1).any()  # some token found no room


def attention_of_pairs(block: Block, x_BLC: Tensor) -> Tensor:
    """Attention of a block, where every token looks at all and a mask leaves its window."""
    side, window, shift, attn = block.side, block.window, block.shift, block.attn
    token = torch.arange(side * side)
    # Where a token stands once the image has moved up and left
    y, x = (token // side - shift) % side, (token % side - shift) % side
    same = (y[:, None] // window == y // window) & (x[:, None] // window == x // window)
    if shift:
        for place in (y, x):
            wrapped = place >= side - shift
            same &= wrapped[:, None] == wrapped
    dy, dx = (y % window)[:, None] - y % window, (x % window)[:, None] - x % window
    table = attn.cpb_mlp(attn.relative_coords_table)[0]
    bias = table[dy + window - 1, dx + window - 1].permute(2, 0, 1)
    heads = [t.unflatten(2, (attn.num_heads, -1)) for t in attn.qkv(x_BLC).chunk(3, -1)]
    q, k, v = (t.transpose(1, 2) for t in heads)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    probs = scores.masked_fill(~same, -torch.inf).softmax(-1)
    return attn.proj((probs @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("stage", "block"), [(0, 0), (0, 1), (1, 1)], ids=str)
@torch.inference_mode()
def test_windows_are_attention_of_pairs(stage: int, block: int) -> None:
    one = tiny().layers[stage].blocks[block]
    assert one.shift == (2 if (stage, block) == (0, 1) else 0)
    x_BLC = torch.randn(2, one.side**2, 8 * 2**stage)
    wanted = x_BLC + attention_of_pairs(one, one.norm1(x_BLC))
    torch.testing.assert_close(one.attend(x_BLC), wanted)


@torch.inference_mode()
def test_merging_takes_columns_first() -> None:
    merging = tiny().layers[0].downsample
    x = torch.randn(1, 64, 8)
    x_BHWC = x.view(1, 8, 8, 8)
    parts = [x_BHWC[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    wanted = merging.reduction(merging.norm(torch.cat(parts, -1).flatten(1, 2)))
    torch.testing.assert_close(merging(x), wanted)


def test_training_gives_a_loss_and_gradients() -> None:
    model = tiny(replace(TINY, mlp_bias=True)).train()
    logits, loss = model(images(3))
    assert logits.shape == (3, 3)
    assert 0.5 < float(loss.detach()) < 8  # of two mixtures; 1 each where the load is even
    (logits.square().mean() + loss).backward()
    assert all(p.grad is not None for p in model.parameters())
    frozen = [name for name, p in tiny().named_parameters() if not p.requires_grad]
    assert len(frozen) == 2
    assert all(name.endswith("batched_fc2_bias") for name in frozen)


V2 = replace(TINY, version=2, mlp_bias=True)


def tiny_v2(config: SwinMoEConfig = V2) -> SwinMoE:
    """With norms and biases as training leaves them: at first blocks add nothing."""
    model = tiny(config)
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(p, std=0.5)
        elif any(part in name for part in ("cpb_mlp", "qkv", "attn.proj", "fc1", "fc2", "head")):
            torch.nn.init.normal_(p, std=0.3)
        elif "logit_scale" in name:
            torch.nn.init.uniform_(p, 1.0, 6.0)  # beyond the largest that counts, log 100
    return model


def by_pairs_v2(block: Block, x_BLC: Tensor) -> Tensor:
    """A block of Swin V2 by its paper: every token looks at all, a mask leaves its window."""
    side, window, shift, attn = block.side, block.window, block.shift, block.attn
    token = torch.arange(side * side)
    y, x = (token // side - shift) % side, (token % side - shift) % side
    same = (y[:, None] // window == y // window) & (x[:, None] // window == x // window)
    apart = torch.zeros_like(same)
    for place in (y, x) if shift else ():
        wrapped = place >= side - shift
        apart |= wrapped[:, None] != wrapped
    # Offsets on a logarithmic scale, in units of an eighth of the window
    offset = torch.stack([p[:, None] % window - p % window for p in (y, x)], -1) * 8.0
    offset = offset / (window - 1)
    offset = offset.sign() * (1 + offset.abs()).log2() / 3
    bias = 16 * attn.cpb_mlp(offset).permute(2, 0, 1).sigmoid()
    weight, zeros = attn.qkv.weight, torch.zeros_like(attn.q_bias)
    qkv = x_BLC @ weight.T + torch.cat([attn.q_bias, zeros, attn.v_bias])
    heads = [t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]
    q, k, v = heads
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], -1)
    scores = cosine * attn.logit_scale.exp().clamp(max=100) + bias
    # The authors take 100 away, which cosines over a low temperature can make up for
    probs = (scores - 100.0 * apart).masked_fill(~same, -torch.inf).softmax(-1)
    return attn.proj((probs @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("stage", "block"), [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@torch.inference_mode()
def test_blocks_of_v2(stage: int, block: int) -> None:
    one = tiny_v2().layers[stage].blocks[block]
    x_BLC = torch.randn(2, one.side**2, 8 * 2**stage)
    wanted = x_BLC + one.norm1(by_pairs_v2(one, x_BLC))
    torch.testing.assert_close(one.attend(x_BLC), wanted)
    if isinstance(one.mlp, Mixture):
        made = plain(V2, one.mlp, wanted.flatten(0, 1)).view_as(wanted)
    else:
        hidden = torch.nn.functional.gelu(wanted @ one.mlp.fc1.weight.T + one.mlp.fc1.bias)
        made = hidden @ one.mlp.fc2.weight.T + one.mlp.fc2.bias
    torch.testing.assert_close(one(x_BLC), wanted + one.norm2(made))


@torch.inference_mode()
def test_without_mixtures_v2_is_that_of_transformers() -> None:
    model = tiny_v2(replace(V2, moe_blocks=((), ())))
    for name, p in model.named_parameters():
        if "logit_scale" in name:
            p.clamp_(max=3.0)  # theirs masks twice, which matters where 100 is not much
    config = Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4,
        num_labels=3, drop_path_rate=0.0,
    )  # fmt: skip
    theirs = Swinv2ForImageClassification(config).eval()
    renamed = {}
    for name, tensor in model.state_dict().items():
        if any(part in name for part in ("attn_mask", "relative_", "q_bias", "v_bias")):
            continue
        for ours, their in (
            ("patch_embed.proj", "swinv2.embeddings.patch_embeddings.projection"),
            ("patch_embed.norm", "swinv2.embeddings.norm"),
            ("layers.", "swinv2.encoder.layers."),
            ("cpb_mlp", "self.continuous_position_bias_mlp"),
            ("logit_scale", "self.logit_scale"),
            ("attn.proj", "attn.output.dense"),
            ("attn.", "attention."),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("head.", "classifier."),
        ):
            name = name.replace(ours, their)
        name = "swinv2.layernorm." + name[5:] if name.startswith("norm.") else name
        if "attention.qkv" not in name:
            renamed[name] = tensor
            continue
        attn = model.get_submodule(name.split(".attention")[0].removeprefix("swinv2.encoder.")).attn
        start = name.replace("qkv.weight", "self.")
        for part, weight in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            renamed[f"{start}{part}.weight"] = weight
        renamed[f"{start}query.bias"], renamed[f"{start}value.bias"] = attn.q_bias, attn.v_bias
    theirs.load_state_dict(renamed, strict=True)
    torch.testing.assert_close(model(images(3)), theirs(images(3)).logits)


def test_v2_trains() -> None:
    model = tiny_v2().train()
    logits, loss = model(images(3))
    (logits.square().mean() + loss).backward()
    assert all(p.grad is not None for p in model.parameters())
    fresh = SwinMoE(V2).eval().layers[0].blocks[1]
    x_BLC = torch.randn(1, fresh.side**2, 8)
    assert torch.equal(fresh(x_BLC), x_BLC)


def test_shapes_of_the_repository() -> None:
    small, base = SwinMoEConfig.published(), SwinMoEConfig.published("base", 32, True)
    assert small == SwinMoEConfig()
    assert (base.embed_dim, base.num_heads, base.drop_path) == (128, (4, 8, 16, 32), 0.3)
    tiny_one = SwinMoEConfig.v2("tiny", 8)
    assert tiny_one.depths == (2, 2, 6, 2)
    assert tiny_one.moe_blocks == ((), (), (1, 3, 5), (1,))
    with torch.device("meta"):
        state = SwinMoE(tiny_one).state_dict()
    assert state["layers.2.blocks.5.mlp._moe_layer.experts.batched_fc1_w"].shape == (8, 1536, 384)
    assert state["layers.3.blocks.0.attn.logit_scale"].shape == (24, 1, 1)
    assert state["layers.0.downsample.norm.weight"].shape == (192,)
    assert SwinMoEConfig.v2("base").embed_dim == 128
    with pytest.raises(BrtError, match="no size 'huge': tiny, small, base"):
        SwinMoEConfig.v2("huge")  # type: ignore[arg-type]
    with pytest.raises(BrtError, match="no size 'tiny': small, base"):
        SwinMoEConfig.published("tiny")


@pytest.mark.parametrize("case", ["top 1", "tight", "cosine", "v2"])
def test_optimised_gives_the_same(case: str) -> None:
    model = tiny_v2() if case == "v2" else tiny(MIXTURES[case])
    fast = brt.optimize(model, brt.profile(model, [images(2)]), sample=images(2), measure=False)
    with torch.inference_mode():
        for other in (images(2), images(1, seed=1), images(4, seed=2)):
            torch.testing.assert_close(fast(other), model(other))


def ranks_of(model: SwinMoE, num_ranks: int, old: bool = False) -> list[dict[str, Tensor]]:
    """What ranks would save: their experts, or their part of one, and all the rest."""
    num_experts = model.config.num_experts
    states = []
    for rank in range(num_ranks):
        state = {}
        for name, tensor in model.state_dict().items():
            if "batched" in name:
                if num_ranks <= num_experts:
                    tensor = tensor.chunk(num_ranks)[rank]
                else:
                    num_shards = num_ranks // num_experts
                    expert = tensor.chunk(num_experts)[rank // num_shards]
                    tensor = expert.chunk(num_shards, 1)[rank % num_shards]
                name = name.replace("experts.b", "experts.0.b") if old else name
            state[name.replace("gates.0", "gate") if old else name] = tensor.clone()
        states.append(state)
    return states


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("old", [False, True], ids=["", "old names"])
def test_ranks_merge(num_ranks: int, old: bool) -> None:
    model = tiny()
    merged = merge_ranks(ranks_of(model, num_ranks, old))
    own = model.state_dict()
    assert merged.keys() == own.keys()
    assert all(torch.equal(merged[name], own[name]) for name in own)


def test_files_of_ranks(tmp_path: Path) -> None:
    model, paths = tiny(), []
    for rank, state in enumerate(ranks_of(model, 2)):
        paths.append(tmp_path / f"model.pth.rank{rank}")
        torch.save({"model": state, "epoch": 3, "max_accuracy": 0.5}, paths[-1])
    other = SwinMoE(TINY).eval()
    load_ranks(other, paths)
    with torch.inference_mode():
        assert torch.equal(other(images(1)), model(images(1)))
    load_ranks(other, paths[::-1])  # names say which is which
    with torch.inference_mode():
        assert torch.equal(other(images(1)), model(images(1)))
    with pytest.raises(BrtError, match=r"1 of 2 ranks are missing: model\.pth\.rank0$"):
        load_ranks(other, paths[1:])
    with pytest.raises(BrtError, match="rank 1 comes twice"):
        load_ranks(other, [paths[1], paths[1]])
    with pytest.raises(BrtError, match=r"1 ranks hold 2 of 4 experts; give the files of all ranks"):
        merge_ranks(ranks_of(model, 2)[:1])
    with pytest.raises(BrtError, match=r"(?s)head\.bias is \[3\], not \[5\].*head\.weight is"):
        load_ranks(SwinMoE(replace(TINY, num_classes=5)), paths)
    with pytest.raises(BrtError, match=r"missing: layers\.0\.blocks\.0\.mlp\._moe_layer"):
        load_ranks(SwinMoE(replace(TINY, moe_blocks=((0, 1), (0,)))), paths)
    with pytest.raises(BrtError, match="cannot read"):
        load_ranks(other, [tmp_path / "none"])
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    with pytest.raises(BrtError, match="cannot read"):
        load_ranks(other, paths)


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": Touch(tmp_path / "made")}, tmp_path / "m.pth.rank0")
    with pytest.raises(BrtError, match="could run code"):
        load_ranks(tiny(), [tmp_path / "m.pth.rank0"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_split_and_saved_for_ranks(num_ranks: int, tmp_path: Path) -> None:
    model, other = tiny(), SwinMoE(TINY).eval()
    for ours, wanted in zip(
        split_ranks(model.state_dict(), num_ranks), ranks_of(model, num_ranks), strict=True
    ):
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    paths = save_ranks(model, tmp_path / "model.pth", num_ranks)
    assert [path.name for path in paths] == [f"model.pth.rank{r}" for r in range(num_ranks)]
    load_ranks(other, paths)
    with torch.inference_mode():
        assert torch.equal(other(images(1)), model(images(1)))
    if num_ranks > 2:
        left = ", ".join(f"model.pth.rank{r}" for r in range(2, num_ranks))
        with pytest.raises(BrtError, match=f"{num_ranks - 2} of {num_ranks} ranks .*: {left}$"):
            load_ranks(other, paths[:2])


def test_second_layers_lie_as_they_are_multiplied(tmp_path: Path) -> None:
    """Through all that copies a weight: a transposed copy in each call would cost more than it."""
    other = SwinMoE(TINY)
    load_ranks(other, save_ranks(tiny(), tmp_path / "model.pth", 2))
    for model in (tiny(), other, copy.deepcopy(other), tiny().to(torch.bfloat16)):
        weight_PHC = model.layers[0].blocks[1].mlp._moe_layer.experts.batched_fc2_w
        assert weight_PHC.shape == (4, 32, 8)
        assert weight_PHC.transpose(1, 2).is_contiguous()


def test_ranks_that_share_nothing_evenly() -> None:
    for num_ranks in (3, 6, 400):
        with pytest.raises(BrtError, match=f"{num_ranks} ranks do not share the 4 experts"):
            split_ranks(tiny().state_dict(), num_ranks)
    with pytest.raises(BrtError, match="at least one rank, not 0"):
        split_ranks(tiny().state_dict(), 0)


@torch.inference_mode()
def test_experts_are_mlps() -> None:
    """Of one expert that takes every token, the mixture is the MLP of its split state."""
    config = replace(TINY, num_experts=2, capacity_factor=None, mlp_bias=True)
    model = tiny(config)
    split = split_experts(model.state_dict())
    assert sorted(split) == ["layers.0.blocks.1.mlp", "layers.1.blocks.0.mlp"]
    layer = model.layers[0].blocks[1].mlp
    layer._moe_layer.gates[0].wg.weight.copy_(torch.stack([torch.zeros(8), torch.ones(8) * 99]))
    mlp = Mlp(config, 8)
    mlp.load_state_dict(split["layers.0.blocks.1.mlp"][1])
    x_BLC = torch.rand(2, 5, 8) + 0.1
    torch.testing.assert_close(layer(x_BLC), mlp(x_BLC))


def test_ranks_that_do_not_fit() -> None:
    first, second = ranks_of(tiny(), 2)
    second.pop("head.bias")
    with pytest.raises(BrtError, match=r"ranks 0 and 1 differ in head\.bias"):
        merge_ranks([first, second])
    with pytest.raises(BrtError, match="at least one rank"):
        merge_ranks([])


def test_the_published_shape() -> None:
    with torch.device("meta"):
        model = SwinMoE(SwinMoEConfig(cosine_router=True, num_experts=32))
    state = model.state_dict()
    layer = "layers.2.blocks.17.mlp._moe_layer."
    assert state[f"{layer}gates.0.sim_matrix"].shape == (256, 32)
    assert state[f"{layer}experts.batched_fc2_w"].shape == (32, 1536, 384)
    assert sum(name.endswith("batched_fc1_w") for name in state) == 10
    assert "layers.0.blocks.1.attn_mask" in state
    assert "layers.2.blocks.1.attn_mask" not in state  # one window: nothing to shift
    assert state["layers.3.blocks.0.attn.relative_position_index"].shape == (36, 36)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2,)}, "one entry a stage; got 1, 2 and 2"),
        ({"moe_blocks": ((2,), ())}, "stage 0 has 2 blocks; moe_blocks names"),
        ({"num_heads": (3, 2)}, "3 heads do not share the 8 features"),
        ({"window_size": 3}, "windows of 3 do not tile the 8x8 tokens of stage 0"),
        ({"image_size": 18, "window_size": 9}, "does not divide into patches"),
        ({"top_k": 5}, "top_k=5 of 4 experts"),
        ({"version": 3}, "no version 3 of Swin blocks: 1, 2"),
    ],
    ids=str,
)
def test_configs_that_make_no_network(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BrtError, match=message):
        replace(TINY, **fields)


def test_images_of_another_size() -> None:
    with pytest.raises(BrtError, match=r"must be 16x16 pixels, got \[32, 32\]"):
        tiny()(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["swin-moe", "swinv2-moe"])
def test_plugin(name: str) -> None:
    with plugins.using(_plugin):
        spec = plugins.get("models", name)
        assert name in plugins.collect("workloads")
    model, (x,) = spec.factory(), spec.sample()
    assert model.config.version == 1 + (name == "swinv2-moe")
    assert not torch.equal(x, spec.sample(seed=1)[0])
    with torch.inference_mode():
        assert model(x).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert sample()[0].shape == (2, 3, 32, 32)


WORKLOADS = {
    "swin-moe": (mixture_workload, {
        "batch": 2, "tokens": 9, "dim": 8, "num_experts": 3, "capacity_factor": 1.0}),
    "swinv2-moe": (network_workload, {
        "batch": 1, "image_size": 96, "embed_dim": 12, "depth": 2, "num_experts": 3,
        "capacity_factor": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
@torch.inference_mode()
def test_variants_agree(name: str) -> None:
    factory, options = WORKLOADS[name]
    workload = factory(torch.device("cpu"), torch.float32, **options)
    assert workload.options == options
    assert workload.reference is not None
    wanted = [workload.reference(*arguments) for arguments in workload.sets]
    for variant in workload.variants:
        if "torch.compile" in variant.name or not variant.is_checked:
            continue  # compiling takes minutes; `brt bench` does it
        run = variant.make()
        for arguments, right in zip(workload.sets, wanted, strict=True):
            error = (run(*arguments) - right).abs().max() / right.abs().max()
            assert error <= workload.tolerance, f"{variant.name}: {error}"
