"""grouped_conv2d as brt finds it: when its kernel is chosen, and gradients through it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from convs import PathCase, call_of, depthwise

import brt
import brt_kernels._plugin as plugin
from brt import plugins

MIXED = [
    PathCase(3, 8, (16, 16), 16, residual=True),
    PathCase(0, 4, (5, 5), 4),
    depthwise(2, 12, (10, 11), stride=2),
]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with plugins.using(plugin):
        yield


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Convolutions of cuDNN in float32, as what they are compared with."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    args = call_of(MIXED, "silu").mapped(lambda t: t.to(device, dtype)).args()
    with brt.ops.use("brt-kernels"):
        got = torch.ops.brt.grouped_conv2d(*args)
    with brt.ops.use("reference"):
        expected = torch.ops.brt.grouped_conv2d(*args)
    loose = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}  # rounded twice
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize(
    ("channels", "dtype", "chosen"),
    [
        (8, torch.float32, "brt-kernels"),
        (256, torch.float32, "torch-conv"),
        (8, torch.bfloat16, "brt-kernels"),
        (64, torch.bfloat16, "torch-conv"),
        (8, torch.float64, "torch-conv"),
    ],
    ids=str,
)
def test_the_faster_one_is_chosen_on_the_cpu(
    channels: int, dtype: torch.dtype, chosen: str
) -> None:
    case = PathCase(2, channels, (16, 16), channels)
    args = call_of([case, case]).mapped(lambda t: t.to(dtype)).args()
    explained = brt.ops.explain("grouped_conv2d", *args)
    assert explained.chosen == chosen
    assert (dtype == torch.float64) == ("takes float32, float16, bfloat16" in str(explained))


@pytest.mark.cuda
@pytest.mark.parametrize("cases", [[PathCase(2, 128, (14, 14), 64)] * 3], ids=["wide"])
def test_what_torch_computes_on_cuda_can_be_captured(cases: list[PathCase]) -> None:
    call = call_of(cases, "relu").mapped(lambda t: t.cuda())
    args = call.args()
    explained = brt.ops.explain("grouped_conv2d", *args)
    assert explained.chosen == "torch-conv"
    assert "to torch" in str(explained)
    torch.ops.brt.grouped_conv2d(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = torch.ops.brt.grouped_conv2d(*args)
    for x in call.x_P:
        x.normal_()
    graph.replay()
    with brt.ops.use("reference"):
        expected = torch.ops.brt.grouped_conv2d(*args)
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_other_dtypes_are_refused() -> None:
    x_P, weight_P, extras, convs, activation = call_of(MIXED).args()
    halves = [extras[0].half(), *extras[1:]]
    text = str(brt.ops.explain("grouped_conv2d", x_P, weight_P, halves, convs, activation))
    assert "takes one dtype, not torch.float32 and torch.float16" in text


def test_gradients_equal_the_reference(device: torch.device) -> None:
    def grads(kernel: str) -> list[torch.Tensor]:
        call = call_of(MIXED, "prelu").mapped(lambda t: t.to(device).requires_grad_())
        with brt.ops.use(kernel):
            made = torch.ops.brt.grouped_conv2d(*call.args())
            leaves = [*call.x_P, *call.weight_P, *call.extras]
            return list(torch.autograd.grad(sum(y.square().sum() for y in made), leaves))

    for a, b in zip(grads("brt-kernels"), grads("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums in another order
