from __future__ import annotations

import pytest
import torch
from chains import ChainBuilder, plain_chain
from torch import Tensor

from brt_kernels.ops.conv_chain import conv_chain, conv_chain_pack


def check(build: ChainBuilder, x: Tensor, offsets: list[int]) -> None:
    """As close to float64 as torch's own float32 convolutions are, within a factor of two."""
    params, steps, step_offsets, scales = build.args()
    got = conv_chain(x, torch.tensor(offsets), params, steps, step_offsets, scales)
    exact = plain_chain(
        x.double(), offsets, [p.double() for p in params], steps, step_offsets, scales
    )
    plain = plain_chain(x, offsets, params, steps, step_offsets, scales)
    assert got.shape == exact.shape
    if exact.numel():
        error, plain_error = ((t - exact).abs().max().item() for t in (got, plain))
        assert error <= 2 * plain_error + 1e-6 * exact.abs().max().item(), (error, plain_error)


@pytest.mark.parametrize(
    "size", [(32, 32), (1, 1), (2, 3), (4, 2), (5, 31), (33, 17), (7, 64), (16, 70)], ids=str
)
def test_sizes(size: tuple[int, int], isa: str) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (3, 8), act=1)
    build.conv(1, 2, (8, 5), add=-1)
    build.end_branch()
    check(build, torch.randn(3, 3, *size), [0, 3])


@pytest.mark.parametrize(
    "channels", [(1, 1), (3, 7), (8, 8), (12, 12), (16, 16), (20, 20), (13, 23), (32, 48)], ids=str
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_channels(channels: tuple[int, int], kernel: int, isa: str) -> None:
    build = ChainBuilder()
    build.conv(0, 1, channels, kernel=kernel, bias=False)
    build.end_branch()
    check(build, torch.randn(2, channels[0], 9, 33), [0, 2])


@pytest.mark.parametrize("size", [(32, 32), (7, 5), (16, 33), (8, 24)], ids=str)
@pytest.mark.parametrize("shuffle", [2, 3, 4])
def test_pixel_shuffle(shuffle: int, size: tuple[int, int], isa: str) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (4, 3 * shuffle**2), shuffle=shuffle)
    build.conv(1, 2, (3, 2))
    build.end_branch()
    check(build, torch.randn(2, 4, *size), [0, 2])


@pytest.mark.parametrize("slopes", [1, 6])
def test_activations_and_additions(slopes: int, isa: str) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (6, 6), act=2, slopes=slopes)
    build.conv(1, 2, (6, 6), act=1, scale=0.1, add=0)
    build.conv(2, 1, (6, 6), add=1, post=1)
    build.conv(1, 3, (6, 6), add=0, scale=-2.0)
    build.end_branch()
    check(build, torch.randn(3, 6, 10, 18), [0, 3])


def test_branches_of_different_widths_depths_and_loads() -> None:
    build = ChainBuilder()
    for width, blocks in ((8, 0), (16, 2), (24, 3), (5, 1)):
        build.residual_branch(width, blocks, scale=0.3)
    check(build, torch.randn(9, 3, 16, 16), [0, 4, 4, 7, 8])


@pytest.mark.parametrize("width", [8, 12, 16, 20])
def test_error_of_deep_branches(width: int, isa: str) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (3, width))
    build.blocks(width, 20)
    build.end_branch()
    check(build, torch.randn(2, 3, 32, 32), [0, 2])


def test_no_cells_and_empty_branches() -> None:
    build = ChainBuilder()
    build.residual_branch(4, 1)
    build.residual_branch(8, 1)
    check(build, torch.randn(0, 3, 8, 8), [0, 0, 0])
    check(build, torch.randn(3, 3, 8, 8), [0, 0, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_compute_in_float32(dtype: torch.dtype) -> None:
    build = ChainBuilder()
    build.residual_branch(8, 2)
    params, steps, step_offsets, scales = build.args()
    x, offsets = torch.randn(2, 3, 16, 16).to(dtype), torch.tensor([0, 2])
    params = [p.to(dtype) for p in params]
    got = conv_chain(x, offsets, params, steps, step_offsets, scales)
    exact = plain_chain(
        x.double(), [0, 2], [p.double() for p in params], steps, step_offsets, scales
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype), rtol=2e-2, atol=2e-3)


def test_packed_weights_give_the_same_bits() -> None:
    build = ChainBuilder()
    build.residual_branch(12, 3)
    x, offsets = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    packed = conv_chain_pack(x, offsets, *build.args())
    assert torch.equal(
        conv_chain(x, offsets, *build.args(), packed), conv_chain(x, offsets, *build.args())
    )
    with pytest.raises(RuntimeError, match="conv_chain_pack"):
        conv_chain(x, offsets, *build.args(), packed[1:])


def test_fake_agrees_with_the_schema() -> None:
    build = ChainBuilder()
    build.residual_branch(4, 1)
    args = (torch.randn(2, 3, 8, 8), torch.tensor([0, 2]), *build.args())
    torch.library.opcheck(torch.ops.brt_kernels.conv_chain.default, args)


def simple(**changes: object) -> list[object]:
    """The arguments of one small step, with some replaced."""
    fields = {
        "x": torch.randn(2, 3, 8, 8),
        "offsets": torch.tensor([0, 2]),
        "params": [torch.randn(4, 3, 3, 3)],
        "steps": [0, 1, -1, 0, -1, -1, 0, 0, 1],
        "step_offsets": [0, 1],
        "scales": [1.0],
    }
    return list((fields | changes).values())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.randn(3, 8, 8)}, "4-D"),
        ({"x": torch.randn(2, 3, 8, 8).double()}, "float64"),
        ({"x": torch.randn(2, 4, 8, 8)}, "a weight of 3 channels"),
        ({"offsets": torch.tensor([0, 3])}, "got 3 at position 1"),
        ({"offsets": torch.tensor([2, 1])}, "offsets_P1 must rise"),
        ({"offsets": torch.tensor([0])}, "at least one branch"),
        ({"params": []}, "names parameters"),
        ({"params": [torch.randn(4, 3, 5, 5)]}, r"\[O, I, 3, 3\]"),
        ({"steps": [0, 1, -1, 0]}, "9 numbers"),
        ({"steps": [2, 1, -1, 0, -1, -1, 0, 0, 1]}, "reads register 2"),
        ({"steps": [0, 0, -1, 0, -1, -1, 0, 0, 1]}, "must write a register"),
        ({"steps": [0, 99, -1, 0, -1, -1, 0, 0, 1]}, "must write a register"),
        ({"steps": [0, 1, 0, 0, -1, -1, 0, 0, 1]}, "adds register 0"),
        ({"steps": [0, 1, -1, 0, 0, -1, 0, 0, 1]}, "its bias"),
        ({"steps": [0, 1, -1, 0, -1, -1, 2, 0, 1]}, "act 2"),
        ({"steps": [0, 1, -1, 0, -1, -1, 0, 2, 1]}, "post"),
        ({"steps": [0, 1, -1, 0, -1, -1, 0, 0, 3]}, "shuffle 3"),
        ({"step_offsets": [0, 2]}, "step_offsets_P1"),
        ({"scales": []}, "scales"),
    ],
    ids=str,
)
def test_bad_input_is_an_exception(changes: dict[str, object], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        conv_chain(*simple(**changes))
