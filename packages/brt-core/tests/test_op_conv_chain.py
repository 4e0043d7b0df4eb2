"""`conv_chain` against the branches written as modules; its gradients, fake kernel and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import brt
from brt.conv_steps import ConvStep, flatten_branches

LOADS = {
    "none": [0, 0, 0],
    "one": [0, 1, 0],
    "all-on-one": [5, 0, 0],
    "uneven": [2, 0, 3],
}


class Chain:
    """Three branches of 4, 5 and 1 channels that make images of one shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype, requires_grad: bool = False):
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> Tensor:
            value = 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.to(device, dtype).requires_grad_(requires_grad)

        self.params: list[Tensor] = []
        self.branches: list[list[ConvStep]] = []
        for channels in (4, 5, 1):
            at = len(self.params)
            self.params += [
                parameter(channels, 2, 3, 3),
                parameter(channels),
                parameter(channels, channels, 3, 3),
                parameter(channels),
                parameter(channels, channels, 1, 1),
                parameter(12, channels, 3, 3),
                parameter(12),
            ]
            self.branches.append(
                [
                    ConvStep(0, 1, at, at + 1),
                    ConvStep(1, 2, at + 2, at + 1, act=1),
                    ConvStep(2, 1, at + 4, add=1, post=True, scale=0.5),
                    ConvStep(1, 2, at + 2, slope=at + 3, act=2),
                    ConvStep(2, 3, at + 5, at + 6, shuffle=2),
                ]
            )

    def expected(self, x: Tensor, loads: list[int]) -> Tensor:
        made = []
        for i, rows in enumerate(x[: sum(loads)].split(loads)):
            head, bias, inner, slope, small, tail, tail_bias = self.params[7 * i : 7 * i + 7]
            for row in rows.unbind():
                image = F.conv2d(row[None], head, bias, padding=1)
                inside = F.relu(F.conv2d(image, inner, bias, padding=1))
                image = F.relu(image + 0.5 * F.conv2d(inside, small))
                inside = F.prelu(F.conv2d(image, inner, padding=1), slope)
                made.append(F.pixel_shuffle(F.conv2d(inside, tail, tail_bias, padding=1), 2))
        made.append(x.new_zeros((len(x) - sum(loads), 3, 2 * x.shape[2], 2 * x.shape[3])))
        return torch.cat(made)


def inputs(loads: list[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(loads) + 1, 2, 6, 7, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *loads]).cumsum(0)
    return x.to(device, dtype), offsets.to(device)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_branches(name: str, dtype: torch.dtype, device: torch.device) -> None:
    chain = Chain(device, dtype)
    x, offsets = inputs(LOADS[name], device, dtype)
    out = brt.ops.conv_chain(x, offsets, chain.params, chain.branches)
    torch.testing.assert_close(out, chain.expected(x, LOADS[name]), rtol=1e-5, atol=1e-5)


def test_takes_images_without_a_common_stride(device: torch.device) -> None:
    chain = Chain(device, torch.float32)
    x, offsets = inputs(LOADS["uneven"], device, torch.float32)
    strided = x.to(memory_format=torch.channels_last)
    out = brt.ops.conv_chain(strided, offsets, chain.params, chain.branches)
    torch.testing.assert_close(out, chain.expected(x, LOADS["uneven"]), rtol=1e-5, atol=1e-5)


def test_two_calls_do_not_alias(device: torch.device) -> None:
    chain = Chain(device, torch.float32)
    x, offsets = inputs(LOADS["uneven"], device, torch.float32)
    first = brt.ops.conv_chain(x, offsets, chain.params, chain.branches)
    kept = first.clone()
    brt.ops.conv_chain(2 * x, offsets, chain.params, chain.branches)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", LOADS)
def test_gradients_are_those_of_the_branches(name: str, device: torch.device) -> None:
    chain = Chain(device, torch.float64, requires_grad=True)
    x, offsets = inputs(LOADS[name], device, torch.float64)
    x.requires_grad_()
    wanted = [x, *chain.params]
    out = brt.ops.conv_chain(x, offsets, chain.params, chain.branches)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, wanted, weight)
    anchored = chain.expected(x, LOADS[name]) + 0 * x.sum()  # without rows nothing else depends
    expected = torch.autograd.grad(anchored, wanted, weight, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_opcheck_and_compile(device: torch.device) -> None:
    chain = Chain(device, torch.float32, requires_grad=True)
    x, offsets = inputs(LOADS["uneven"], device, torch.float32)
    steps, scales, step_offsets = flatten_branches(chain.branches)
    arguments = (x, offsets, chain.params, steps, step_offsets, scales)
    torch.library.opcheck(torch.ops.brt.conv_chain.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return brt.ops.conv_chain(x, offsets, chain.params, chain.branches)

    out = run(x)
    torch.testing.assert_close(out, chain.expected(x, LOADS["uneven"]), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(p.grad is not None for p in chain.params)


def test_an_empty_branch_is_refused() -> None:
    with pytest.raises(brt.RouteError, match="at least one step"):
        brt.ops.conv_chain(torch.zeros(1, 2, 4, 4), torch.tensor([0, 1]), [], [[]])
