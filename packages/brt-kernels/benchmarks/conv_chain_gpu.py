"""LiveSR's branches on a GPU: conv_chain against torch's loop over them; a table, and JSON.

python packages/brt-kernels/benchmarks/conv_chain_gpu.py OUT.json [--widths 8,20] [--compile]

Ten branches of 80 residual blocks take 104 cells of 3 x 32 x 32. The loop is timed as it is
(eager), in a CUDA graph, and in a CUDA graph of residual blocks that torch.compile made, each with
contiguous and with channels-last images, cuDNN choosing its algorithms by measurement.

Legend: R cells, C channels, H W height and width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from brt_kernels._load import load

ops = torch.ops.brt_kernels
LOADS = (6, 7, 12, 27, 8, 8, 8, 12, 12, 4)
BLOCKS = 80
SCALE = 0.1
FLUSH_BYTES = 256 << 20


def median_us(call: Callable[[], object], repeats: int, cold: bool = True) -> float:
    """Median time between events; cold: with the L2 cache flushed before each call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        if cold:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``call``, which has run before on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class Branches:
    """The ten branches' parameters, as steps and as what torch's convolutions take."""

    def __init__(self, width: int, dtype: torch.dtype, progressive: bool) -> None:
        self.params: list[Tensor] = []
        self.steps: list[int] = []
        self.scales: list[float] = []
        self.offsets = [0]
        self.progressive = progressive
        self.dtype = dtype
        for _ in LOADS:
            self.conv(0, 1, 3, width)
            for _ in range(BLOCKS):
                self.conv(1, 2, width, width, act=1)
                self.conv(2, 1, width, width, add=1, scale=SCALE)
            if progressive:
                self.conv(1, 3, width, 4 * width, shuffle=2)
                self.conv(3, 4, width, 4 * width, shuffle=2)
                self.conv(4, 5, width, 3)
            else:
                self.conv(1, 3, width, 48, shuffle=4)
            self.offsets.append(len(self.scales))

    def conv(
        self,
        src: int,
        dst: int,
        num_in: int,
        num_out: int,
        *,
        add: int = -1,
        act: int = 0,
        shuffle: int = 1,
        scale: float = 1.0,
    ) -> None:
        """One step and its parameters."""
        bound = (9 * num_in) ** -0.5
        for shape in ((num_out, num_in, 3, 3), (num_out,)):
            weight = (torch.rand(shape, device="cuda") * 2 - 1) * bound
            self.params.append(weight.to(self.dtype))
        at = len(self.params) - 2
        self.steps += [src, dst, add, at, at + 1, -1, act, 0, shuffle]
        self.scales.append(scale)

    def args(self) -> tuple[list[Tensor], list[int], list[int], list[float]]:
        """As the operator takes them, after x and offsets."""
        return self.params, self.steps, self.offsets, self.scales

    def loop(
        self,
        x_RCHW: Tensor,
        params: list[Tensor],
        block: Callable[..., Tensor],
        num_branches: int = len(LOADS),
    ) -> list[Tensor]:
        """Each branch on its cells, as a module does it."""
        made = []
        each = len(params) // len(LOADS)
        for p, image in enumerate(x_RCHW.split(LOADS)[:num_branches]):
            w = params[p * each : (p + 1) * each]
            y = F.conv2d(image, w[0], w[1], padding=1)
            for i in range(BLOCKS):
                y = block(y, *w[2 + 4 * i : 6 + 4 * i])
            tail = w[2 + 4 * BLOCKS :]
            y = F.pixel_shuffle(F.conv2d(y, tail[0], tail[1], padding=1), 2 if tail[2:] else 4)
            if self.progressive:
                y = F.pixel_shuffle(F.conv2d(y, tail[2], tail[3], padding=1), 2)
                y = F.conv2d(y, tail[4], tail[5], padding=1)
            made.append(y)
        return made


def residual_block(y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Two convolutions, the second scaled and added."""
    return y + SCALE * F.conv2d(F.relu(F.conv2d(y, w1, b1, padding=1)), w2, b2, padding=1)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Of all values together."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def case(
    width: int, dtype: torch.dtype, progressive: bool, compiled: bool, peers: bool
) -> dict[str, object]:
    """Times in microseconds of one width and type."""
    torch.manual_seed(width)
    branches = Branches(width, dtype, progressive)
    num_cells = sum(LOADS)
    x = torch.randn(num_cells, 3, 32, 32, device="cuda").to(dtype)
    offsets = torch.tensor([0, *LOADS], device="cuda").cumsum(0)
    args = branches.args()
    packed = ops.conv_chain_pack(x, offsets, *args)

    def ours() -> Tensor:
        return ops.conv_chain(x, offsets, *args, packed)

    found: dict[str, object] = {
        "C": width,
        "dtype": str(dtype).removeprefix("torch."),
        "upsampler": "2 x 2" if progressive else "4",
        "brt_graph": median_us(captured(ours).replay, 21),
        "brt_graph_warm": median_us(captured(ours).replay, 21, cold=False),
        "brt": median_us(ours, 7),
    }
    # Two branches are enough to see whether the result is right
    some = [p.double() for p in branches.params]
    exact = torch.cat(branches.loop(x.double(), some, residual_block, 2))
    found["error"] = relative_error(ours()[: exact.shape[0]], exact)
    layouts = [torch.contiguous_format, torch.channels_last] if peers else []
    for layout in layouts:
        suffix = "_nhwc" if layout is torch.channels_last else ""
        image = x.to(memory_format=layout)
        params = [p.to(memory_format=layout) if p.ndim == 4 else p for p in branches.params]

        def eager(
            image: Tensor = image,
            params: list[Tensor] = params,
            block: Callable[..., Tensor] = residual_block,
        ) -> list[Tensor]:
            return branches.loop(image, params, block)

        eager()
        found["loop_error" + suffix] = relative_error(torch.cat(eager()[:2]), exact)
        found["eager" + suffix] = median_us(eager, 5)
        found["graph" + suffix] = median_us(captured(eager).replay, 11)
        if compiled:
            block = torch.compile(residual_block, dynamic=True)
            found["compiled_graph" + suffix] = median_us(
                captured(lambda block=block, eager=eager: eager(block=block)).replay, 11
            )
    return found


def table(found: list[dict[str, object]]) -> str:
    """What was measured, and the ratios of the best of both layouts to conv_chain."""
    lines = []
    for row in found:
        lines.append(
            " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        )
        ours = float(row["brt_graph"])  # type: ignore[arg-type]
        ratios = {
            name: min(float(row[k]) for k in row if k in (name, f"{name}_nhwc")) / ours  # type: ignore[arg-type]
            for name in ("eager", "graph", "compiled_graph")
            if name in row
        }
        lines.append("    " + " ".join(f"{k}/brt={v:.1f}" for k, v in ratios.items()))
    return "\n".join(lines)


def main() -> None:
    """Every width and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--widths", default="8,12,16,20")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--progressive", action="store_true")
    parser.add_argument("--alone", action="store_true", help="time conv_chain only")
    chosen = parser.parse_args()
    load()
    torch.backends.cudnn.benchmark = True
    found = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for width in map(int, chosen.widths.split(",")):
                found.append(
                    case(width, dtype, chosen.progressive, chosen.compile, not chosen.alone)
                )
                sys.stdout.write(table(found[-1:]) + "\n")
                sys.stdout.flush()
                chosen.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
