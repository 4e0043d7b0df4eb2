"""`brt load` for the models of this package: tiny checkpoints in, and what it says of bad ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from brt import cli, plugins
from brt_models import (
    _plugin,
    classsr,
    dynamic_routing,
    layerskip,
    msdnet,
    ranet,
    swin_moe,
    switch,
    taskmoe,
)
from brt_models.msdnet import checkpoint as msdnet_files
from brt_models.sparse_decoder import SparseBlock, SparseBlockConfig

# Their weights lie in several files, which Python puts together
IN_PARTS = {"livesr"}

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 12, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, out, err)."""

    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["brt", *args])
        with pytest.raises(SystemExit) as ended, plugins.using(_plugin):
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def mixtral(path: Path) -> None:
    """A folder with a decoder's third layer, its experts apart, as the hub has them."""
    block = SparseBlock(SparseBlockConfig.mixtral(8, 12, 4, 2))
    theirs = block.to_transformers()
    tensors = {"gate.weight": theirs["gate.weight"]}
    for expert in range(4):
        gate, up = theirs["experts.gate_up_proj"][expert].chunk(2)
        parts = {"w1": gate, "w3": up, "w2": theirs["experts.down_proj"][expert]}
        tensors |= {f"experts.{expert}.{name}.weight": t for name, t in parts.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MIXTRAL))
    prefix = "model.layers.2.block_sparse_moe."
    named = {prefix + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(named, path / "model.safetensors")


def ranks(model: swin_moe.SwinMoE, path: Path) -> None:
    """A folder with what each of two ranks saved."""
    path.mkdir()
    swin_moe.save_ranks(model, path / "model.pth", 2)


# Model -> how a checkpoint of it is written, and the options that it needs
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "switch-base-8": (lambda path: switch.save(switch.narrow(4), path), ()),
    "mixtral-block": (mixtral, ("layer=2",)),
    "layerskip": (lambda path: layerskip.save(layerskip.small(), path), ("dtype=bfloat16",)),
    "taskmoe": (lambda path: taskmoe.save(taskmoe.small(), path), ()),
    "msdnet": (lambda path: msdnet_files.save_checkpoint(msdnet.small(), path), ()),
    "ranet": (lambda path: ranet.save_checkpoint(ranet.small(), path), ()),
    "dynamic-routing": (
        lambda path: dynamic_routing.save_checkpoint(dynamic_routing.small(), path), ()
    ),
    "classsr": (lambda path: classsr.save(classsr.small(), path), ()),
    "swin-moe": (lambda path: ranks(swin_moe.small(7), path), ()),
    "swinv2-moe": (lambda path: ranks(swin_moe.small_v2(), path), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_load_says_what_was_found(name: str, run: Run, tmp_path: Path) -> None:
    write, options = CHECKPOINTS[name]
    path = tmp_path / "made"
    write(path)
    given = [part for option in options for part in ("--option", option)]
    code, out, err = run("load", name, "--checkpoint", str(path), "--json", *given)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["loaded"], found["missing"], found["complaints"]) == (True, 0, [])
    assert found["tensors"] > 0
    assert found["config"]
    assert run("load", name, "--checkpoint", str(path), *given)[0] == 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_another_model_is_refused(name: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    torch.save({"bert.pooler.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    torch.save({"bert.pooler.weight": torch.zeros(2)}, folder / "bert.pth.rank0")
    in_folder = name in ("switch-base-8", "mixtral-block", "layerskip", "taskmoe") or "swin" in name
    path = folder if in_folder else folder / "pytorch_model.bin"
    options = ("--option", "network=A") if name == "dynamic-routing" else ()
    code, out, _ = run("load", name, "--checkpoint", str(path), "--json", *options)
    found = json.loads(out)
    assert (code, found["loaded"], len(found["complaints"])) == (2, False, 1)
    assert "bert" in found["complaints"][0]


def test_options_that_are_needed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "made.pth"
    torch.save({"model": dynamic_routing.small().state_dict()}, path)
    said = run("load", "dynamic-routing", "--checkpoint", str(path))
    assert said[0] == 2
    assert "say network='A', 'B', 'C' or 'Raw'" in said[2]
    mixtral(tmp_path / "mixtral")
    said = run("load", "qwen3-moe-block", "--checkpoint", str(tmp_path / "mixtral"))
    assert said[0] == 2
    assert "holds a mixtral model, not a qwen3-moe one" in said[2]
    said = run("load", "mixtral-block", "--checkpoint", str(tmp_path / "mixtral"))
    assert "layer 0" in said[2]


def test_every_format_that_is_listed_has_a_loader() -> None:
    with plugins.using(_plugin):
        specs = {name: spec for name, (spec, _) in plugins.collect("models").items()}
    without = {name for name, spec in specs.items() if spec.checkpoints and spec.load is None}
    assert without <= IN_PARTS
    assert {name for name, spec in specs.items() if spec.load} >= CHECKPOINTS.keys()


@pytest.mark.parametrize("name", ["switch-base-8", "dynamic-routing", "layerskip"])
def test_routers_are_drawn(name: str, run: Run) -> None:
    code, out, _ = run("models", "show", name)
    assert code == 0
    wanted = {
        "switch-base-8": ("{1, 3, 5, 7, 9, 11}.mlp", "ScatterRouter"),
        "dynamic-routing": ("backbone", "skip ScatterRouter"),
        "layerskip": ("loop LoopRouter", "max_steps=6"),
    }[name]
    assert all(part in out for part in wanted), out
