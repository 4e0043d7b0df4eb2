"""Every CUDA operator of this package once, on small inputs: what compute-sanitizer watches.

python each_operator.py [NAME ...]     those named, or all; --list says which there are

Legend: N cells, K choices, R rows, P paths, D H features, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from brt_kernels._load import load

ops = torch.ops.brt_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# They compute nothing on a device
NO_WORK = {"use_isa", "cuda_refusal", "device_error", "error_word", "conv_chain_plan"}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers on the GPU."""
    return (torch.randn(shape) * 0.3).to(dtype).cuda()


def routed(num_cells: int = 300, num_paths: int = 5, k: int = 2) -> tuple[Tensor, ...]:
    """A route: cell_R, slot_R, row_NK, offsets_P1."""
    choice_NK = torch.rand(num_cells, num_paths).topk(k).indices.cuda()
    return ops.route(choice_NK, num_paths, None, None, 0, 4)


def route() -> None:
    """In one launch and in two, with capacities, priorities and groups."""
    for num_cells, num_paths, k in ((1, 3, 1), (1000, 70, 3), (100_000, 9, 4)):
        choice = torch.randint(-1, num_paths, (num_cells, k)).cuda()
        ops.route(choice, num_paths)
        ops.route(choice.int(), num_paths, [5], random(num_cells), 0, 8)
        ops.route(choice, num_paths, [2] * num_paths, None, 7, 1)


def route_mask() -> None:
    """Of booleans and integers."""
    mask = torch.rand(900, 30).cuda() < 0.2
    ops.route_mask(mask)
    ops.route_mask(mask.int(), [6], None, 0, 3)


def dispatch() -> None:
    """Wide rows, narrow ones, weighted ones."""
    cell_R, _, row_NK, _ = routed()
    for dtype in DTYPES:
        for width in (64, 7):
            x_ND = random(300, width, dtype=dtype)
            ops.dispatch(x_ND, cell_R, row_NK)
            ops.dispatch(x_ND, cell_R, row_NK, random(cell_R.shape[0]))


def combine() -> None:
    """Wide rows, narrow ones, weighted ones."""
    cell_R, _, row_NK, _ = routed()
    for dtype in DTYPES:
        for width in (64, 7):
            rows_RD = random(cell_R.shape[0], width, dtype=dtype)
            ops.combine(rows_RD, row_NK, cell_R)
            ops.combine(rows_RD, row_NK, cell_R, random(cell_R.shape[0]))


def row_dot() -> None:
    """The gradient of row weights."""
    cell_R, _, row_NK, _ = routed()
    for dtype in DTYPES:
        ops.row_dot(
            random(cell_R.shape[0], 65, dtype=dtype), random(300, 65, dtype=dtype), cell_R, row_NK
        )


def compact() -> None:
    """More cells than a block takes."""
    ops.compact(torch.rand(20_000).cuda() < 0.5)


def grouped_linear() -> None:
    """On tensor cores and without."""
    for dtype in DTYPES:
        for num_in, num_out in ((64, 72), (31, 13)):
            x, offsets = random(90, num_in, dtype=dtype), torch.tensor([0, 3, 3, 80]).cuda()
            weight, bias = random(3, num_out, num_in, dtype=dtype), random(3, num_out, dtype=dtype)
            ops.grouped_linear(x, offsets, weight, bias, "gelu")


def grouped_outer() -> None:
    """On tensor cores and without."""
    for dtype in DTYPES:
        for num_x, num_y in ((64, 72), (31, 13)):
            offsets = torch.tensor([0, 3, 3, 80]).cuda()
            ops.grouped_outer(
                random(90, num_y, dtype=dtype), random(90, num_x, dtype=dtype), offsets
            )


def expert_mlp() -> None:
    """Gated and not."""
    cell_R, _, row_NK, offsets = routed()
    for dtype in DTYPES:
        for activation, rows in (("relu", 48), ("swiglu", 96)):
            ops.expert_mlp(
                random(300, 32, dtype=dtype), cell_R, row_NK, offsets, random(cell_R.shape[0]),
                random(5, rows, 32, dtype=dtype), random(5, rows, dtype=dtype),
                random(5, 32, 48, dtype=dtype), None, activation,
            )  # fmt: skip


def grouped_conv2d() -> None:
    """3x3, 1x1, strides, depthwise."""
    for dtype in DTYPES:
        shapes = [((2, 8, 9, 9), (12, 8, 3, 3)), ((3, 8, 5, 5), (8, 8, 1, 1)),
                  ((2, 12, 8, 8), (12, 1, 3, 3))]  # fmt: skip
        x_P = [random(*x, dtype=dtype) for x, _ in shapes]
        weight_P = [random(*w, dtype=dtype) for _, w in shapes]
        convs = [0, -1, -1, 1, 1, 1, -1, -1, -1, 1, 0, 1, -1, -1, -1, 2, 1, 12]
        ops.grouped_conv2d(x_P, weight_P, [random(12, dtype=dtype)], convs, "relu")


def chain(
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor], list[int], list[int], list[float]]:
    """Arguments of a chain of two branches of two steps."""
    params = [
        random(6, 6, 3, 3, dtype=dtype),
        random(6, dtype=dtype),
        random(24, 6, 1, 1, dtype=dtype),
    ]
    steps = [0, 1, -1, 0, 1, -1, 1, 0, 1, 1, 2, -1, 2, -1, -1, 0, 0, 2] * 2
    offsets = torch.tensor([0, 2, 4]).cuda()
    return random(5, 6, 9, 17, dtype=dtype), offsets, params, steps, [0, 2, 4], [1.0] * 4


def conv_chain() -> None:
    """Packing, and the one launch."""
    for dtype in DTYPES:
        ops.conv_chain(*chain(dtype))


def conv_chain_pack() -> None:
    """Packing alone."""
    ops.conv_chain_pack(*chain(torch.float16))


def conv_chain_planned() -> None:
    """The one launch, of a plan."""
    x, offsets, *rest = chain(torch.bfloat16)
    plan = [int(word) for word in ops.conv_chain_plan(x, offsets, *rest).split()]
    packed = ops.conv_chain_pack(x, offsets, *rest)
    assert torch.equal(
        ops.conv_chain_planned(x, offsets, packed, plan), ops.conv_chain(x, offsets, *rest)
    )


CASES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        route, route_mask, dispatch, combine, row_dot, compact, grouped_linear, grouped_outer,
        expert_mlp, grouped_conv2d, conv_chain, conv_chain_pack, conv_chain_planned,
    )
}  # fmt: skip


def operators() -> set[str]:
    """Names of those that have a CUDA kernel."""
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name for s in schemas if s.name.startswith("brt_kernels::")}
    found = torch._C._dispatch_has_kernel_for_dispatch_key
    short = {n.partition("::")[2] for n in names if found(n, "CUDA")}
    return {n for n in short - NO_WORK if not n.startswith("conditional_")}  # part of a capture


def main() -> None:
    """Run those that are named."""
    load()
    torch.manual_seed(0)
    if without := operators() ^ set(CASES):
        raise SystemExit(f"not of this package, or without a case: {', '.join(sorted(without))}")
    if "--list" in sys.argv:
        sys.stdout.write(" ".join(CASES) + "\n")
        return
    for name in sys.argv[1:] or CASES:
        CASES[name]()
        torch.cuda.synchronize()
        found = ops.device_error(torch.cuda.current_device(), True)
        if found:
            raise SystemExit(f"{name}: {found}")
        sys.stdout.write(f"{name} ran\n")


if __name__ == "__main__":
    main()
