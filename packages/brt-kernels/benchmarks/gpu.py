"""Times of the CUDA kernels by graph replay, against copying and torch's grouped_mm; writes JSON.

python packages/brt-kernels/benchmarks/gpu.py OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from brt_kernels._load import load

ops = torch.ops.brt_kernels
FLUSH_BYTES = 256 << 20


def replay_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds of one replay of ``call`` in a CUDA graph, L2 cache flushed before."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def movement() -> list[dict[str, object]]:
    """Route, dispatch and combine; the last two as a share of the rate of copying."""
    num_cells, num_paths, num_choices, dim = 16384, 256, 8, 4096
    choice = torch.rand(num_cells, num_paths, device="cuda").topk(num_choices, 1).indices
    others = [torch.rand(num_cells, num_paths, device="cuda").topk(num_choices, 1).indices]
    others += [choice.flip(0), others[0].flip(0)]
    chain = [choice, *others] * 2
    found = [
        {
            "op": "route",
            "N": num_cells,
            "P": num_paths,
            "K": num_choices,
            "us": replay_us(lambda: ops.route(choice, num_paths)),
            "chain_us": replay_us(lambda: [ops.route(c, num_paths) for c in chain]) / len(chain),
        }
    ]
    for k in (1, 2):
        x = torch.randn(num_cells, dim, device="cuda").bfloat16()
        cell_R, _, row_NK, _ = ops.route(choice[:, :k].contiguous(), num_paths)
        weight_R = torch.rand(cell_R.shape[0], device="cuda")
        rows = ops.dispatch(x, cell_R, row_NK)
        other = torch.empty_like(rows)
        size = x.numel() * x.element_size()
        copy = replay_us(lambda rows=rows, other=other: other.copy_(rows)) / (2 * rows.numel() * 2)
        for op, call, moved in (
            ("dispatch", lambda x=x, c=cell_R, r=row_NK: ops.dispatch(x, c, r), 2 * k * size),
            (
                "combine",
                lambda y=rows, c=cell_R, r=row_NK, w=weight_R: ops.combine(y, r, c, w),
                (k + 1) * size,
            ),
        ):
            us = replay_us(call)
            found.append(
                {
                    "op": op,
                    "N": num_cells,
                    "K": k,
                    "D": dim,
                    "us": us,
                    "share_of_copy": copy * moved / us,
                }
            )
    return found


LAYERS = {  # features, hidden features, paths, choices, activation
    "switch-base-64": (768, 3072, 64, 1, "relu"),
    "qwen3-30b": (2048, 768, 128, 8, "swiglu"),
    "mixtral": (4096, 14336, 8, 2, "swiglu"),
}


def mlp_layer(name: str) -> list[dict[str, object]]:
    """One layer at several numbers of cells, against torch's grouped_mm."""
    dim, hidden, num_paths, k, activation = LAYERS[name]
    mats = 3 if activation == "swiglu" else 2
    up = torch.randn(num_paths, hidden * (mats - 1), dim, device="cuda").bfloat16() / dim**0.5
    down = torch.randn(num_paths, dim, hidden, device="cuda").bfloat16() / hidden**0.5
    return [
        mlp_case(name, up, down, activation, num_cells, k)
        for num_cells in (1, 16, 256, 4096, 16384)
    ]


def mlp_case(
    name: str, up: Tensor, down: Tensor, activation: str, num_cells: int, k: int
) -> dict[str, object]:
    """One layer at one number of cells."""
    num_paths, dim, _ = down.shape
    x = torch.randn(num_cells, dim, device="cuda").bfloat16()
    choice = torch.rand(num_cells, num_paths, device="cuda").topk(k, 1).indices
    cell_R, _, row_NK, offsets = ops.route(choice, num_paths)
    weight_R = torch.rand(cell_R.shape[0], device="cuda")
    ends = offsets[1:].int()

    def ours() -> Tensor:
        return ops.expert_mlp(
            x, cell_R, row_NK, offsets, weight_R, up, None, down, None, activation
        )

    def grouped_mm() -> Tensor:
        h = F.grouped_mm(x.index_select(0, cell_R), up.transpose(1, 2), offs=ends)
        if activation == "swiglu":
            gate, other = h.chunk(2, 1)
            h = F.silu(gate) * other
        else:
            h = F.relu(h)
        y = F.grouped_mm(h, down.transpose(1, 2), offs=ends) * weight_R[:, None].bfloat16()
        return y.index_select(0, row_NK.flatten()).view(num_cells, k, dim).sum(1)

    torch.testing.assert_close(ours(), grouped_mm(), rtol=5e-2, atol=5e-2)
    us, peer = replay_us(ours), replay_us(grouped_mm)
    flops = 2 * num_cells * k * (up[0].numel() + down[0].numel())
    return {
        "op": "expert_mlp", "layer": name, "N": num_cells, "us": us, "grouped_mm_us": peer,
        "ratio": peer / us, "tflops": flops / us * 1e-6,
    }  # fmt: skip


def main() -> None:
    """Measure everything and write it."""
    results = movement() + [line for name in LAYERS for line in mlp_layer(name)]
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for line in results:
        sys.stdout.write(f"{line}\n")
    Path(sys.argv[1]).write_text(json.dumps(about | {"results": results}, indent=1))


if __name__ == "__main__":
    load()
    main()
