"""Checkpoints in the containers of the authors of MSDNet, RANet, dynamic routing and TaskMoE.

Their names and shapes are compared with lists made by the authors' own classes, as digests; the
models' tests compare the networks themselves with the same digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brt.errors import BrtError, CheckpointError
from brt_models import dynamic_routing, ranet, taskmoe
from brt_models.dynamic_routing import DynamicRouting, DynamicRoutingConfig
from brt_models.msdnet import MSDNet, MSDNetConfig
from brt_models.msdnet import checkpoint as msdnet
from brt_models.ranet import RANet, RANetConfig
from brt_models.taskmoe import TaskMoE, TaskMoEConfig

TINY_CITY = DynamicRoutingConfig(num_layers=3, channels=4, small_gate=False)


@dataclass(frozen=True)
class Format:
    """A model's container, and a tiny network in it."""

    make: Callable[[], nn.Module]
    load: Callable[..., Any]
    save: Callable[..., None]
    wrap: str
    prefix: str
    images: tuple[int, ...] = (2, 3, 32, 32)


FORMATS = {
    "msdnet": Format(
        lambda: MSDNet(MSDNetConfig(steps=(1, 2), channels=4, num_classes=3)),
        *(msdnet.load_checkpoint, msdnet.save_checkpoint, "state_dict", "module."),
    ),
    "ranet": Format(
        lambda: RANet(RANetConfig(num_classes=3, growth=8)),
        *(ranet.load_checkpoint, ranet.save_checkpoint, "state_dict", "module."),
    ),
    "dynamic-routing": Format(
        lambda: DynamicRouting(TINY_CITY),
        *(dynamic_routing.load_checkpoint, dynamic_routing.save_checkpoint, "model", ""),
        images=(1, 3, 64, 64),
    ),
}
# Of "NAME SHAPE" lines of the lists: what the authors' classes give
LISTS: dict[str, tuple[Callable[[], nn.Module], str, int, str]] = {
    "msdnet": (lambda: MSDNet(MSDNetConfig.imagenet()), "", 1127, "7aabdffa05cec853"),
    "ranet": (lambda: RANet(RANetConfig.cifar()), "", 1774, "eee9a0c8bf68da5a"),
    "dynamic-routing": (
        lambda: DynamicRouting(DynamicRoutingConfig.cityscapes("A")),
        *("backbone.", 1906, "d927400bc8757967"),
    ),
}


def digest(state: dict[str, Tensor], prefix: str) -> tuple[int, str]:
    """(how many names begin so, what stands for them and their shapes)."""
    lines = sorted(
        f"{name.removeprefix(prefix)} {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name.startswith(prefix)
    )
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def zeros(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without memory: each tensor is one zero, seen as many."""
    with torch.device("meta"):
        model = make()
    state = {
        k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model


def tensors_in(path: Path, name: str) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)[FORMATS[name].wrap]


def as_theirs(path: Path, name: str, state: dict[str, Tensor]) -> Path:
    """A file as the authors' training scripts write it, with what stands beside the weights."""
    beside = {"epoch": 89, "best_prec1": torch.tensor(73.5), "optimizer": {"state": {}}}
    torch.save(beside | {FORMATS[name].wrap: state}, path)
    return path


def same(a: nn.Module, b: nn.Module) -> None:
    own, other = a.state_dict(), b.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in own.items())


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_round_trip(name: str, tmp_path: Path) -> None:
    made, path = FORMATS[name], tmp_path / "made.pth"
    model = made.make().eval()
    made.save(model, path)
    written = tensors_in(path, name)
    assert written.keys() == {made.prefix + key for key in model.state_dict()}
    loaded = made.load(path)
    assert (loaded.config, loaded.training) == (model.config, False)
    same(loaded, model)
    images = torch.randn(made.images)
    torch.testing.assert_close(loaded(images), model(images))
    again = tmp_path / "again.pth"
    made.save(loaded, again)
    assert tensors_in(again, name).keys() == written.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_names_in_the_file_are_those_of_the_authors(name: str, tmp_path: Path) -> None:
    make, part, num_names, wanted = LISTS[name]
    model, made = zeros(make), FORMATS[name]
    made.save(model, tmp_path / "made.pth")
    written = tensors_in(tmp_path / "made.pth", name)
    assert digest(written, made.prefix + part) == (num_names, wanted)
    # Without our config beside the weights, as in the files of the authors
    options = {"network": "A"} if name == "dynamic-routing" else {}
    loaded = made.load(as_theirs(tmp_path / "theirs.pth", name, written), **options)
    assert loaded.config == model.config  # type: ignore[comparison-overlap]
    same(loaded, model)


def test_published_networks_of_other_sizes(tmp_path: Path) -> None:
    for config in (MSDNetConfig.cifar(7), replace(MSDNetConfig(), num_classes=3)):
        state = zeros(lambda config=config: MSDNet(config)).state_dict()  # type: ignore[misc]
        path = as_theirs(tmp_path / "a.pth", "msdnet", state)
        assert msdnet.load_checkpoint(path).config == config
    raw = replace(DynamicRoutingConfig.cityscapes("Raw"), num_layers=3, channels=4)
    state = DynamicRouting(raw).state_dict()
    path = as_theirs(tmp_path / "b.pth", "dynamic-routing", state)
    with pytest.raises(BrtError, match="say network='A', 'B', 'C' or 'Raw'"):
        dynamic_routing.load_checkpoint(path)
    with pytest.raises(BrtError, match="no network 'D': A, B, C, Raw"):
        dynamic_routing.load_checkpoint(path, "D")
    assert dynamic_routing.load_checkpoint(path, config=raw).config == raw


@pytest.mark.parametrize("name", FORMATS)
def test_everything_that_does_not_fit_is_listed(name: str, tmp_path: Path) -> None:
    made = FORMATS[name]
    state = made.make().state_dict()
    names = sorted(key for key, tensor in state.items() if tensor.ndim)
    del state[names[0]]
    state[names[1]], state[names[-1]] = torch.zeros(99), torch.zeros(98)
    state["strange"] = torch.zeros(1)
    path = as_theirs(tmp_path / "made.pth", name, state)
    with pytest.raises(CheckpointError) as failure:
        made.load(path, config=made.make().config)
    assert len(failure.value.complaints) == 4
    for part in (f"missing: {names[0]}", "not of this model: strange", f"{names[1]} is [99], not",
                 f"{names[-1]} is [98], not"):  # fmt: skip
        assert part in str(failure.value)


def test_nearest_published_network_is_named(tmp_path: Path) -> None:
    state = MSDNet(MSDNetConfig(num_classes=3)).state_dict()
    state["classifier.1.linear.bias"] = torch.zeros(5)
    path = as_theirs(tmp_path / "made.pth", "msdnet", state)
    with pytest.raises(CheckpointError) as failure:
        msdnet.load_checkpoint(path)
    assert "nearest to small of small, imagenet-4, imagenet-6" in str(failure.value)
    assert failure.value.complaints == ("classifier.1.linear.bias is [5], not [3]",)
    with pytest.raises(CheckpointError, match="it is of another model"):
        ranet.load_checkpoint(as_theirs(path, "ranet", {"conv1.weight": torch.zeros(1)}))


def test_config_in_the_file_that_contradicts_itself(tmp_path: Path) -> None:
    path = tmp_path / "made.pth"
    for fields, message in (
        ({"factors": (1, 2)}, "its config is none of MSDNetConfig: .*one number a scale"),
        ({"depth": 3}, "its config is none of MSDNetConfig: .*unexpected keyword"),
    ):
        torch.save({"state_dict": {"a": torch.zeros(1)}, "config": fields}, path)
        with pytest.raises(BrtError, match=message):
            msdnet.load_checkpoint(path)
    model = MSDNet(MSDNetConfig())
    config = {"steps": (2, 2, 2), "num_classes": 11}
    torch.save({"state_dict": model.state_dict(), "config": config}, path)
    with pytest.raises(CheckpointError, match=r"classifier\.0\.linear\.bias is \[10\], not \[11\]"):
        msdnet.load_checkpoint(path)


TINY_TASKS = TaskMoEConfig(
    num_tasks=3, num_layers=2, hidden_size=8, num_heads=2, intermediate_size=12, vocab_size=20,
    max_positions=10,
)  # fmt: skip


def test_taskmoe_round_trip(tmp_path: Path) -> None:
    model = TaskMoE(replace(TINY_TASKS, seed=5, placement_aware=True)).eval()
    taskmoe.save(model, tmp_path)
    loaded = taskmoe.load(tmp_path)
    assert (loaded.config, loaded.training) == (model.config, False)
    same(loaded, model)
    assert loaded.lm_head.weight is loaded.embeddings.word_embeddings.weight
    ids_NS, task_N = torch.randint(20, (3, 5)), torch.arange(3)
    torch.testing.assert_close(loaded(ids_NS, task_N), model(ids_NS, task_N))


@torch.inference_mode()
def test_taskmoe_starts_from_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertGenerationConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=10, is_decoder=True, bos_token_id=2,
    )  # fmt: skip
    theirs = transformers.BertGenerationDecoder(config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = taskmoe.load(tmp_path, num_tasks=1)
    ids_NS = torch.randint(20, (3, 5))
    wanted = theirs(ids_NS).logits
    found = loaded(ids_NS, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert taskmoe.load(tmp_path, num_tasks=4).config.num_tasks == 4


def test_taskmoe_of_another_folder(tmp_path: Path) -> None:
    for text, message in (
        ('{"model_type": "bert"}', "holds a 'bert' model, neither 'taskmoe' nor 'bert-generation'"),
        ('{"model_type": "taskmoe", "depth": 3}', "with a strange field: depth"),
        ('{"model_type": "taskmoe", "hidden_size": 7}', "8 heads do not share hidden_size=7"),
        ('{"model_type": "bert-generation"}', "without num_hidden_layers, hidden_size"),
        (
            '{"model_type": "bert-generation", "hidden_act": "relu"}',
            "hidden_act must be 'gelu' and add_cross_attention false; got 'relu'",
        ),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BrtError, match=message):
            taskmoe.load(tmp_path)
