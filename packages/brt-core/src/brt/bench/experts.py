"""Workload `grouped`: the experts of a mixture, two linear layers each, from cells to cells.

Legend: N cells, P paths (experts), K choices per cell, R routed rows, D H features, C rows of the
fullest path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import ops
from brt.bench.loads import Skew, choices, skewed_scores
from brt.bench.routing import offsets, under
from brt.bench.workload import Unavailable, Variant, Workload

_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}
_NUM_SETS = 4


def grouped(
    device: torch.device,
    dtype: torch.dtype,
    *,
    n: int = 512,
    p: int = 8,
    k: int = 1,
    d: int = 768,
    h: int = 3072,
    skew: Skew = "uniform",
    seed: int = 0,
) -> Workload:
    """Route, ``relu(x @ up) @ down`` on each path, weighted sum; choices are given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    up_PHD = normal(p, h, d).to(device, dtype)
    down_PDH = normal(p, d, h).to(device, dtype)
    sets = []
    for _ in range(_NUM_SETS):
        choice_NK, weight_NK = choices(skewed_scores(n, p, skew, generator), k)
        x_ND = torch.randn(n, d, generator=generator)
        sets.append((x_ND.to(device, dtype), choice_NK.to(device), weight_NK.to(device, dtype)))
    flops = 4.0 * n * k * d * h
    loads = [choice_NK.flatten().bincount(minlength=p) for _, choice_NK, _ in sets]
    fullest = max(int(load_P.max()) for load_P in loads)
    num_used = min(int((load_P > 0).sum()) for load_P in loads)

    forms: list[tuple[str, Any, Callable[[], Callable[..., Any]]]] = [
        ("loop over experts", "eager", lambda: partial(loop, up_PHD, down_PDH)),
        ("sorted loop", "peer", lambda: partial(sorted_loop, up_PHD, down_PDH)),
        ("padded bmm", "peer", partial(_padded, up_PHD, down_PDH, fullest)),
        ("torch grouped_mm", "peer", partial(_grouped_mm, up_PHD, down_PDH)),
        ("brt.grouped", "brt", partial(_modules, up_PHD, down_PDH)),
        ("brt grouped_linear", "brt", lambda: partial(_linears, up_PHD, down_PDH)),
        ("brt expert_mlp", "brt", lambda: partial(_mlp, up_PHD, down_PDH)),
        (
            "brt expert_mlp, reference kernels",
            "brt",
            lambda: under("reference", partial(_mlp, up_PHD, down_PDH)),
        ),
        ("one dense pair", "limit", partial(_dense, up_PHD, down_PDH, n * k)),
        ("weight stream", "limit", partial(_stream, up_PHD, down_PDH, num_used)),
    ]
    on_device = {"torch grouped_mm", "padded bmm", "brt grouped_linear", "brt expert_mlp"}
    variants = [
        Variant(
            name=name,
            kind=kind,
            make=make,
            flops=None if name == "weight stream" else flops,
            num_bytes=_used_bytes(up_PHD, num_used) if name == "weight stream" else None,
            replay=name in on_device,
            detail=partial(_kernel, up_PHD, down_PDH, sets[0]) if name == "brt expert_mlp" else "",
        )
        for name, kind, make in forms
    ]
    return Workload(
        name="grouped",
        shapes=f"D={d} H={h} P={p} N={n} k={k} {skew}",
        device=device,
        dtype=dtype,
        sets=sets,
        variants=variants,
        reference=partial(reference, up_PHD, down_PDH),
        tolerance=_TOLERANCE[dtype],
        options={"n": n, "p": p, "k": k, "d": d, "h": h, "skew": skew, "seed": seed},
    )


def reference(
    up_PHD: Tensor, down_PDH: Tensor, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor
) -> Tensor:
    """The loop in float64."""
    out_ND = torch.zeros_like(x_ND, dtype=torch.float64)
    for p in range(up_PHD.shape[0]):
        cell_R, k_R = (choice_NK == p).nonzero(as_tuple=True)
        hidden_RH = F.relu(x_ND[cell_R].double() @ up_PHD[p].double().T)
        rows_RD = hidden_RH @ down_PDH[p].double().T
        out_ND.index_add_(0, cell_R, rows_RD * weight_NK[cell_R, k_R, None].double())
    return out_ND


def loop(
    up_PHD: Tensor, down_PDH: Tensor, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor
) -> Tensor:
    """As models are written: for each expert, find its cells, compute, add."""
    out_ND = torch.zeros_like(x_ND)
    for p in range(up_PHD.shape[0]):
        cell_R, k_R = (choice_NK == p).nonzero(as_tuple=True)
        if cell_R.numel():
            rows_RD = F.linear(F.relu(F.linear(x_ND[cell_R], up_PHD[p])), down_PDH[p])
            out_ND.index_add_(0, cell_R, rows_RD * weight_NK[cell_R, k_R, None])
    return out_ND


def sorted_loop(
    up_PHD: Tensor, down_PDH: Tensor, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor
) -> Tensor:
    """The same with one sort, and sizes read once."""
    num_paths = up_PHD.shape[0]
    order_R, cell_R = _sorted(choice_NK)
    sizes = choice_NK.flatten().bincount(minlength=num_paths).tolist()
    parts = [
        F.linear(F.relu(F.linear(rows, up_PHD[p])), down_PDH[p]) if len(rows) else rows
        for p, rows in enumerate(x_ND[cell_R].split(sizes))
    ]
    return _weighted_sum(torch.cat(parts), order_R, weight_NK)


def _padded(up_PHD: Tensor, down_PDH: Tensor, fullest: int) -> Callable[..., Tensor]:
    """Batched products over experts, each padded to the rows of the fullest."""
    num_paths = up_PHD.shape[0]

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        order_R, cell_R = _sorted(choice_NK)
        path_R = choice_NK.flatten()[order_R]
        first_P = F.pad(offsets(choice_NK, num_paths), (1, 0))
        seat_R = torch.arange(len(path_R), device=x_ND.device) - first_P[path_R]
        place_R = path_R * fullest + seat_R
        padded = x_ND.new_zeros(num_paths * fullest, x_ND.shape[1])
        padded_PCD = padded.index_copy(0, place_R, x_ND[cell_R]).view(num_paths, fullest, -1)
        hidden_PCH = torch.bmm(padded_PCD, up_PHD.transpose(1, 2)).relu_()
        rows_PCD = torch.bmm(hidden_PCH, down_PDH.transpose(1, 2))
        return _weighted_sum(rows_PCD.flatten(0, 1)[place_R], order_R, weight_NK)

    return run


def _grouped_mm(up_PHD: Tensor, down_PDH: Tensor) -> Callable[..., Tensor]:
    product = getattr(F, "grouped_mm", None)
    if product is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        order_R, cell_R = _sorted(choice_NK)
        offs = offsets(choice_NK, up_PHD.shape[0]).to(torch.int32)
        hidden_RH = product(x_ND[cell_R], up_PHD.transpose(1, 2), offs=offs).relu_()
        rows_RD = product(hidden_RH, down_PDH.transpose(1, 2), offs=offs)
        return _weighted_sum(rows_RD, order_R, weight_NK)

    return run


def _modules(up_PHD: Tensor, down_PDH: Tensor) -> Callable[..., Any]:
    """What a model's author writes, choices given as scores would be."""
    num_paths, hidden, features = up_PHD.shape

    def expert(up_HD: Tensor, down_DH: Tensor) -> nn.Module:
        made = nn.Sequential(
            nn.Linear(features, hidden, bias=False, device="meta"),
            nn.ReLU(),
            nn.Linear(hidden, features, bias=False, device="meta"),
        )
        # Views of the stacked weights: a second copy of them would be another working set
        made[0].weight = nn.Parameter(up_HD, requires_grad=False)
        made[2].weight = nn.Parameter(down_DH, requires_grad=False)
        return made

    experts = [expert(up, down) for up, down in zip(up_PHD, down_PDH, strict=True)]

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        decision = brt.Decision(num_paths, choice_NK=choice_NK, weight=weight_NK)
        route = brt.route.make_route(decision, len(x_ND))
        rows_RD = ops.dispatch(x_ND, route.cell_R, route.row_NK)
        rows_RD = brt.grouped(experts, rows_RD, route)
        return ops.combine(rows_RD, route.row_NK, route.cell_R, route.weight_R)

    return run


def _linears(
    up_PHD: Tensor, down_PDH: Tensor, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor
) -> Tensor:
    cell_R, row_NK, offsets_P1, weight_R = _route(choice_NK, weight_NK, up_PHD.shape[0])
    rows_RD = ops.dispatch(x_ND, cell_R, row_NK)
    hidden_RH = ops.grouped_linear(rows_RD, offsets_P1, up_PHD, None, "relu")
    rows_RD = ops.grouped_linear(hidden_RH, offsets_P1, down_PDH)
    return ops.combine(rows_RD, row_NK, cell_R, weight_R)


def _mlp(
    up_PHD: Tensor, down_PDH: Tensor, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor
) -> Tensor:
    cell_R, row_NK, offsets_P1, weight_R = _route(choice_NK, weight_NK, up_PHD.shape[0])
    return ops.expert_mlp(
        x_ND, cell_R, row_NK, offsets_P1, weight_R, up_PHD, None, down_PDH, None, "relu"
    )


def _kernel(up_PHD: Tensor, down_PDH: Tensor, inputs: tuple[Tensor, ...]) -> str:
    x_ND, choice_NK, weight_NK = inputs
    cell_R, row_NK, offsets_P1, weight_R = _route(choice_NK, weight_NK, up_PHD.shape[0])
    args = (x_ND, cell_R, row_NK, offsets_P1, weight_R, up_PHD, None, down_PDH, None, "relu")
    return f"on {ops.explain('expert_mlp', *args).chosen}"


def _dense(up_PHD: Tensor, down_PDH: Tensor, num_rows: int) -> Callable[..., Tensor]:
    """One pair of products with as many operations."""
    rows_RD = torch.ones(num_rows, up_PHD.shape[2], dtype=up_PHD.dtype, device=up_PHD.device)
    up_HD, down_DH = up_PHD[0].clone(), down_PDH[0].clone()
    return lambda *_: F.linear(F.linear(rows_RD, up_HD).relu_(), down_DH)


def _stream(up_PHD: Tensor, down_PDH: Tensor, num_used: int) -> Callable[..., Any]:
    """Reading the weights of the experts that are used, once."""
    # As 4-byte words: a sum of 2-byte floats is bound by their conversion, not by memory
    words = [w[:num_used].reshape(-1).view(torch.float32) for w in (up_PHD, down_PDH)]
    return lambda *_: [w.sum() for w in words]


def _used_bytes(up_PHD: Tensor, num_used: int) -> float:
    return 2.0 * num_used * up_PHD[0].numel() * up_PHD.element_size()


def _sorted(choice_NK: Tensor) -> tuple[Tensor, Tensor]:
    order_R = torch.argsort(choice_NK.flatten(), stable=True)
    return order_R, order_R // choice_NK.shape[1]


def _weighted_sum(rows_RD: Tensor, order_R: Tensor, weight_NK: Tensor) -> Tensor:
    num_cells, num_choices = weight_NK.shape
    row_NK = torch.empty_like(order_R)
    row_NK[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    back_NKD = rows_RD[row_NK].view(num_cells, num_choices, -1)
    return (back_NKD * weight_NK[..., None]).sum(1)


def _route(
    choice_NK: Tensor, weight_NK: Tensor, num_paths: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell_R, slot_R, row_NK, offsets_P1 = ops.route(choice_NK, num_paths)
    weight_R = ops.dispatch(weight_NK.reshape(-1), slot_R, row_NK.reshape(-1, 1))
    return cell_R, row_NK, offsets_P1, weight_R
