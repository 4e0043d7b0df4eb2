"""An expert MLP on one GPU against its peers and the roofline, by graph replay; writes JSON.

python packages/brt-kernels/benchmarks/expert_mlp_gpu.py OUT.json [--peers FOLDER] [--cells 1,16]

Every kernel of brt and every peer gets the same weights, cells and choices. The peers: torch's
grouped_mm between index operations; transformers' own form of it, where it is installed; a loop
over experts, which waits for the host and is timed without a graph. FOLDER may hold `scattermoe/`,
its package, and `vllm_fused_moe.py`, which defines `layer(x, choice_NK, weight_NK, up_PHD,
down_PDH, activation) -> Callable`. Sorting by expert is made before by all but transformers and
"routed", which is brt with its route inside.
The roofline is measured in the same run: a copy of 4 GiB, and a product of 8192 cubed. Bytes are
the weights of the paths that some cell takes, the cells and the results; all times are medians in
microseconds, with the L2 cache flushed before each. "launch" is the share of the time that a graph
of two kernels without work takes: where a layer has few bytes, that is the higher roof. A chain is
8 calls in one graph, on other cells and other weights, for each of them: what a call costs inside a
model, without the graph's start.

Legend: N cells, K choices, R rows, P paths, D model and H hidden features.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import brt

FLUSH_BYTES = 256 << 20
CELLS = (1, 16, 256, 4096, 16384)
CHAIN = 8
MOST_CELLS_OF_A_CHAIN = 16
CHAIN_BYTES = 1 << 29  # weights of a chain: several times what the L2 cache holds


@dataclass(frozen=True)
class Layer:
    """Features, hidden features, paths, choices a cell and activation."""

    dim: int
    hidden: int
    num_paths: int
    num_choices: int
    activation: str


LAYERS = {
    "switch-base-8": Layer(768, 3072, 8, 1, "relu"),
    "switch-base-64": Layer(768, 3072, 64, 1, "relu"),
    "switch-base-128": Layer(768, 3072, 128, 1, "relu"),
    "qwen3-moe": Layer(2048, 768, 128, 8, "swiglu"),
    "mixtral": Layer(4096, 14336, 8, 2, "swiglu"),
    "deepseek-v3": Layer(7168, 2048, 256, 8, "swiglu"),
}


@dataclass(frozen=True)
class Problem:
    """One layer with one batch of cells."""

    layer: Layer
    x_ND: Tensor
    choice_NK: Tensor
    weight_NK: Tensor
    up_PHD: Tensor
    down_PDH: Tensor
    cell_R: Tensor
    row_NK: Tensor
    offsets_P1: Tensor
    weight_R: Tensor

    @property
    def bytes(self) -> int:
        """What must move: weights of the paths that are taken, cells and results."""
        num_taken = int((self.offsets_P1.diff() > 0).sum())
        weights = self.up_PHD[0].numel() + self.down_PDH[0].numel()
        return 2 * (num_taken * weights + 2 * self.x_ND.numel())

    @property
    def flops(self) -> int:
        """What must be computed."""
        return 2 * self.cell_R.shape[0] * (self.up_PHD[0].numel() + self.down_PDH[0].numel())

    def mlp_arguments(self) -> tuple[Any, ...]:
        """Those of `brt::expert_mlp`."""
        return (
            self.x_ND, self.cell_R, self.row_NK, self.offsets_P1, self.weight_R, self.up_PHD, None,
            self.down_PDH, None, self.layer.activation,
        )  # fmt: skip


class Timer:
    """Median microseconds, the L2 cache flushed before each call."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def replay(self, call: Callable[[], object]) -> float:
        """Of one replay of ``call`` in a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.events(graph.replay)

    def events(self, call: Callable[[], object]) -> float:
        """Of one call between two events."""
        call()
        times: list[float] = []
        while len(times) < 5 or (len(times) < 25 and sum(times) < 4e4):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return sorted(times)[len(times) // 2]


def ceilings(timer: Timer) -> tuple[float, float]:
    """Bytes and FLOP in a microsecond, as torch's copy and product reach them."""
    source = torch.randint(100, (1 << 32,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    copied = 2 * source.numel() / timer.events(lambda: target.copy_(source))
    return copied, 2 * 8192**3 / timer.events(lambda: a @ b)


def launches(timer: Timer) -> dict[str, float]:
    """Microseconds of a graph of as many kernels as one cell takes, without work; in a chain, each.

    No graph of so many kernels is faster, however few its bytes are.
    """
    tiny = torch.zeros(1, device="cuda")

    def pair() -> None:
        tiny.zero_()
        tiny.zero_()

    chain = timer.replay(lambda: [pair() for _ in range(CHAIN)]) / CHAIN
    return {"us": timer.replay(pair), "chain_us": chain}


def grouped_mm(p: Problem) -> Callable[[], Tensor]:
    """Torch's grouped product, with the routing made before and index operations around it."""
    ends = p.offsets_P1[1:].int()

    def run() -> Tensor:
        h = F.grouped_mm(p.x_ND.index_select(0, p.cell_R), p.up_PHD.transpose(1, 2), offs=ends)
        if p.layer.activation == "swiglu":
            gate, up = h.chunk(2, 1)
            h = F.silu(gate) * up
        else:
            h = F.relu(h)
        y = F.grouped_mm(h, p.down_PDH.transpose(1, 2), offs=ends)
        y = y * p.weight_R[:, None].to(y.dtype)
        return y.index_select(0, p.row_NK.flatten()).view(*p.row_NK.shape, -1).sum(1)

    return run


def transformers_grouped_mm(p: Problem) -> Callable[[], Tensor]:
    """Transformers' experts by grouped_mm, routing included: it takes choices, not routes."""
    moe = importlib.import_module("transformers.integrations.moe")
    gated = p.layer.activation == "swiglu"

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    experts = SimpleNamespace(
        num_experts=p.layer.num_paths, gate_up_proj=p.up_PHD, up_proj=p.up_PHD,
        down_proj=p.down_PDH, has_gate=gated, has_bias=False, is_transposed=False,
        is_concatenated=True, act_fn=F.silu if gated else F.relu, _apply_gate=apply_gate,
        training=False,
    )  # fmt: skip
    return lambda: moe.grouped_mm_experts_forward(experts, p.x_ND, p.choice_NK, p.weight_NK)


def scattermoe(p: Problem) -> Callable[[], Tensor]:
    """ScatterMoE's two products, with its sort made before: that one waits for the host."""
    kernels = importlib.import_module("scattermoe.parallel_experts")
    up, down = p.up_PHD.transpose(1, 2), p.down_PDH.transpose(1, 2)
    path, slot = torch.sort(p.choice_NK.flatten(), stable=True)
    ends = p.offsets_P1[1:]
    k = p.layer.num_choices

    def run() -> Tensor:
        h = kernels.parallel_linear(p.x_ND, up, k, path, slot, ends, grouped_out=True)
        if p.layer.activation == "swiglu":
            gate, rest = h.chunk(2, -1)
            h = F.silu(gate) * rest
        else:
            h = F.relu(h)
        return kernels.parallel_linear(
            h, down, 1, path, slot, ends, grouped_in=True, gates=p.weight_NK
        )

    return run


def vllm(p: Problem) -> Callable[[], Tensor]:
    """VLLM's Triton kernel, from the file that --peers has."""
    layer = importlib.import_module("vllm_fused_moe").layer
    return layer(p.x_ND, p.choice_NK, p.weight_NK, p.up_PHD, p.down_PDH, p.layer.activation)


def loop(p: Problem) -> Callable[[], Tensor]:
    """One expert after another, as most models are written."""

    def run() -> Tensor:
        out = torch.zeros_like(p.x_ND)
        for e in range(p.layer.num_paths):
            cell, k = torch.where(p.choice_NK == e)
            if cell.numel() == 0:
                continue
            h = F.linear(p.x_ND[cell], p.up_PHD[e])
            if p.layer.activation == "swiglu":
                gate, up = h.chunk(2, -1)
                h = F.silu(gate) * up
            else:
                h = F.relu(h)
            y = F.linear(h, p.down_PDH[e]) * p.weight_NK[cell, k, None]
            out.index_add_(0, cell, y.to(out.dtype))
        return out

    return run


def named(kernel: str) -> Callable[[Problem], Callable[[], Tensor]]:
    """The operator on the kernel of this name."""

    def make(p: Problem) -> Callable[[], Tensor]:
        args = p.mlp_arguments()

        def run() -> Tensor:
            with brt.ops.use(kernel):
                return torch.ops.brt.expert_mlp(*args)

        return run

    return make


def routed(p: Problem) -> Callable[[], Tensor]:
    """The operator on our kernel with the route inside, as transformers has it."""

    def run() -> Tensor:
        cell_R, slot_R, row_NK, offsets_P1 = brt.ops.route(p.choice_NK, p.layer.num_paths)
        weight_R = p.weight_NK.flatten().index_select(0, slot_R)
        with brt.ops.use("brt-triton"):
            return torch.ops.brt.expert_mlp(
                p.x_ND, cell_R, row_NK, offsets_P1, weight_R, p.up_PHD, None, p.down_PDH, None,
                p.layer.activation,
            )  # fmt: skip

    return run


FORMS: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "grouped_mm": grouped_mm,
    "brt-triton": named("brt-triton"),
    "brt-kernels": named("brt-kernels"),
    "routed": routed,
    "transformers": transformers_grouped_mm,
    "scattermoe": scattermoe,
    "vllm": vllm,
    "loop": loop,
}


def problem(layer: Layer, up_PHD: Tensor, down_PDH: Tensor, num_cells: int) -> Problem:
    """Random cells with random choices."""
    x = torch.randn(num_cells, layer.dim, device="cuda").bfloat16()
    scores = torch.rand(num_cells, layer.num_paths, device="cuda")
    weight, choice = scores.softmax(-1).topk(layer.num_choices)
    weight = (weight / weight.sum(-1, keepdim=True)).bfloat16()
    cell_R, slot_R, row_NK, offsets = brt.ops.route(choice, layer.num_paths)
    weight_R = weight.flatten().float()[slot_R]
    return Problem(
        layer, x, choice, weight, up_PHD, down_PDH, cell_R, row_NK, offsets, weight_R
    )  # fmt: skip


def problems(names: list[str], cells: list[int]) -> Iterator[tuple[str, list[Problem]]]:
    """Every layer at every number of cells, alone or as a chain; its weights are made once."""
    for name in names:
        layer = LAYERS[name]
        rows = layer.hidden * (2 if layer.activation == "swiglu" else 1)
        size = 2 * layer.num_paths * layer.dim * (rows + layer.hidden)
        sets = []
        for _ in range(min(CHAIN, -(-CHAIN_BYTES // size))):
            up = torch.empty(layer.num_paths, rows, layer.dim, dtype=torch.bfloat16, device="cuda")
            down = torch.empty(
                layer.num_paths, layer.dim, layer.hidden, dtype=torch.bfloat16, device="cuda"
            )
            sets.append((up.normal_(std=layer.dim**-0.5), down.normal_(std=layer.hidden**-0.5)))
        for num_cells in cells:
            count = CHAIN if num_cells <= MOST_CELLS_OF_A_CHAIN else 1
            yield name, [problem(layer, *sets[i % len(sets)], num_cells) for i in range(count)]
        del up, down, sets
        torch.cuda.empty_cache()


def in_turn(calls: list[Callable[[], Tensor]]) -> Callable[[], object]:
    """One call after another."""
    return lambda: [call() for call in calls]


def measure(chain: list[Problem], timer: Timer, names: list[str], *, times: bool) -> dict[str, Any]:
    """Times of all forms that run, alone and in a chain, and why the others do not."""
    found: dict[str, float] = {}
    in_chain: dict[str, float] = {}
    left_out: dict[str, str] = {}
    expected = FORMS["grouped_mm"](chain[0])().float()
    for name in names:
        try:
            calls = [FORMS[name](p) for p in chain]
            error = float((calls[0]().float() - expected).norm() / expected.norm())
            if not error < 2e-2:
                left_out[name] = f"differs by {error:.2g}"
            elif times and name == "loop":
                found[name] = timer.events(calls[0])
            elif times:
                found[name] = timer.replay(calls[0])
                if len(calls) > 1:
                    in_chain[name] = timer.replay(in_turn(calls)) / len(calls)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"
    chosen = brt.ops.explain("expert_mlp", *chain[0].mlp_arguments()).chosen
    return {"us": found, "chain_us": in_chain, "left_out": left_out, "chosen": chosen}


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(lines: list[dict[str, Any]], ours: str, what: str) -> str:
    """A row a case: our time, its share of the roofline, and every peer's time over ours."""
    lines = [line for line in lines if ours in line[what]]
    peers = sorted({n for line in lines for n in line[what] if n != ours})
    rows = [f"{what:<16} cells       us  roof launch " + " ".join(f"{p[:12]:>12}" for p in peers)]
    ratios: dict[str, list[float]] = {p: [] for p in peers}
    for line in lines:
        us = line[what][ours]
        shown = []
        for p in peers:
            ratio = line[what].get(p, math.nan) / us
            shown.append(f"{ratio:12.2f}")
            if not math.isnan(ratio):
                ratios[p].append(ratio)
        roof = line["roof_us" if what == "us" else "chain_roof_us"] / us
        rows.append(
            f"{line['layer']:<16}{line['cells']:>6} {us:8.1f} {roof:5.2f} "
            f"{line['launches'].get(what, 0) / us:6.2f} " + " ".join(shown)
        )
    means = " ".join(f"{geometric_mean(ratios[p]):12.2f}" for p in peers)
    return "\n".join([*rows, f"{'geometric mean':<44}{means}"])


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--peers", type=Path, help="folder of peers that are not installed")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--cells", default=",".join(map(str, CELLS)))
    parser.add_argument("--only", default=",".join(FORMS))
    parser.add_argument("--compile", action="store_true", help="compile and compare, time nothing")
    options = parser.parse_args()
    if options.peers is not None:
        sys.path.insert(0, str(options.peers))
    torch.manual_seed(0)
    timer = Timer()
    bytes_per_us, flops_per_us = (1.0, 1.0) if options.compile else ceilings(timer)
    floor = {} if options.compile else launches(timer)
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16",
        "copy_TB_per_s": bytes_per_us * 1e-6, "product_TFLOP_per_s": flops_per_us * 1e-6,
        "launches": floor,
    }  # fmt: skip
    sys.stdout.write(f"{about}\n")
    lines = []
    cells = [int(n) for n in options.cells.split(",")]
    for name, chain in problems(options.layers.split(","), cells):
        line = measure(chain, timer, options.only.split(","), times=not options.compile)
        p = chain[0]
        roofs = [max(q.bytes / bytes_per_us, q.flops / flops_per_us) for q in chain]
        line |= {"layer": name, "cells": p.x_ND.shape[0], "bytes": p.bytes, "flops": p.flops}
        line |= {"launches": floor, "roof_us": roofs[0], "chain_roof_us": sum(roofs) / len(roofs)}
        lines.append(line)
        options.out.write_text(json.dumps(about | {"results": lines}, indent=1))
    for what in ("us", "chain_us"):
        sys.stdout.write(table(lines, "brt-triton", what) + "\n")
    reasons = {f"{n}: {why}" for line in lines for n, why in line["left_out"].items()}
    sys.stdout.write("\n".join(["left out:", *sorted(reasons)]) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
