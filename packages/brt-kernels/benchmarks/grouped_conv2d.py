"""grouped_conv2d against a loop of torch convolutions over the paths.

python packages/brt-kernels/benchmarks/grouped_conv2d.py [cpu | cuda] [OUT.json] [PART OF A NAME]

On the CPU: one thread, the functions in turn, median of many calls. On CUDA: eager calls and
replays of a graph, by events, the L2 cache flushed before each call. The loop has its activation in
place; "last" is the loop on tensors that are channels-last from the start.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from convs import Call, PathCase, call_of, depthwise

from brt_kernels._load import load
from brt_kernels.ops.grouped_conv2d import grouped_conv2d


def same(num_paths: int, case: PathCase) -> list[PathCase]:
    """Paths of equal sizes."""
    return [case] * num_paths


WORKLOADS: dict[str, list[PathCase]] = {
    "1 path, 2x8x32x32 to 8": [PathCase(2, 8, (32, 32), 8)],
    "1 path of 8 rows, 16 to 16": [PathCase(8, 16, (32, 32), 16)],
    "1 path of 8 rows, 32 to 32": [PathCase(8, 32, (32, 32), 32)],
    "1 path of 8 rows, 64 to 64 of 16x16": [PathCase(8, 64, (16, 16), 64)],
    "1 path, 1x1, 64 to 64 of 16x16": [PathCase(8, 64, (16, 16), 64, kernel=1, padding=0)],
    "4 paths of 8 rows, 3 to 16 of 32x32": same(4, PathCase(8, 3, (32, 32), 16)),
    "4 paths of 8 rows, 8 to 8": same(4, PathCase(8, 8, (32, 32), 8)),
    "4 paths of 8 rows, 16 to 16": same(4, PathCase(8, 16, (32, 32), 16)),
    "4 paths of 8 rows, 32 to 32": same(4, PathCase(8, 32, (32, 32), 32)),
    "4 paths of 8 rows, 64 to 64 of 16x16": same(4, PathCase(8, 64, (16, 16), 64)),
    "4 paths of 8 rows, 128 to 128 of 14x14": same(4, PathCase(8, 128, (14, 14), 128)),
    "4 paths of 4 rows, 256 to 256 of 7x7": same(4, PathCase(4, 256, (7, 7), 256)),
    "stride 2, 16 to 32 of 32x32": same(4, PathCase(8, 16, (32, 32), 32, stride=2)),
    "stride 2, 64 to 128 of 16x16": same(4, PathCase(8, 64, (16, 16), 128, stride=2)),
    "1x1, 16 to 64 of 16x16": same(4, PathCase(8, 16, (16, 16), 64, kernel=1, padding=0)),
    "1x1, 64 to 64 of 16x16": same(4, PathCase(8, 64, (16, 16), 64, kernel=1, padding=0)),
    "1x1, 256 to 512 of 14x14": same(4, PathCase(8, 256, (14, 14), 512, kernel=1, padding=0)),
    "1x1, 512 to 512 of 7x7": same(4, PathCase(8, 512, (7, 7), 512, kernel=1, padding=0)),
    "1x1, 128 to 256 of 7x7": same(4, PathCase(8, 128, (7, 7), 256, kernel=1, padding=0)),
    "1x1 of 1x1, 64 to 64": same(4, PathCase(32, 64, (1, 1), 64, kernel=1, padding=0)),
    "depthwise 32 of 32x32": same(4, depthwise(8, 32, (32, 32))),
    "depthwise 128 of 14x14": same(4, depthwise(8, 128, (14, 14))),
    "depthwise 64 of 16x16, stride 2": same(4, depthwise(8, 64, (16, 16), stride=2)),
    "16 paths of 1 row, 16 to 16 of 8x8": same(16, PathCase(1, 16, (8, 8), 16)),
    "16 paths of 1 row, 32 to 32 of 14x14": same(16, PathCase(1, 32, (14, 14), 32)),
    "multi-scale": [
        PathCase(6, 16, (32, 32), 16),
        PathCase(6, 32, (16, 16), 32),
        PathCase(6, 64, (8, 8), 64),
        PathCase(6, 16, (32, 32), 32, stride=2),
        PathCase(6, 32, (16, 16), 64, stride=2),
    ],
}


def loop(call: Call) -> list[Tensor]:
    """What torch offers: one convolution a path."""
    made = []
    for p, (x, weight) in enumerate(zip(call.x_P, call.weight_P, strict=True)):
        bias, _, _, stride, padding, groups = call.convs[6 * p : 6 * p + 6]
        made.append(F.conv2d(x, weight, call.extras[bias], stride, padding, 1, groups).relu_())
    return made


def on_cpu(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds, the functions in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + 0.6
    while time.perf_counter() < end or len(times[next(iter(times))]) < 12:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(seen[2:]) for name, seen in times.items()}


def on_cuda(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds, eager and by graph replay."""
    flushed = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    found = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        for kind, run in (("eager", function), ("graph", graph.replay)):
            seen = []
            for _ in range(15):
                flushed.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                seen.append(1e3 * start.elapsed_time(end))
            found[f"{name} {kind}"] = statistics.median(seen[2:])
    return found


def main() -> None:
    """Print a line for each workload."""
    load()
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    sys.stdout.write(f"{torch.__version__} {device} {gpu}\n")
    chosen = sys.argv[3] if len(sys.argv) > 3 else ""
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, cases in WORKLOADS.items():
            if chosen not in name:
                continue
            call = call_of(cases, "relu").mapped(lambda t, d=dtype: t.to(device, d))
            last = call.mapped(
                lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
            )
            functions = {
                "brt": lambda c=call: grouped_conv2d(*c.args()),
                "loop": lambda c=call: loop(c),
                "last": lambda c=last: loop(c),
            }
            with torch.no_grad():
                found = (on_cpu if device.type == "cpu" else on_cuda)(functions)
            flops = sum(
                2 * w.numel() * x.shape[0] * c.out_size()[0] * c.out_size()[1]
                for x, w, c in zip(call.x_P, call.weight_P, cases, strict=True)
            )
            ours = found.get("brt", found.get("brt graph", 0.0))
            text = "  ".join(f"{key} {value:8.1f}" for key, value in found.items())
            rate = f"{flops / ours / 1e3:7.1f} GF/s"
            sys.stdout.write(f"{str(dtype)[6:]:8} {name:38} {text}  {rate}\n")
            lines.append({"dtype": str(dtype)[6:], "workload": name, "flops": flops, "us": found})
    if len(sys.argv) > 2:
        about = {"device": gpu or "cpu", "torch": torch.__version__}
        Path(sys.argv[2]).write_text(json.dumps(about | {"results": lines}, indent=1))


if __name__ == "__main__":
    main()
