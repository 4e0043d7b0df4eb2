"""What ranks do in test_cuda: NCCL on one GPU, and several processes on it by symmetric memory.

Legend: N cells, P experts.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from layer_cases import Layer, close, tensors_of
from torch import Tensor

import brt
import brt_dist
from brt_dist.padded import Padded

GROUPS: list[dist.ProcessGroup] = []


def nccl() -> dist.ProcessGroup:
    if not GROUPS:
        torch.cuda.set_device(0)
        GROUPS.append(dist.new_group(backend="nccl"))
    return GROUPS[0]


def exchange(rank: int) -> None:
    """Rows of CUDA there and back, with gradients, and in the background."""
    counts_WG = torch.tensor([[3, 0, 4]])
    rows = torch.randn(7, 5, device="cuda", requires_grad=True)
    ids = torch.arange(7, device="cuda")
    handle = brt_dist.sparse_all_to_all((rows, ids), counts_WG, nccl(), async_op=True)
    (came, came_ids), made = handle.wait()
    back, back_ids = brt_dist.reverse_all_to_all((came * 2, came_ids), made)
    back.sum().backward()
    assert torch.equal(back, rows * 2)
    assert torch.equal(back_ids, ids)
    assert torch.equal(rows.grad, torch.full_like(rows, 2))


def layer_of(
    transport: brt_dist.Transport, group: dist.ProcessGroup | None
) -> brt_dist.ExpertParallel:
    weights = [w.cuda() for w in tensors_of(Layer(num_experts=5), 3)[3]]
    return brt_dist.ExpertParallel(
        *weights[:2], up_bias_PH=weights[2], down_bias_PD=weights[3], group=group,
        transport=transport,
    )  # fmt: skip


def one_process(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
    weights = [w.cuda() for w in tensors_of(Layer(num_experts=5), 3)[3]]
    out: Tensor = brt.ExpertRouter(5)(
        x_ND, choice_NK, weight_NK, *weights[:2], up_bias_PH=weights[2], down_bias_PD=weights[3]
    )
    return out


def cells(seed: int, num_cells: int) -> tuple[Tensor, Tensor, Tensor]:
    x_ND, choice_NK, weight_NK, _ = tensors_of(Layer(num_experts=5, seed=seed), num_cells)
    return x_ND.cuda(), choice_NK.cuda(), weight_NK.cuda()


def layer(rank: int, degree: int, capacity: int | None) -> None:
    """A layer by NCCL, with gradients."""
    parallel = layer_of(brt_dist.Transport(degree, capacity=capacity), nccl())
    x_ND, choice_NK, weight_NK = cells(0, 9)
    x_ND.requires_grad_()
    out = parallel(x_ND, choice_NK, weight_NK)
    wanted = one_process(x_ND, choice_NK, weight_NK)
    close(out, wanted.detach())
    (grad,) = torch.autograd.grad(out.square().sum(), x_ND)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x_ND)
    close(grad, wanted_grad)


@torch.no_grad()
def captured(rank: int) -> None:
    """The padded way there and back in a CUDA graph, replayed with other cells and choices."""
    group = nccl()

    def there_and_back(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        padded = Padded.of(choice_NK, 9, 5, group)
        return padded.back(padded.there(x_ND) * 2, weight_NK)

    inputs = cells(0, 9)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            there_and_back(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = there_and_back(*inputs)
    for seed in (1, 2):
        x_ND, choice_NK, weight_NK = cells(seed, 9)
        for static, other in zip(inputs, (x_ND, choice_NK, weight_NK), strict=True):
            static.copy_(other)
        graph.replay()
        close(out, 2 * x_ND * torch.where(choice_NK >= 0, weight_NK, 0).sum(1, keepdim=True))


@torch.no_grad()
def symmetric(rank: int, dtype: torch.dtype, seed: int) -> None:
    """A layer by symmetric memory; all ranks on one GPU."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(0)
    parallel = layer_of(brt_dist.Transport(symmetric=200), None).to(dtype)
    for turn in range(3):
        x_ND, choice_NK, weight_NK = cells(10 * seed + 3 * rank + turn, (4 * rank + turn) % 7)
        out = parallel(x_ND.to(dtype), choice_NK, weight_NK)
        wanted = one_process(x_ND, choice_NK, weight_NK)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance)
