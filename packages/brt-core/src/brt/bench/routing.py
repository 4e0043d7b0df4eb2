"""Workload `routing`: cells to paths and back, without any work on the paths.

Legend: N cells, P paths, K choices per cell, R routed rows, D features, C rows of the fullest path.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from brt import ops
from brt.bench.loads import Skew, choices, skewed_scores
from brt.bench.probe import num_sets_beyond_cache
from brt.bench.workload import Unavailable, Variant, Workload

Moved = tuple[Tensor, Tensor]
"""Rows by path ``[R, D]`` and cells again ``[N, D]``. Both are results: were the rows not, a
compiler could do without them, and there would be nothing to run experts on."""

_EINSUM_FLOPS = 2e9


def routing(
    device: torch.device,
    dtype: torch.dtype,
    *,
    n: int = 4096,
    p: int = 64,
    k: int = 2,
    d: int = 1024,
    skew: Skew = "uniform",
    seed: int = 0,
) -> Workload:
    """Route, dispatch and combine with weights: what a mixture of experts adds to its experts."""
    generator = torch.Generator().manual_seed(seed)
    item = torch.empty(0, dtype=dtype).element_size()
    # Each cell is read once and each row written once; then the other way round
    num_bytes = 2 * n * d * (1 + k) * item
    num_sets = num_sets_beyond_cache(n * d * item, device)
    sets = []
    for _ in range(num_sets):
        scores_NP = skewed_scores(n, p, skew, generator)
        choice_NK, weight_NK = choices(scores_NP, k)
        x_ND = torch.randn(n, d, generator=generator)
        sets.append((x_ND.to(device, dtype), choice_NK.to(device), weight_NK.to(device)))
    scores_NP = skewed_scores(n, p, skew, generator).to(device)

    plain = {"index_select + index_add": index_add, "gather + sum": gather_sum}
    variants = [
        Variant(
            name=name,
            kind="eager" if i == 0 else "peer",
            make=_returns(partial(form, num_paths=p)),
            num_bytes=num_bytes,
            replay=True,
        )
        for i, (name, form) in enumerate(plain.items())
    ]
    variants += [
        Variant(
            name=f"compiled {name}",
            kind="peer",
            make=partial(_compiled, form, p),
            num_bytes=num_bytes,
        )
        for name, form in plain.items()
    ]
    fullest = max(int(choice.flatten().bincount().max()) for _, choice, _ in sets)
    variants.append(
        Variant(
            name="one-hot einsum",
            kind="peer",
            make=partial(_einsum, p, fullest, 4.0 * n * p * fullest * d),
            outcome=_unpadded,
        )
    )
    for name, kernel in (("brt, reference kernels", "reference"), ("brt", None)):
        variants.append(
            Variant(
                name=name,
                kind="brt",
                make=partial(_brt, p, kernel),
                num_bytes=num_bytes,
                detail=partial(_kernels, sets[0], p, kernel),
                replay=True,
            )
        )
    variants += [
        Variant(
            name="copy of the same bytes",
            kind="limit",
            make=partial(_copy, num_bytes // 2 // item, dtype, device),
            num_bytes=num_bytes,
        ),
        Variant(name="softmax + top-k", kind="part", make=partial(_top_k, scores_NP, k)),
        Variant(name="route alone", kind="part", make=partial(_route_alone, p)),
    ]
    return Workload(
        name="routing",
        shapes=f"N={n} P={p} k={k} D={d} {skew}",
        device=device,
        dtype=dtype,
        sets=sets,
        variants=variants,
        reference=partial(reference, num_paths=p),
        tolerance=4 * torch.finfo(dtype).eps,
        options={"n": n, "p": p, "k": k, "d": d, "skew": skew, "seed": seed},
    )


def reference(
    x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor, num_paths: int
) -> tuple[Tensor, Tensor]:
    """Rows by path, in cell order, by a sort of (path, cell); cells as the weighted sum of them."""
    num_choices = choice_NK.shape[1]
    order_R = torch.argsort(choice_NK.flatten(), stable=True)
    rows_RD = x_ND.double()[order_R // num_choices]
    out_ND = x_ND.double() * weight_NK.double().sum(1, keepdim=True)
    return rows_RD, out_ND


def index_add(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor, num_paths: int) -> Moved:
    """Plain torch: sort the choices, `index_select` the rows, `index_add` them back."""
    num_choices = choice_NK.shape[1]
    order_R = torch.argsort(choice_NK.flatten(), stable=True)
    cell_R = order_R // num_choices
    offsets(choice_NK, num_paths)  # which experts would need
    rows_RD = x_ND.index_select(0, cell_R)
    weighted_RD = rows_RD * weight_NK.flatten().index_select(0, order_R)[:, None].to(rows_RD.dtype)
    return rows_RD, torch.zeros_like(x_ND).index_add_(0, cell_R, weighted_RD)


def gather_sum(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor, num_paths: int) -> Moved:
    """Plain torch: sort the choices, gather the rows, gather them back and sum over the choices."""
    num_cells, num_choices = choice_NK.shape
    order_R = torch.argsort(choice_NK.flatten(), stable=True)
    row_NK = torch.empty_like(order_R)
    row_NK[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    offsets(choice_NK, num_paths)
    rows_RD = x_ND[order_R // num_choices]
    back_NKD = rows_RD[row_NK].view(num_cells, num_choices, -1)
    return rows_RD, (back_NKD * weight_NK[..., None].to(rows_RD.dtype)).sum(1)


def offsets(choice_NK: Tensor, num_paths: int) -> Tensor:
    """Where the rows of each path end, without a wait for the device (bincount has one)."""
    path_R = choice_NK.flatten()
    load_P = torch.zeros(num_paths, dtype=torch.int64, device=path_R.device)
    return load_P.scatter_add_(0, path_R, torch.ones_like(path_R)).cumsum(0)


def _returns(run: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: run


def _compiled(form: Callable[..., Moved], num_paths: int) -> Callable[..., Moved]:
    # A code object of its own: a sweep must not run into the limit of recompilations
    code = cast(FunctionType, form).__code__.replace()
    own = FunctionType(code, globals(), form.__name__)
    return torch.compile(partial(own, num_paths=num_paths), dynamic=False)


def _einsum(num_paths: int, fullest: int, flops: float) -> Callable[..., Any]:
    """GShard's form: seats of a padded buffer by products with one-hot masks."""
    if flops > _EINSUM_FLOPS:
        raise Unavailable(f"one-hot products would take {flops / 1e9:.0f} GFLOP")

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> tuple[Tensor, ...]:
        one_hot_NKP = torch.nn.functional.one_hot(choice_NK, num_paths)
        mask_NP = one_hot_NKP.sum(1)
        seat_NP = (mask_NP.cumsum(0) - 1).clamp(min=0)
        seat_NPC = torch.nn.functional.one_hot(seat_NP, fullest) * mask_NP[..., None]
        seat_NPC = seat_NPC.to(x_ND.dtype)
        weight_NP = (one_hot_NKP * weight_NK[..., None]).sum(1).to(x_ND.dtype)
        rows_PCD = torch.einsum("npc,nd->pcd", seat_NPC, x_ND)
        out_ND = torch.einsum("npc,np,pcd->nd", seat_NPC, weight_NP, rows_PCD)
        return rows_PCD, out_ND, mask_NP.sum(0)

    return run


def _unpadded(moved: tuple[Tensor, Tensor, Tensor]) -> Moved:
    rows_PCD, out_ND, load_P = moved
    parts = [rows_CD[:load] for rows_CD, load in zip(rows_PCD, load_P.tolist(), strict=True)]
    return torch.cat(parts), out_ND


def _brt(num_paths: int, kernel: str | None) -> Callable[..., Moved]:
    if kernel is None and not _has_kernels():
        raise Unavailable("the reference is the only kernel: pip install brt-kernels")

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Moved:
        cell_R, slot_R, row_NK, _ = ops.route(choice_NK, num_paths)
        weight_R = ops.dispatch(weight_NK.reshape(-1), slot_R, row_NK.reshape(-1, 1))
        rows_RD = ops.dispatch(x_ND, cell_R, row_NK)
        return rows_RD, ops.combine(rows_RD, row_NK, cell_R, weight_R)

    return run if kernel is None else under(kernel, run)


def under(kernel: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` on the kernels of this name."""

    def run_under(*args: Any) -> Any:
        with ops.use(kernel):
            return run(*args)

    return run_under


def _has_kernels() -> bool:
    return any(
        spec.name != "reference"
        for name in ("route", "dispatch", "combine")
        for device in ("cpu", "cuda")
        for spec, _ in ops.OPERATORS[name].kernels(device)
    )


def _kernels(inputs: tuple[Tensor, ...], num_paths: int, kernel: str | None) -> str:
    """Which kernels ran."""
    if kernel is not None:
        return ""
    x_ND, choice_NK, _ = inputs
    cell_R, _, row_NK, _ = ops.route(choice_NK, num_paths)
    rows_RD = ops.dispatch(x_ND, cell_R, row_NK)
    chosen = (
        ("route", ops.explain("route", choice_NK, num_paths)),
        ("dispatch", ops.explain("dispatch", x_ND, cell_R, row_NK)),
        ("combine", ops.explain("combine", rows_RD, row_NK, cell_R)),
    )
    names = {name: why.chosen for name, why in chosen}
    if len(set(names.values())) == 1:
        return f"on {names['route']}"
    return ", ".join(f"{name} on {kernel}" for name, kernel in names.items())


def _copy(numel: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """A copy of so many elements, from one buffer of several to another."""
    num = num_sets_beyond_cache(2 * numel * torch.empty(0, dtype=dtype).element_size(), device)
    sources = [torch.ones(numel, dtype=dtype, device=device) for _ in range(num)]
    turn = itertools.cycle([(source, torch.zeros_like(source)) for source in sources])

    def run(*_: Tensor) -> Tensor:
        source, target = next(turn)
        return target.copy_(source)

    return run


def _top_k(scores_NP: Tensor, k: int) -> Callable[..., Any]:
    return lambda *_: scores_NP.softmax(-1).topk(k, dim=-1)


def _route_alone(num_paths: int) -> Callable[..., Any]:
    return lambda x_ND, choice_NK, weight_NK: ops.route(choice_NK, num_paths)
