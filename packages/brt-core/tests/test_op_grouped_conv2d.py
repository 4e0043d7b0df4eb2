"""`grouped_conv2d` against a torch convolution for each path; gradients, fake kernel and errors.

Legend: P paths, R rows of a path, C O channels in and out, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from core_cases import close
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import ops
from brt.path_conv import CONV_ACTIVATIONS

KERNELS = ("reference", "torch-conv")


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Convolutions of cuDNN in float32, as what they are compared with."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@dataclass(frozen=True)
class PathCase:
    """The sizes of one path."""

    rows: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    bias: bool = True
    residual: bool = False


CASES = {
    "one": [PathCase(2, 3, (6, 5), 4)],
    "one-row": [PathCase(1, 3, (6, 5), 4, residual=True)],
    "no-rows": [PathCase(0, 3, (6, 5), 4), PathCase(0, 2, (4, 4), 2, residual=True)],
    "pixels": [PathCase(3, 2, (1, 1), 3, kernel=1, padding=0), PathCase(2, 2, (1, 1), 3)],
    "mixed": [
        PathCase(2, 4, (7, 9), 6, stride=2, residual=True),
        PathCase(0, 2, (5, 5), 3),
        PathCase(1, 3, (5, 3), 3, groups=3, bias=False),
        PathCase(3, 4, (4, 6), 2, kernel=1, padding=0, residual=True),
        PathCase(1, 4, (9, 8), 8, kernel=5, padding=2, groups=2, stride=2),
    ],
}


class Call:
    """The arguments of one call, in the order in which their gradients are compared."""

    def __init__(
        self, name: str, activation: str, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        made = torch.Generator().manual_seed(0)
        self.cases, self.activation = CASES[name], activation

        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype)

        self.x, self.weight, self.bias, self.residual, self.slope = [], [], [], [], []
        for i, c in enumerate(self.cases):
            self.x.append(tensor(c.rows, c.channels, *c.size))
            inside = c.channels // c.groups
            self.weight.append(tensor(c.out_channels, inside, c.kernel, c.kernel) / 3)
            self.bias.append(tensor(c.out_channels) if c.bias else None)
            height, width = ((n + 2 * c.padding - c.kernel) // c.stride + 1 for n in c.size)
            shape = (c.rows, c.out_channels, height, width)
            self.residual.append(tensor(*shape) if c.residual else None)
            self.slope.append(tensor(c.out_channels if i % 2 else 1))

    def leaves(self) -> list[Tensor]:
        slopes = self.slope if self.activation == "prelu" else []
        lists = (self.x, self.weight, self.bias, self.residual, slopes)
        return [t for part in lists for t in part if t is not None]

    def run(self) -> list[Tensor]:
        return ops.grouped_conv2d(
            *(self.x, self.weight, self.bias, self.residual),
            self.slope if self.activation == "prelu" else None,
            [c.stride for c in self.cases],
            [c.padding for c in self.cases],
            [c.groups for c in self.cases],
            self.activation,
        )

    def plain(self) -> list[Tensor]:
        made = []
        for i, c in enumerate(self.cases):
            y = F.conv2d(self.x[i], self.weight[i], self.bias[i], c.stride, c.padding, 1, c.groups)
            y = y if self.residual[i] is None else y + self.residual[i]
            made.append(activated(y, self.activation, self.slope[i]))
        return made


def activated(y: Tensor, activation: str, slope: Tensor) -> Tensor:
    if activation == "prelu":
        return F.prelu(y, slope)
    return {"none": lambda y: y, "relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu}[
        activation
    ](y)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_equals_a_convolution_of_each_path(
    name: str, activation: str, dtype: torch.dtype, kernel: str, device: torch.device
) -> None:
    call = Call(name, activation, dtype, device)
    with ops.use(kernel):
        made = call.run()
    for p, (a, b) in enumerate(zip(made, call.plain(), strict=True)):
        assert a.is_contiguous()
        close(a, b, f"{name}, path {p}", factor=2)


@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("apart", [True, False], ids=["function", "operator"])
def test_gradients_equal_those_of_the_convolutions(
    name: str, activation: str, apart: bool, device: torch.device
) -> None:
    """Of the function, which keeps the activation apart, and of the operator, which does not."""
    call = Call(name, activation, torch.float64, device)
    leaves = [t.requires_grad_() for t in call.leaves()]
    made = call.run() if apart else torch.ops.brt.grouped_conv2d(*flat(call))
    fused = "grouped_conv2d" in made[0].grad_fn.name()
    assert fused == (activation == "none" or not apart)
    weights = [torch.randn_like(y) for y in made]
    came = torch.autograd.grad(made, leaves, weights)
    wanted = torch.autograd.grad(call.plain(), leaves, weights)
    for a, b in zip(came, wanted, strict=True):
        close(a, b)


def flat(call: Call) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], str]:
    """The arguments of the operator itself."""
    extras: list[Tensor] = []
    convs: list[int] = []
    for i, c in enumerate(call.cases):
        for t in (call.bias[i], call.residual[i], call.slope[i]):
            convs.append(-1 if t is None else len(extras))
            extras += [] if t is None else [t]
        convs += [c.stride, c.padding, c.groups]
    return call.x, call.weight, extras, convs, call.activation


@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    call = Call("mixed", activation, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in call.leaves()]
    torch.autograd.gradcheck(lambda *_: tuple(call.run()), leaves, fast_mode=True)
    args = flat(call)
    torch.autograd.gradcheck(
        lambda *_: tuple(torch.ops.brt.grouped_conv2d(*args)), leaves, fast_mode=True
    )


def test_second_derivatives() -> None:
    call = Call("one", "silu", torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in call.leaves()]
    torch.autograd.gradgradcheck(lambda *_: tuple(call.run()), leaves, fast_mode=True)


def test_an_extra_tensor_of_several_paths(device: torch.device) -> None:
    x, weight = torch.randn(2, 3, 4, 4, device=device), torch.randn(5, 3, 3, 3, device=device)
    bias = torch.randn(5, device=device, requires_grad=True)
    convs = [0, -1, -1, 1, 1, 1] * 2
    made = torch.ops.brt.grouped_conv2d([x, 2 * x], [weight, weight], [bias], convs, "relu")
    sum(y.sum() for y in made).backward()
    wanted = sum((y > 0).sum((0, 2, 3)) for y in made)
    close(bias.grad, wanted.to(bias.dtype))


def test_only_what_is_needed_is_differentiated(device: torch.device) -> None:
    call = Call("mixed", "none", torch.float32, device)
    call.weight[0].requires_grad_()
    made = call.run()
    (grad,) = torch.autograd.grad(made[0].sum(), [call.weight[0]])
    assert grad.shape == call.weight[0].shape
    assert all(t.grad is None for t in call.leaves())


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, device: torch.device) -> None:
    for activation in ("none", "prelu"):
        call = Call(name, activation, torch.float32, device)
        torch.library.opcheck(torch.ops.brt.grouped_conv2d, flat(call))
        for t in call.leaves():
            t.requires_grad_()
        torch.library.opcheck(torch.ops.brt.grouped_conv2d, flat(call))


@pytest.fixture
def _compiled_often() -> Iterator[None]:
    """All cases count as compilations of one function."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu", "prelu"])
@pytest.mark.usefixtures("_compiled_often")
def test_compiles(activation: str, dynamic: bool, device: torch.device) -> None:
    call = Call("mixed", activation, torch.float32, device)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def run(x: list[Tensor], weight: list[Tensor]) -> list[Tensor]:
        call.x, call.weight = x, weight
        return call.run()

    x, weight = call.x, call.weight
    with torch.no_grad():
        for a, b in zip(run(x, weight), call.plain(), strict=True):
            close(a, b, factor=10)
    leaves = [t.requires_grad_() for t in weight]
    made = run(x, weight)
    came = torch.autograd.grad(sum(y.sum() for y in made), leaves)
    wanted = torch.autograd.grad(sum(y.sum() for y in call.plain()), leaves)
    for a, b in zip(came, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_as_modules_with_folded_batch_norm(device: torch.device) -> None:
    """A block as networks have it: convolution, batch norm, addition, ReLU."""
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    block = nn.Sequential(conv, norm).eval().to(device)
    folded = nn.utils.fuse_conv_bn_eval(*block)
    x = torch.randn(2, 4, 6, 6, device=device)
    with torch.no_grad():
        (y,) = ops.grouped_conv2d(
            [x], [folded.weight], [folded.bias], [x], padding=1, activation="relu"
        )
        torch.testing.assert_close(y, F.relu(block(x) + x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_layouts(kernel: str, device: torch.device) -> None:
    call = Call("mixed", "relu", torch.float32, device)
    wanted = call.run()
    for change in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        call = Call("mixed", "relu", torch.float32, device)
        call.x, call.weight = [change(t) for t in call.x], [change(t) for t in call.weight]
        with ops.use(kernel):
            made = call.run()
        for a, b in zip(made, wanted, strict=True):
            assert a.is_contiguous()
            close(a, b, kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """As `nn.Conv2d`: in the autocast dtype, gradients in the dtype of what they are of."""
    call = Call("mixed", "prelu", torch.float32, device)
    leaves = [t.requires_grad_() for t in call.leaves()]
    with torch.autocast(device.type, dtype=dtype):
        made = call.run()
    assert {y.dtype for y in made} == {dtype}
    for a, b in zip(made, call.plain(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=5e-2, atol=5e-2)
    grads = torch.autograd.grad(sum(y.float().sum() for y in made), leaves)
    assert {g.dtype for g in grads} == {torch.float32}
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
        assert {y.dtype for y in call.run()} == {dtype}


def test_two_calls_do_not_alias(device: torch.device) -> None:
    call = Call("pixels", "none", torch.float32, device)
    first = call.run()
    kept = [y.clone() for y in first]
    call.x = [2 * x for x in call.x]
    call.run()
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (([], []), {}, "at least one path, got 0, 0 and 0"),
        (([X], [W, W]), {}, "at least one path, got 1, 2 and 1"),
        (([X], [W], [None, None]), {}, "1 paths have 2 biases"),
        (([X], [W], None, []), {}, "1 paths have 0 residuals"),
        (([X], [W], None, None, []), {"activation": "prelu"}, "1 paths have 0 slopes"),
        (([X], [W]), {"stride": [1, 1]}, "1 paths have 2 strides"),
        (([X], [W]), {"padding": []}, "1 paths have 0 paddings"),
        (([X], [W]), {"groups": [1, 1]}, "1 paths have 2 groups"),
        (([X[0]], [W]), {}, r"path 0: expected x \[R, C, H, W\].*got \[4, 5, 5\] and \[6, 4"),
        (([X], [W[..., :2]]), {}, r"got \[2, 4, 5, 5\] and \[6, 4, 3, 2\]"),
        (([X], [W[0]]), {}, r"and \[4, 3, 3\]"),
        (([X], [W[:, :3]]), {}, "path 0: channels of x and of weight .* got 4 and 3"),
        (([X], [W]), {"groups": 4}, "4 groups do not divide 4 channels in and 6 out"),
        (([X], [W]), {"groups": 0}, "got 1, 0 and 0"),
        (([X], [W]), {"stride": 0}, "got 0, 1 and 0"),
        (([X], [W]), {"padding": 3}, "padding from 0 to 2, got 1, 1 and 3"),
        (([X[..., :2]], [W]), {}, "a kernel of 3 with padding 0 is larger than x"),
        (([X], [W.double()]), {}, "one floating dtype, got torch.float32, torch.float64"),
        (([X, X.half()], [W, W]), {}, "got torch.float16, torch.float32"),
        (([X.long()], [W.long()]), {}, "one floating dtype, got torch.int64"),
        (([X], [W], [X[0, 0, 0]]), {}, r"bias must be \[6\], got \[5\]"),
        (([X], [W], None, [X]), {"padding": 1}, "dim 1 of residual and result .* got 4 and 6"),
        (([X], [W], None, [X[0]]), {}, r"residual must be \(2, 6, 3, 3\), got \[4, 5, 5\]"),
        (([X], [W]), {"activation": "prelu"}, "prelu needs a slope"),
        (
            ([X], [W], None, None, [X[0, 0, 0]]),
            {"activation": "prelu"},
            r"slope must be \[1\] or \[6\], got \[5\]",
        ),
        (([X], [W], None, None, [X[0, 0, 0]]), {}, "slopes are for activation 'prelu', got 'none'"),
        (([X], [W]), {"activation": "gelu"}, "activation 'gelu'; there are none, relu"),
        (([X], [W.to("meta")]), {}, "different devices"),
    ],
    ids=str,
)
def test_bad_arguments(args: tuple, settings: dict, message: str) -> None:
    with pytest.raises(brt.RouteError, match=message):
        ops.grouped_conv2d(*args, **settings)


def test_explained_for_lists(device: torch.device) -> None:
    call = Call("one", "none", torch.float32, device)
    explained = ops.explain("grouped_conv2d", *flat(call))
    assert explained.chosen == "torch-conv"
    assert "[float32[2, 3, 6, 5]" in str(explained)
