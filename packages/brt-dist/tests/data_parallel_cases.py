"""What ranks do in test_data_parallel: experts over one dimension of a mesh, data over both.

Legend: D features.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed.checkpoint as dcp
from layer_cases import close
from model_cases import MODELS, cells_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import brt_dist

SIZES = (5, 2, 3, 4)
MESHES: list[tuple[DeviceMesh, DeviceMesh]] = []


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """2 x 2 ranks, and all of them in a row; made once."""
    if not MESHES:
        MESHES.append(
            (init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts")),
             init_device_mesh("cpu", (4,)))
        )  # fmt: skip
    return MESHES[0]


def by_hand(model: nn.Module, spread: brt_dist.Parallelized, x: Tensor) -> Tensor:
    """Gradients are summed after the backward."""
    mesh, _ = meshes()
    out = model(x)
    out.square().sum().backward()
    brt_dist.sum_gradients(model, but=spread.experts, scale=1 / 4)
    data = mesh["data"].get_group()
    brt_dist.sum_gradients(model, only=spread.experts, group=data, scale=1 / 4)
    return out


def ddp(model: nn.Module, spread: brt_dist.Parallelized, x: Tensor) -> Tensor:
    """DistributedDataParallel averages the dense part."""
    mesh, _ = meshes()
    spread.keep_from_ddp(model)
    wrapped = DistributedDataParallel(model)
    out: Tensor = wrapped(x)
    out.square().sum().backward()
    data = mesh["data"].get_group()
    brt_dist.sum_gradients(model, only=spread.experts, group=data, scale=1 / 4)
    return out


def fsdp(model: nn.Module, spread: brt_dist.Parallelized, x: Tensor) -> Tensor:
    """FSDP2 shards and averages the dense part."""
    mesh, row = meshes()
    fully_shard(model, mesh=row, ignored_params=spread.parameters(model))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    out = model(x)
    out.square().sum().backward()
    data = mesh["data"].get_group()
    brt_dist.sum_gradients(model, only=spread.experts, group=data, scale=1 / 4)
    return out


def fsdp_of_experts(model: nn.Module, spread: brt_dist.Parallelized, x: Tensor) -> Tensor:
    """FSDP2 shards the dense part over all ranks, experts over those that have the same."""
    mesh, row = meshes()
    for expert in model.experts:
        if next(expert.parameters(), None) is not None:
            fully_shard(expert, mesh=mesh["data"])
    fully_shard(model, mesh=row)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    out = model(x)
    out.square().sum().backward()
    # Averaged over two ranks, of which each has the sum of two; gloo has no divide factor
    for parameter in spread.parameters(model):
        assert parameter.grad is not None
        parameter.grad /= 2
    return out


WAYS = {"by hand": by_hand, "ddp": ddp, "fsdp": fsdp, "fsdp of experts": fsdp_of_experts}


def equals_one_process(rank: int, name: str, way: str) -> None:
    """Outputs, and gradients of the mean of the ranks' losses."""
    torch.manual_seed(0)
    whole = MODELS[name]()
    model = copy.deepcopy(whole)
    xs = [cells_of(r, size) for r, size in enumerate(SIZES)]
    wanted = whole(torch.cat(xs))
    (wanted.square().sum() / 4).backward()
    mesh, _ = meshes()
    spread = brt_dist.parallelize(model, mesh["experts"])
    out = WAYS[way](model, spread, xs[rank])
    close(out, wanted.split(SIZES)[rank].detach(), "output")
    full = dict(whole.named_parameters())
    for key, parameter in model.named_parameters():
        grad, wanted_grad = parameter.grad, full[key].grad
        assert grad is not None, key
        assert wanted_grad is not None
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        if grad.shape != wanted_grad.shape:
            router = model.get_submodule(key.rpartition(".")[0]).router
            wanted_grad = wanted_grad[list(router.spread.held)]
        close(grad, wanted_grad, key)


def sharded_too_early(rank: int) -> str:
    _, row = meshes()
    model = MODELS["stacked"]()
    fully_shard(model, mesh=row)
    try:
        brt_dist.parallelize(model)
    except brt_dist.ParallelError as error:
        return str(error)
    return "no error"


def saved_sharded_twice(rank: int, folder: str) -> None:
    """Experts over one dimension of the mesh, each rank's over the other; one process loads."""
    mesh, row = meshes()
    torch.manual_seed(0)
    whole = MODELS["stacked"]()
    model = copy.deepcopy(whole)
    placement = {"": [0, 1, 0, 0, 1]}
    spread = brt_dist.parallelize(model, mesh["experts"], placement=placement)
    fully_shard(model.gate, mesh=row)
    fully_shard(model, mesh=mesh["data"])
    assert all(isinstance(p, DTensor) for p in model.parameters())
    dcp.save(brt_dist.Checkpoint(model, None, spread).state_dict(), checkpoint_id=folder)
    again = MODELS["stacked"]()
    dcp.load(brt_dist.Checkpoint(again).state_dict(), checkpoint_id=folder)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
