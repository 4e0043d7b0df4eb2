"""Random wrong arguments must end in an exception or a result, never in a crash.

BRT_THOROUGH makes it 10,000 calls of each operator.
"""

from __future__ import annotations

import random

import pytest
import torch
from chains import ChainBuilder
from convs import PathCase, call_of
from kernel_cases import arguments

OPS = (
    "route", "route_mask", "dispatch", "combine", "row_dot", "compact", "grouped_linear",
    "grouped_outer", "expert_mlp", "conv_chain", "grouped_conv2d",
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64,
    torch.bool, torch.uint8, torch.complex64,
)  # fmt: skip
NUMBERS = (-(2**62), -(2**31), -1, 0, 1, 2, 3, 7, 64, 2**31, 2**40, 2**62)


def good_arguments(op: str) -> list[object]:
    if op == "grouped_conv2d":
        cases = [PathCase(2, 4, (4, 5), 6, residual=True), PathCase(1, 4, (3, 3), 4, groups=2)]
        return list(call_of(cases, "prelu").args())
    if op != "conv_chain":
        return list(arguments(torch.device("cpu"))[op])
    build = ChainBuilder()
    build.residual_branch(4, 1)
    build.residual_branch(6, 0)
    return [torch.randn(3, 3, 4, 5), torch.tensor([0, 1, 3]), *build.args()]


def wrong_tensor(pick: random.Random, tensor: torch.Tensor) -> object:
    how = pick.randrange(9)
    if tensor.is_complex():
        return tensor
    if how == 0:
        return tensor.to(pick.choice(DTYPES))
    if how == 1:
        noise = torch.randint(-(2**40), 2**40, tensor.shape)
        return torch.where(torch.rand(tensor.shape) < 0.2, noise, tensor.to(torch.int64)).to(
            tensor.dtype
        )
    if how == 2:
        return tensor[: pick.randrange(tensor.shape[0] + 1)] if tensor.ndim else tensor
    if how == 3:
        return tensor.unsqueeze(pick.randrange(tensor.ndim + 1))
    if how == 4 and tensor.ndim:
        return tensor.select(pick.randrange(tensor.ndim), 0) if tensor.numel() else tensor
    if how == 5:
        return tensor.transpose(0, -1) if tensor.ndim else tensor
    if how == 6:
        return torch.empty(
            [pick.choice((0, 1, 5)) for _ in range(pick.randrange(5))], dtype=tensor.dtype
        )
    if how == 7:
        return torch.cat([tensor, tensor]) if tensor.ndim else tensor
    return (
        tensor.new_full(tensor.shape, float("nan"))
        if tensor.is_floating_point()
        else tensor.new_zeros(tensor.shape)
    )


def wrong(pick: random.Random, value: object) -> object:
    if isinstance(value, torch.Tensor):
        return wrong_tensor(pick, value)
    if isinstance(value, list):
        value = list(value)
        for _ in range(pick.randrange(3)):
            if value:
                at = pick.randrange(len(value))
                value[at] = wrong(pick, value[at])
        return value if pick.random() < 0.8 else value[: pick.randrange(len(value) + 1)]
    if isinstance(value, float):
        return pick.choice((float("nan"), float("inf"), -1.0, 0.0))
    if isinstance(value, int):
        return pick.choice(NUMBERS)
    if isinstance(value, str):
        return pick.choice(("", "relu", "swiglu", "x" * 1000))
    return pick.choice((None, 3, "text", [1, 2], torch.zeros(3)))


@pytest.mark.parametrize("op", OPS)
def test_only_exceptions(op: str, thorough: bool) -> None:
    pick, good, call = random.Random(0), good_arguments(op), getattr(torch.ops.brt_kernels, op)
    num_calls = 10_000 if thorough else 1_000
    num_raised = 0
    for _ in range(num_calls):
        args = list(good)
        for _ in range(pick.randrange(1, 4)):
            at = pick.randrange(len(args))
            args[at] = wrong(pick, args[at])
        try:
            call(*args)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            num_raised += 1
    assert num_calls > num_raised > num_calls // 10
