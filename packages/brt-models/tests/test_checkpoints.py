"""Reading other people's checkpoints: containers, and all that can be wrong with one."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brt.errors import BrtError, CheckpointError
from brt_models import checkpoints

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.ones(2),
    "steps": torch.tensor(3),
}


class Model(nn.Module):
    """What the tensors belong to."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))


def prefixed(prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in TENSORS.items())


def sharded(folder: Path, suffix: str) -> Path:
    names = {"safetensors": "model", "bin": "pytorch_model"}
    weight_map = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        shard = f"{names[suffix]}-{i + 1:05}-of-{len(TENSORS):05}.{suffix}"
        if suffix == "bin":
            torch.save({name: tensor}, folder / shard)
        else:
            save_file({name: tensor}, folder / shard)
        weight_map[name] = shard
    index = folder / f"{names[suffix]}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def saved(folder: Path, found: Any, **options: Any) -> Path:
    torch.save(found, folder / "made.pth", **options)
    return folder / "made.pth"


def as_safetensors(folder: Path) -> Path:
    save_file(dict(TENSORS), folder / "made.safetensors")
    return folder / "made.safetensors"


def training_state() -> dict[str, Any]:
    best = np.float64(73.9)
    return {"epoch": 3, "arch": "msdnet", "state_dict": prefixed("module."), "best_prec1": best}


def detectron2() -> dict[str, Any]:
    arrays = {name: tensor.numpy() for name, tensor in TENSORS.items()}
    return {"model": arrays, "__author__": "somebody", "iteration": 7}


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": as_safetensors,
    "bare": lambda folder: saved(folder, dict(TENSORS)),
    "of before torch 1.6": lambda folder: saved(
        folder, training_state(), _use_new_zipfile_serialization=False
    ),
    "state_dict with module.": lambda folder: saved(folder, training_state()),
    "compiled, in parallel": lambda folder: saved(folder, prefixed("module._orig_mod.")),
    "model with numpy arrays": lambda folder: saved(folder, detectron2()),
    "params": lambda folder: saved(folder, {"params": dict(TENSORS)}),
    "folder in shards": lambda folder: sharded(folder, "safetensors"),
    "folder in .bin shards": lambda folder: sharded(folder, "bin"),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container(container: str, tmp_path: Path) -> None:
    path = CONTAINERS[container](tmp_path)
    found = checkpoints.read(path)
    assert found.keys() == TENSORS.keys()
    with torch.device("meta"):
        model = Model()
    checkpoints.assign(model, found, "test", torch.float64)
    assert torch.equal(model.a.weight, TENSORS["a.weight"].double())
    assert int(model.steps) == 3
    assert checkpoints.read(path, "a.").keys() == {"a.weight", "a.bias"}


def test_arrays_that_older_numpy_wrote(tmp_path: Path) -> None:
    path = saved(tmp_path, detectron2(), _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(checkpoints.read(path)["a.weight"], TENSORS["a.weight"])


def test_what_is_written_is_what_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoints.write(path, TENSORS, wrap="state_dict", prefix="module.", epoch=3)
    found = torch.load(path, weights_only=True)
    assert found["epoch"] == 3
    assert found["state_dict"].keys() == prefixed("module.").keys()
    checkpoints.write_folder(tmp_path / "folder", TENSORS, {"model_type": "x"})
    assert checkpoints.read_config(tmp_path / "folder") == {"model_type": "x"}
    assert checkpoints.read(tmp_path / "folder").keys() == TENSORS.keys()


def test_all_complaints_are_listed() -> None:
    wrong = {
        "a.weight": torch.zeros(3, 3),
        "steps": torch.tensor(0.5),
        "b": torch.zeros(1),
        "c": torch.zeros(1),
    }
    before = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    model = Model()
    model.load_state_dict(before)
    with pytest.raises(CheckpointError) as failure:
        checkpoints.assign(model, wrong, "test: a.pth")
    assert failure.value.complaints == (
        "missing: a.bias [2]",
        "not of this model: b",
        "not of this model: c",
        "a.weight is [3, 3], not [2, 3]",
        "steps is torch.float32, which cannot be read as torch.int64",
    )
    assert str(failure.value).startswith("test: a.pth does not fit, 5 complaints:\n  missing: a.b")
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.cfloat]
)
def test_dtypes_that_are_no_floats(dtype: torch.dtype) -> None:
    strange = dict(TENSORS) | {"a.bias": torch.zeros(2).to(dtype)}
    with pytest.raises(CheckpointError, match=rf"a\.bias is {dtype}, which cannot be read as fl"):
        checkpoints.assign(Model(), strange, "test")


def test_another_model() -> None:
    others = {f"bert.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"of another model: none of its 9 names \(bert\.0, "):
        checkpoints.assign(Model(), others, "test")


class Planted:
    """What a pickle may do where it is trusted."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.mark, "ran")


def _planted_pickle(path: Path, planted: Planted) -> None:
    path.write_bytes(pickle.dumps({"a.bias": planted}, protocol=2))


PLANTED: dict[str, Callable[[Path, Planted], None]] = {
    "zip": lambda path, planted: torch.save({"a.bias": planted}, path),
    "legacy": lambda path, planted: torch.save(
        {"state_dict": {"a.bias": planted}}, path, _use_new_zipfile_serialization=False
    ),
    "plain pickle": _planted_pickle,
    "array of objects": lambda path, planted: torch.save(
        {"a.bias": np.array([planted], dtype=object)}, path
    ),
}


@pytest.mark.parametrize("container", PLANTED)
def test_a_pickle_with_code_runs_nothing(container: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "made.pth"
    PLANTED[container](path, Planted(mark))
    with pytest.raises(
        BrtError, match=r"could run code; it was not loaded|numpy\.dtypes\.Obj"
    ) as e:
        checkpoints.read(path)
    assert not mark.exists()
    assert "weights_only" not in str(e.value)  # torch's advice is to run it
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # what is allowed ends with the read


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_cut_off(zipped: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, dict(TENSORS), _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for share in (0.0, 0.02, 0.6, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(BrtError, match=r"cannot read .*made\.pth: it is "):
            checkpoints.read(path)
    whole = as_safetensors(tmp_path)
    data = whole.read_bytes()
    for length in (0, 5, 50, len(data) - 1):
        whole.write_bytes(data[:length])
        with pytest.raises(BrtError, match=r"cannot read .*made\.safetensors"):
            checkpoints.read(whole)


def test_folders_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(BrtError, match=r"holds no weights: neither model\.safetensors"):
        checkpoints.read(tmp_path)
    with pytest.raises(BrtError, match="cannot read"):
        checkpoints.read(tmp_path / "nothing.pth")
    with pytest.raises(BrtError, match=r"cannot read .*config\.json"):
        checkpoints.read_config(tmp_path)
    sharded(tmp_path, "bin")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    (tmp_path / "pytorch_model-00003-of-00003.bin").unlink()
    with pytest.raises(BrtError, match=r"lacks 2 of 3 shards: pytorch_model-00002-"):
        checkpoints.read(tmp_path)
    assert checkpoints.read(tmp_path, "a.weight").keys() == {"a.weight"}
    torch.save({}, tmp_path / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(BrtError, match=r"a\.bias is in no shard"):
        checkpoints.read(tmp_path, "a.")


@pytest.mark.parametrize("found", [{"epoch": 3}, [torch.zeros(1)], {"model": {"a": 1}}])
def test_files_without_a_state_dict(found: Any, tmp_path: Path) -> None:
    with pytest.raises(BrtError, match="is no state dict"):
        checkpoints.read(saved(tmp_path, found))
