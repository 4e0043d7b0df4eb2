from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from chains import ChainBuilder, plain_chain
from torch import Tensor

from brt_kernels.ops.conv_chain import conv_chain, conv_chain_pack

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(
    params=["avx2", "avx512", "avx512_bf16", pytest.param("cuda", marks=pytest.mark.cuda)]
)
def machine(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every instruction set of this CPU in turn, and the GPU."""
    if request.param == "cuda":
        yield CUDA
        return
    try:
        torch.ops.brt_kernels.use_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield CPU
    torch.ops.brt_kernels.use_isa("best")


def run(build: ChainBuilder, x: Tensor, offsets: Sequence[int], device: torch.device) -> Tensor:
    """The chain there; on a GPU in memory that held NaN before."""
    params, steps, step_offsets, scales = build.args()
    params = [p.to(device, x.dtype) for p in params]
    args = (x.to(device), torch.tensor(offsets, device=device), params)
    if device.type == "cuda":
        none = x[:0].float().cpu()
        shape = plain_chain(none, [0] * len(offsets), *build.args()).shape[1:]
        torch.full((x.shape[0], *shape), torch.nan, dtype=x.dtype, device=device)
    return conv_chain(*args, steps, step_offsets, scales).cpu()


def check(build: ChainBuilder, x: Tensor, offsets: list[int], device: torch.device = CPU) -> None:
    """As close to float64 as torch's own float32 convolutions are, within a factor of two."""
    params, steps, step_offsets, scales = build.args()
    got = run(build, x, offsets, device)
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
def test_sizes(size: tuple[int, int], machine: torch.device) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (3, 8), act=1)
    build.conv(1, 2, (8, 5), add=-1)
    build.end_branch()
    check(build, torch.randn(3, 3, *size), [0, 3], machine)


@pytest.mark.parametrize(
    "channels", [(1, 1), (3, 7), (8, 8), (12, 12), (16, 16), (20, 20), (13, 23), (32, 48)], ids=str
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_channels(channels: tuple[int, int], kernel: int, machine: torch.device) -> None:
    build = ChainBuilder()
    build.conv(0, 1, channels, kernel=kernel, bias=False)
    build.end_branch()
    check(build, torch.randn(2, channels[0], 9, 33), [0, 2], machine)


@pytest.mark.parametrize("size", [(32, 32), (7, 5), (16, 33), (8, 24)], ids=str)
@pytest.mark.parametrize("shuffle", [2, 3, 4])
def test_pixel_shuffle(shuffle: int, size: tuple[int, int], machine: torch.device) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (4, 3 * shuffle**2), shuffle=shuffle)
    build.conv(1, 2, (3, 2))
    build.end_branch()
    check(build, torch.randn(2, 4, *size), [0, 2], machine)


@pytest.mark.parametrize("slopes", [1, 6])
def test_activations_and_additions(slopes: int, machine: torch.device) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (6, 6), act=2, slopes=slopes)
    build.conv(1, 2, (6, 6), act=1, scale=0.1, add=0)
    build.conv(2, 1, (6, 6), add=1, post=1)
    build.conv(1, 3, (6, 6), add=0, scale=-2.0)
    build.end_branch()
    check(build, torch.randn(3, 6, 10, 18), [0, 3], machine)


def test_branches_of_different_widths_depths_and_loads(device: torch.device) -> None:
    build = ChainBuilder()
    for width, blocks in ((8, 0), (16, 2), (24, 3), (5, 1)):
        build.residual_branch(width, blocks, scale=0.3)
    check(build, torch.randn(9, 3, 16, 16), [0, 4, 4, 7, 8], device)


@pytest.mark.parametrize("width", [8, 12, 16, 20])
def test_error_of_deep_branches(width: int, machine: torch.device) -> None:
    build = ChainBuilder()
    build.conv(0, 1, (3, width))
    build.blocks(width, 20)
    build.end_branch()
    check(build, torch.randn(2, 3, 32, 32), [0, 2], machine)


def test_no_cells_and_empty_branches(device: torch.device) -> None:
    build = ChainBuilder()
    build.residual_branch(4, 1)
    build.residual_branch(8, 1)
    check(build, torch.randn(0, 3, 8, 8), [0, 0, 0], device)
    check(build, torch.randn(3, 3, 8, 8), [0, 0, 2], device)


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


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 8, 12, 16, 20, 32])
def test_halves_on_cuda_lose_no_more_than_torch(width: int, dtype: torch.dtype) -> None:
    """Images are rounded once a step there, by torch three times; compared as squares."""
    build = ChainBuilder()
    build.residual_branch(width, 6, scale=0.5)
    build.residual_branch(width, 1)
    params, steps, step_offsets, scales = build.args()
    params = [p.to(dtype) for p in params]
    x, offsets = torch.randn(5, 3, 16, 18).to(dtype), [0, 2, 4]
    got = run(build, x, offsets, CUDA)
    doubles = [p.double() for p in params]
    exact = plain_chain(x.double(), offsets, doubles, steps, step_offsets, scales)
    on_cuda = [p.to(CUDA) for p in params]
    plain = plain_chain(x.to(CUDA), offsets, on_cuda, steps, step_offsets, scales).cpu()
    assert got.dtype == dtype
    error, plain_error = ((t.double() - exact).square().mean().item() for t in (got, plain))
    assert error <= 1.2 * plain_error, (error, plain_error)


def upsampler(width: int, blocks: int) -> ChainBuilder:
    """Three images alive at a time, and a last step that is shuffled."""
    build = ChainBuilder()
    for _ in range(2):
        build.conv(0, 3, (3, width))
        build.conv(3, 2, (width, width), act=1)
        build.conv(2, 1, (width, width), add=3, scale=0.5)
        build.blocks(width, blocks, scale=0.5)
        build.conv(1, 2, (width, width), add=3)
        build.conv(2, 4, (width, 48), shuffle=4, act=2)
        build.end_branch()
    return build


@pytest.mark.parametrize("width", [8, 12, 20, 28])
def test_a_shuffled_result(width: int, device: torch.device) -> None:
    check(upsampler(width, 2), torch.randn(4, 3, 32, 32), [0, 1, 3], device)


def test_many_steps_weights_and_paths(device: torch.device) -> None:
    build = ChainBuilder()
    for _ in range(70):
        build.conv(0, 1, (2, 90))
        build.conv(1, 2, (90, 70), act=1, kernel=1)
        build.conv(2, 3, (70, 2), add=0)
        build.end_branch()
    offsets = [0] * 30 + [2] * 33 + [3] * 8
    check(build, torch.randn(4, 2, 6, 20), offsets, device)


def test_images_in_any_memory_layout(device: torch.device) -> None:
    build = upsampler(8, 1)
    x = torch.randn(3, 3, 9, 16, device=device)
    expected = run(build, x, [0, 1, 3], device)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(run(build, strided, [0, 1, 3], device), expected)
    every_second = torch.stack([x, x + 1], 1).flatten(0, 1)[::2]
    assert torch.equal(run(build, every_second, [0, 1, 3], device), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replays_with_other_loads(dtype: torch.dtype) -> None:
    build = ChainBuilder()
    for width in (8, 20, 12):
        build.residual_branch(width, 1, scale=0.5)
    params, *rest = build.args()
    params = [p.to(CUDA, dtype) for p in params]
    x, offsets = torch.randn(7, 3, 8, 20, device=CUDA).to(dtype), torch.zeros(4, device=CUDA).long()
    packed = conv_chain_pack(x, offsets, params, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = conv_chain(x, offsets, params, *rest, packed)
    for loads in ([0, 2, 4, 7], [0, 0, 7, 7], [0, 1, 1, 1], [0, 0, 0, 0], [0, 3, 5, 6]):
        offsets.copy_(torch.tensor(loads))
        x.copy_(torch.randn(x.shape))
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got.cpu(), run(build, x.cpu(), loads, CUDA)), loads


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_needs_packed_weights() -> None:
    build = upsampler(8, 1)
    params, *rest = build.args()
    params = [p.to(CUDA) for p in params]
    x, offsets = torch.randn(2, 3, 8, 8, device=CUDA), torch.tensor([0, 1, 2], device=CUDA)
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match="run it once before"),
    ):
        conv_chain(x, offsets, params, *rest)


@pytest.mark.cuda
def test_runs_on_the_current_stream() -> None:
    build = upsampler(12, 4)
    x = torch.randn(40, 3, 32, 32)
    expected = run(build, x, [0, 17, 38], CUDA)
    params, *rest = build.args()
    params = [p.to(CUDA) for p in params]
    held = x.to(CUDA)
    offsets = torch.tensor([0, 17, 38], device=CUDA)
    packed = conv_chain_pack(held, offsets, params, *rest)
    late = torch.zeros_like(held)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(held)
        got = conv_chain(late, offsets, params, *rest, packed)
    stream.synchronize()
    assert torch.equal(got.cpu(), expected)


def test_packed_weights_give_the_same_bits(device: torch.device) -> None:
    build = ChainBuilder()
    build.residual_branch(12, 3)
    params, *rest = build.args()
    params = [p.to(device) for p in params]
    x, offsets = torch.randn(2, 3, 32, 32, device=device), torch.tensor([0, 2], device=device)
    packed = conv_chain_pack(x, offsets, params, *rest)
    assert torch.equal(
        conv_chain(x, offsets, params, *rest, packed), conv_chain(x, offsets, params, *rest)
    )
    with pytest.raises(RuntimeError, match="conv_chain_pack"):
        conv_chain(x, offsets, params, *rest, packed[1:])


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
