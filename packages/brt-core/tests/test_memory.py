"""brt.memory: weights that live in a mapped file, and come back."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import brt
from brt.memory_layout import Layout, home_of, is_at_home


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 8, bias=False))
    return made.eval()


def test_pinned_weights_keep_names_values_and_identity(tmp_path: Path) -> None:
    net = model()
    wanted = {name: t.clone() for name, t in net.state_dict().items()}
    ids = {name: id(p) for name, p in net.named_parameters()}
    x = torch.randn(5, 64)
    before = net(x)
    brt.memory.pin(net, tmp_path / "w.safetensors")
    assert {name: id(p) for name, p in net.named_parameters()} == ids
    assert all(torch.equal(t, wanted[name]) for name, t in net.state_dict().items())
    assert all(torch.equal(t, wanted[n]) for n, t in load_file(tmp_path / "w.safetensors").items())
    assert torch.equal(net(x), before)
    assert all(map(is_at_home, net.parameters()))
    # A copy, and what is pickled, is in memory of its own
    assert not any(map(is_at_home, copy.deepcopy(net).parameters()))
    assert not hasattr(pickle.loads(pickle.dumps(net.get_buffer("1.running_mean"))), "flat")


def test_load_and_unload(tmp_path: Path) -> None:
    net, x = model(), torch.randn(5, 64)
    with pytest.raises(brt.BrtError, match="has no home"):
        brt.memory.unload(net)
    brt.memory.pin(net, tmp_path / "w.safetensors")
    first = net.get_parameter("0.weight")
    home = first.data_ptr()
    brt.memory.load(net)
    assert not is_at_home(first)
    with torch.no_grad():
        first.mul_(2)
    wanted = net(x)
    file = (tmp_path / "w.safetensors").read_bytes()
    brt.memory.unload(net)
    assert first.data_ptr() == home
    assert torch.equal(net(x), wanted)
    assert (tmp_path / "w.safetensors").read_bytes() == file  # the file never changes
    brt.memory.load(net)
    net.to(torch.bfloat16)
    wanted = net(x.bfloat16())
    brt.memory.unload(net)
    assert torch.equal(net(x.bfloat16()), wanted)
    net.double()
    with pytest.raises(brt.BrtError, match="too large for its home"):
        brt.memory.unload(net)


def test_a_file_that_is_there_gives_the_weights_of_a_model_without_any(tmp_path: Path) -> None:
    net, x = model(), torch.randn(5, 64)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        empty = model()
    del empty[1].num_batches_tracked
    brt.memory.pin(empty, tmp_path / "w.safetensors")
    assert torch.equal(empty(x), net(x))
    with pytest.raises(brt.BrtError, match=r"0.weight is float32\[3, 64\], there is F32\[96, 64\]"):
        brt.memory.pin(nn.Sequential(nn.Linear(64, 3)), tmp_path / "w.safetensors")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-9])
    with pytest.raises(brt.BrtError, match="cut off"):
        brt.memory.pin(model(), tmp_path / "bad.safetensors")
    with pytest.raises(brt.BrtError, match="no parameters"):
        brt.memory.pin(nn.ReLU(), tmp_path / "w.safetensors")


def test_copies_have_what_is_at_home(tmp_path: Path) -> None:
    net = model()
    brt.memory.pin(net, tmp_path / "w.safetensors")
    tensors = [net.get_parameter("2.weight"), net.get_buffer("1.running_var")]
    layout = Layout.of(tensors)
    buffer = torch.full((layout.num_bytes,), 7, dtype=torch.uint8)
    layout.fill(buffer)
    for made, tensor in zip(layout.tensors(buffer), tensors, strict=True):
        assert torch.equal(made, tensor)
    assert len(Layout.of(list(net[0].parameters())).pieces) == 1  # one copy for a module
    with pytest.raises(brt.BrtError, match="no common home"):
        Layout.of([torch.zeros(2)])


def test_dropped_pages_leave_memory(tmp_path: Path) -> None:
    net = nn.Linear(1024, 1024)
    size = net.weight.nbytes
    assert brt.memory.resident_bytes(net) >= size
    brt.memory.pin(net, tmp_path / "w.safetensors")
    with open(tmp_path / "w.safetensors", "rb+") as file:
        os.fsync(file.fileno())  # pages that are not written yet stay
    wanted = net(torch.ones(1, 1024))
    assert brt.memory.resident_bytes(net) >= size
    home = home_of(net.weight)
    assert home is not None
    brt.memory.drop_pages(net)
    assert brt.memory.resident_bytes(net) < size // 4
    assert torch.equal(net(torch.ones(1, 1024)), wanted)


def test_without_a_gpu_a_file_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(brt.BrtError, match="give the path of a file"):
        brt.memory.pin(model())


@pytest.mark.cuda
def test_page_locked_weights_come_to_the_device_and_go() -> None:
    net = model()
    x = torch.randn(5, 64)
    wanted = net(x)
    brt.memory.pin(net)
    assert net.get_parameter("0.weight").is_pinned()
    assert torch.equal(net(x), wanted)
    brt.memory.load(net, "cuda")
    assert all(t.is_cuda for t in net.state_dict().values() if t.numel())
    torch.testing.assert_close(net(x.cuda()).cpu(), wanted, rtol=1e-3, atol=1e-4)
    brt.memory.unload(net)
    assert torch.equal(net(x), wanted)
