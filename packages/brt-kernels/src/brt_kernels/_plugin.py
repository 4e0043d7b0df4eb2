"""What brt finds here, by its hook: one kernel an operator and device. Only this file knows brt.

Legend: R rows, I O D H features, P paths.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import brt
from brt import KernelSpec, checks
from brt.passes import conditional
from brt.path_conv import conv_works
from brt_kernels._load import load
from brt_kernels._packed import PackedWeights, Same
from brt_kernels.ops import register_all_fakes
from brt_kernels.triton import choice

NAME = "brt-kernels"
TRITON_NAME = "brt-triton"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, torch.int8, *INDICES)

# Rough rates, for the choice between kernels: what moves, and what is computed, in a microsecond.
BYTES_PER_US = {"cpu": 15_000.0, "cuda": 2_000_000.0}
# On an H200 torch's own grouped product (20 us, 2e8) is the faster one in bfloat16, at every size.
FLOPS_PER_US = {"cpu": 150_000.0, "cuda": 120_000_000.0}
PRODUCT_US = {"cpu": 4.0, "cuda": 25.0}
OVERHEAD_US = 4.0
# Direct convolutions, of a path with many channels: torch's are faster above about 64 on the CPU.
CONV_FLOPS_PER_US = {"cpu": 85_000.0, "cuda": 10_000_000.0}
CONV_US = {"cpu": 3.0, "cuda": 1.0}


def _floats(tensor: Tensor) -> str | None:
    return (
        None if tensor.dtype in FLOATS else f"takes float32, float16, bfloat16, not {tensor.dtype}"
    )


def _route_refuses(choice_NK: Tensor, *_: Any) -> str | None:
    return None if choice_NK.dtype in INDICES else f"takes int32 and int64, not {choice_NK.dtype}"


def _mask_refuses(mask: Tensor, *_: Any) -> str | None:
    return None if mask.dtype in MASKS else f"takes bool and integers, not {mask.dtype}"


def _indices(*tensors: Tensor) -> str | None:
    bad = next((t for t in tensors if t.dtype not in INDICES), None)
    return None if bad is None else f"takes int32 and int64 indices, not {bad.dtype}"


def _dispatch_refuses(
    x: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None
) -> str | None:
    if weight_R is None:
        known = x.dtype in FLOATS or x.dtype in MASKS
        return _indices(cell_R, row_NK) if known else f"does not move {x.dtype}"
    return _floats(x) or _floats(weight_R) or _indices(cell_R, row_NK)


def _combine_refuses(
    rows: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None
) -> str | None:
    return (
        _floats(rows)
        or (None if weight_R is None else _floats(weight_R))
        or _indices(row_NK, cell_R)
    )


def _row_dot_refuses(rows: Tensor, cells: Tensor, cell_R: Tensor, row_NK: Tensor) -> str | None:
    return _floats(rows) or _same(rows, cells) or _indices(cell_R, row_NK)


def _same(first: Tensor, *others: Tensor | None) -> str | None:
    bad = next((t for t in others if t is not None and t.dtype != first.dtype), None)
    return None if bad is None else f"takes one dtype, not {first.dtype} and {bad.dtype}"


def _linear_refuses(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, _: str
) -> str | None:
    return _floats(x) or _same(x, weight, bias) or _indices(offsets)


def _outer_refuses(y: Tensor, x: Tensor, offsets: Tensor) -> str | None:
    return _floats(x) or _same(x, y) or _indices(offsets)


def _mlp_refuses(*args: Any) -> str | None:
    x, cell_R, row_NK, offsets, weight_R, *weights, _ = args
    return (
        _floats(x)
        or _same(x, *weights)
        or (None if weight_R is None else _floats(weight_R))
        or _indices(cell_R, row_NK, offsets)
    )


class _ChainFacts(NamedTuple):
    dtypes: frozenset[torch.dtype]
    numel: int
    widest: int  # channels that a convolution reads


_chain_facts: PackedWeights[_ChainFacts] = PackedWeights(values=False)


def _facts_of(params: Sequence[Tensor]) -> _ChainFacts:
    """What the choice asks of thousands of parameters, in every call."""

    def look() -> _ChainFacts:
        widest = max((p.shape[1] for p in params if p.ndim == 4), default=0)
        dtypes = frozenset(p.dtype for p in params)
        return _ChainFacts(dtypes, sum(p.numel() for p in params), widest)

    return _chain_facts.get(params, None, look)


def _chain_refuses(
    x_RCHW: Tensor, offsets: Tensor, params: Sequence[Tensor], *_: Any
) -> str | None:
    others = sorted(map(str, _facts_of(params).dtypes.difference(FLOATS)))
    return _floats(x_RCHW) or (
        f"takes float32, float16, bfloat16, not {', '.join(others)}" if others else None
    )


def _conv2d_refuses(
    x_P: Sequence[Tensor], weight_P: Sequence[Tensor], extras: Sequence[Tensor], *_: Any
) -> str | None:
    return _floats(x_P[0]) or _same(x_P[0], *x_P, *weight_P, *extras)


def _moving(device: str) -> Callable[..., float]:
    rate = BYTES_PER_US[device]

    def estimate(*args: Any) -> float:
        size = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
        return OVERHEAD_US + size / rate

    return estimate


def _linear(device: str) -> Callable[..., float]:
    rate = FLOPS_PER_US[device]

    def estimate(x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, *_: Any) -> float:
        return (
            PRODUCT_US[device]
            + 2 * x_RI.shape[0] * weight_POI.shape[1] * weight_POI.shape[2] / rate
        )

    return estimate


# Of grouped_outer, measured on an H200: tensor cores, and plain multiply-adds in whole tiles
OUTER_US = 5.0
OUTER_FLOPS_PER_US = 4.4e8
OUTER_BYTES_PER_US = 2.4e6
OUTER_PLAIN_FLOPS_PER_US = 1.7e7
OUTER_PLAIN_TILE = 64


def _cuda_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> float:
    (num_rows, num_y), num_x = y_RO.shape, x_RI.shape[1]
    made = (offsets_P1.shape[0] - 1) * num_y * num_x * x_RI.element_size() / OUTER_BYTES_PER_US
    if x_RI.element_size() == 2 and num_y % 8 == 0 and num_x % 8 == 0:
        return OUTER_US + made + 2 * num_rows * num_y * num_x / OUTER_FLOPS_PER_US
    tiles = -(-num_y // OUTER_PLAIN_TILE) * -(-num_x // OUTER_PLAIN_TILE)
    flops = 2 * num_rows * tiles * OUTER_PLAIN_TILE**2
    return OUTER_US + made + flops / OUTER_PLAIN_FLOPS_PER_US


def _outer(device: str) -> Callable[..., float]:
    if device == "cuda":
        return _cuda_outer
    rate = FLOPS_PER_US[device]

    def estimate(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> float:
        return PRODUCT_US[device] + 2 * x_RI.shape[0] * x_RI.shape[1] * y_RO.shape[1] / rate

    return estimate


def _mlp(device: str) -> Callable[..., float]:
    rate = FLOPS_PER_US[device]

    def estimate(*args: Any) -> float:
        num_rows, up_PHD, down_PDH = args[1].shape[0], args[5], args[7]
        size = up_PHD.shape[1] * up_PHD.shape[2] + down_PDH.shape[1] * down_PDH.shape[2]
        return 3 * PRODUCT_US[device] + 2 * num_rows * size / rate

    return estimate


def _chain(device: str) -> Callable[..., float]:
    rate = FLOPS_PER_US[device]

    def estimate(x_RCHW: Tensor, offsets_P1: Tensor, params: Sequence[Tensor], *_: Any) -> float:
        weights = _facts_of(params).numel / max(1, offsets_P1.shape[0] - 1)
        return 10 * OVERHEAD_US + 2 * weights * x_RCHW[:, 0].numel() / rate

    return estimate


def _conv2d(device: str) -> Callable[..., float]:
    rate, overhead = CONV_FLOPS_PER_US[device], CONV_US[device]

    def estimate(
        x_P: Sequence[Tensor], weight_P: Sequence[Tensor], _: Any, convs: Sequence[int], *__: Any
    ) -> float:
        time = PRODUCT_US[device] + overhead * len(x_P)
        for flops, channels in conv_works(x_P, weight_P, convs):
            time += flops * (1 + 4 / channels) / rate  # few channels: more is read for each product
        return time

    return estimate


_packed_chains: PackedWeights[Tensor] = PackedWeights()
_planned_chains: PackedWeights[tuple[Tensor, list[int]]] = PackedWeights()
# What CUDA graphs read at every replay, and must therefore outlive the entries above
_captured_chains: dict[int, Tensor] = {}


def _conv_chain(
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    ops = torch.ops.brt_kernels
    args = (x_RCHW, offsets_P1, params, steps, step_offsets_P1, scales)
    program = (_key_of(steps), tuple(step_offsets_P1))
    if not x_RCHW.is_cuda:
        extra = (*program, ops.use_isa(""))
        packed = _packed_chains.get(params, extra, lambda: ops.conv_chain_pack(*args))
        return ops.conv_chain(*args, packed)
    # There the places of images and the scales are packed beside the weights, and to plan them
    # takes longer than the call
    there = (*program, _key_of(scales), x_RCHW.dtype, x_RCHW.shape[1:], x_RCHW.device)

    def make() -> tuple[Tensor, list[int]]:
        plan = ops.conv_chain_plan(*args)
        return ops.conv_chain_pack(*args), [int(word) for word in plan.split()]

    packed, plan = _planned_chains.get(params, there, make)
    if torch.cuda.is_current_stream_capturing():
        _captured_chains[packed.data_ptr()] = packed
    return ops.conv_chain_planned(x_RCHW, offsets_P1, packed, plan)


def _key_of(numbers: Sequence[float]) -> Same | tuple[float, ...]:
    """A key for thousands of numbers: cheap for a tuple, which cannot change."""
    return Same(numbers) if type(numbers) is tuple else tuple(numbers)


# What the CUDA kernels leave to others, beside what both refuse.
MOST_CUDA_PATHS = 4096
MOST_CUDA_CAPACITIES = 960
MOST_CUDA_CHAIN_CHANNELS = 256
MOST_CUDA_CHAIN_PIXELS = 4096
MOST_CUDA_GROUP_ENTRIES = 65536


def _cuda_route_refuses(*args: Any) -> str | None:
    capacity, priority_N, group_size, _ = args[-4:]
    num_paths = args[0].shape[1] if len(args) == 5 else args[1]
    if num_paths > MOST_CUDA_PATHS:
        return f"takes up to {MOST_CUDA_PATHS} paths, not {num_paths}"
    if capacity is None:
        return None
    if len(capacity) > MOST_CUDA_CAPACITIES:
        return f"takes up to {MOST_CUDA_CAPACITIES} capacities, not {len(capacity)}"
    num_cells, num_choices = args[0].shape
    if not 0 < group_size < num_cells:
        return None
    if group_size * num_choices > MOST_CUDA_GROUP_ENTRIES:
        return f"takes groups of up to {MOST_CUDA_GROUP_ENTRIES} choices"
    if priority_N is not None and num_cells % group_size != 0:
        return "takes priorities in groups of one size"
    return None


def _cuda_linear_refuses(x: Tensor, offsets: Tensor, weight: Tensor, *_: Any) -> str | None:
    return None if weight.is_contiguous() else "takes a contiguous weight"


def _cuda_chain_refuses(
    x_RCHW: Tensor, offsets: Tensor, params: Sequence[Tensor], steps: Sequence[int], *_: Any
) -> str | None:
    if x_RCHW.ndim == 4 and x_RCHW.shape[2] * x_RCHW.shape[3] > MOST_CUDA_CHAIN_PIXELS:
        return f"takes cells of up to {MOST_CUDA_CHAIN_PIXELS} pixels: one block computes a cell"
    facts = _facts_of(params)
    if facts.widest > MOST_CUDA_CHAIN_CHANNELS:
        return (
            f"takes convolutions of up to {MOST_CUDA_CHAIN_CHANNELS} channels, not {facts.widest}"
        )
    if others := sorted(map(str, facts.dtypes - {x_RCHW.dtype})):
        return f"takes one dtype, not {x_RCHW.dtype} and {', '.join(others)}"
    return _indices(offsets)


# On an H200 torch's convolutions, captured in a graph, are the faster ones from there on, and for a
# single path: see benchmarks/grouped_conv2d.py.
MOST_CUDA_CHANNELS = {1: 128}
MOST_CUDA_CHANNELS_ELSE = 64


def _cuda_conv2d_refuses(x_P: Sequence[Tensor], weight_P: Sequence[Tensor], *_: Any) -> str | None:
    if len(x_P) == 1:
        return "leaves a single path to torch"
    for weight in weight_P:
        channels, kernel = weight.shape[1:3]
        most = MOST_CUDA_CHANNELS.get(kernel, MOST_CUDA_CHANNELS_ELSE)
        if channels > most:
            return f"leaves more than {most} channels of a group to torch, here {channels}"
    return None


CUDA_REFUSES: dict[str, Callable[..., str | None]] = {
    "grouped_conv2d": _cuda_conv2d_refuses,
    "route": _cuda_route_refuses,
    "route_mask": _cuda_route_refuses,
    "grouped_linear": _cuda_linear_refuses,
    "conv_chain": _cuda_chain_refuses,
}


def _both(
    first: Callable[..., str | None], second: Callable[..., str | None]
) -> Callable[..., str | None]:
    return lambda *args: first(*args) or second(*args)


def _always(reason: str) -> Callable[..., str]:
    return lambda *_: reason


def _device_error(index: int, wait: bool) -> str:
    return str(torch.ops.brt_kernels.device_error(index, wait))


# op: file of brt_kernels.triton, and what decides without it
TRITON: dict[str, tuple[str, Callable[..., str | None], Callable[..., float]]] = {
    "grouped_linear": ("grouped_linear", choice.linear_refuses, choice.linear_us),
    "grouped_outer": ("grouped_linear", choice.outer_refuses, choice.outer_us),
    "expert_mlp": ("expert_mlp", choice.mlp_refuses, choice.mlp_us),
}


@functools.cache
def _triton_forward(op: str) -> Callable[..., Tensor]:
    file = importlib.import_module(f"brt_kernels.triton.{TRITON[op][0]}")
    forward: Callable[..., Tensor] = getattr(file, op)
    return forward


def _by_triton(op: str) -> Callable[..., Tensor]:
    return lambda *args: _triton_forward(op)(*args)  # Triton is imported at the first call


@brt.hookimpl
def brt_kernels() -> Iterator[KernelSpec]:
    libraries = load()
    register_all_fakes()
    if torch.cuda.is_available() and not libraries.no_cuda:
        checks.watch(NAME, _device_error)
        made = torch.ops.brt_kernels
        conditional.offer(NAME, made.conditional_begin.default, made.conditional_end.default)
    ops = torch.ops.brt_kernels
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "route": (ops.route.default, _route_refuses, _moving),
        "route_mask": (ops.route_mask.default, _mask_refuses, _moving),
        "dispatch": (ops.dispatch.default, _dispatch_refuses, _moving),
        "combine": (ops.combine.default, _combine_refuses, _moving),
        "row_dot": (ops.row_dot.default, _row_dot_refuses, _moving),
        "compact": (ops.compact.default, _mask_refuses, _moving),
        "grouped_linear": (ops.grouped_linear.default, _linear_refuses, _linear),
        "grouped_outer": (ops.grouped_outer.default, _outer_refuses, _outer),
        "expert_mlp": (ops.expert_mlp.default, _mlp_refuses, _mlp),
        "conv_chain": (_conv_chain, _chain_refuses, _chain),
        "grouped_conv2d": (ops.grouped_conv2d.default, _conv2d_refuses, _conv2d),
    }
    for op, (forward, refuses, estimate) in kinds.items():
        yield KernelSpec(
            op=op,
            device="cpu",
            name=NAME,
            forward=forward,
            refuses=refuses,
            estimate=estimate("cpu"),
        )
        cuda_refuses = _both(refuses, CUDA_REFUSES[op]) if op in CUDA_REFUSES else refuses
        yield KernelSpec(
            op=op,
            device="cuda",
            name=NAME,
            forward=forward,
            refuses=_always(libraries.no_cuda) if libraries.no_cuda else cuda_refuses,
            estimate=estimate("cuda"),
        )
    if choice.installed():
        for op, (_, refuses, estimate) in TRITON.items():
            yield KernelSpec(
                op=op,
                device="cuda",
                name=TRITON_NAME,
                forward=_by_triton(op),
                refuses=_always(libraries.no_cuda) if libraries.no_cuda else refuses,
                estimate=estimate,
            )
