"""Workload `grouped`: the experts of a mixture, two linear layers each, from cells to cells.

Legend: N cells, P paths (experts), K choices per cell, D H features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from brt import ops
from brt.bench import expert_forms as forms
from brt.bench.expert_forms import Activation, Experts, Form
from brt.bench.loads import Skew, choices, skewed_scores, traced_choices
from brt.bench.routing import under
from brt.bench.workload import Kind, Variant, Workload
from brt.errors import BrtError

_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}
# Gradients of weights are sums over the cells of an expert, of any order
_TRAINING_TOLERANCE = {
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.float32: 1e-4,
    torch.float64: 1e-11,
}
_NUM_SETS = 4
_KINK = 1e-6
"""How near 0 the rounding of float32 may change the sign of a hidden value of deviation 1."""
# Elements of weights that transformers' batched_mm gathers, a copy of an expert for each row:
# beyond this it is far from the best and runs out of memory.
_MOST_GATHERED = 2**29


def grouped(
    device: torch.device,
    dtype: torch.dtype,
    *,
    n: int = 512,
    p: int = 8,
    k: int = 1,
    d: int = 768,
    h: int = 3072,
    activation: Activation = "relu",
    skew: Skew = "uniform",
    trace: str = "",
    layer: int = 0,
    train: bool = False,
    seed: int = 0,
) -> Workload:
    """Route, two linear layers on each path, weighted sum; choices are given.

    ``trace`` names a file of choices (`brt.bench.loads.traced_choices`) to take instead of drawn
    ones, of one ``layer``. ``train``: with the gradients of cells, gate weights and experts.
    """
    if activation not in get_args(Activation):
        raise BrtError(f"activation {activation!r}; there are {', '.join(get_args(Activation))}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        made = torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5
        return made.to(device, dtype).requires_grad_(train)

    halves = 2 if activation == "swiglu" else 1
    experts = Experts(normal(p, halves * h, d), normal(p, d, h), activation)
    sets = []
    for index in range(1 if train else _NUM_SETS):
        if trace:
            choice_NK, weight_NK = traced_choices(trace, layer, index * n, n, p, k, generator)
        else:
            choice_NK, weight_NK = choices(skewed_scores(n, p, skew, generator), k)
        x_ND = torch.randn(n, d, generator=generator)
        if train and activation == "relu":
            _leave_kinks(x_ND, choice_NK, experts.up_PHD, generator)
        sets.append((x_ND.to(device, dtype), choice_NK.to(device), weight_NK.to(device, dtype)))
    loads = [choice_NK.flatten().bincount(minlength=p) for _, choice_NK, _ in sets]
    fullest = max(int(load_P.max()) for load_P in loads)
    num_used = min(int((load_P > 0).sum()) for load_P in loads)
    flops = 2.0 * n * k * d * h * (halves + 1) * (3 if train else 1)
    used_bytes = num_used * sum(
        weight[0].numel() * weight.element_size() for weight in (experts.up_PHD, experts.down_PDH)
    )
    grad_ND = torch.randn(n, d, generator=generator).to(device, dtype)
    weights = (experts.up_PHD, experts.down_PDH)

    def row(kind: Kind, name: str, make: Callable[[], Form], replay: bool = False) -> Variant:
        def made() -> Form:
            form = make()
            return forms.trained(form, weights, grad_ND) if train and kind != "limit" else form

        detail = partial(_kernel, experts, sets[0]) if name == "brt expert_mlp" else ""
        return Variant(
            kind=kind,
            name=name,
            make=made,
            flops=flops,
            replay=replay and not train,
            detail=detail,
        )

    def with_kernel(kernel: str) -> Form:
        return under(kernel, forms.mlp(experts))

    variants = [
        row("eager", "loop over experts", partial(forms.loop, experts)),
        row("peer", "sorted loop", partial(forms.sorted_loop, experts)),
        row("peer", "padded bmm", partial(forms.padded, experts, fullest), replay=True),
        row("peer", "torch grouped_mm", partial(forms.grouped_mm, experts), replay=True),
        *(
            row(
                "peer",
                f"transformers {how}",
                partial(forms.transformers, experts, how),
                replay=how == "grouped_mm",
            )
            for how in ("grouped_mm", "batched_mm")
            if how != "batched_mm" or n * k * halves * h * d <= _MOST_GATHERED
        ),
        row("brt", "brt grouped_linear", partial(forms.linears, experts), replay=True),
        row("brt", "brt expert_mlp", partial(forms.mlp, experts), replay=True),
        row("brt", "brt expert_mlp, reference kernels", partial(with_kernel, "reference")),
        row("limit", "one dense pair", partial(forms.dense, experts, n * k, train)),
    ]
    if not train:
        variants.insert(-3, row("brt", "brt.grouped", partial(forms.modules, experts)))
        variants.append(
            Variant(
                kind="limit",
                name="weight stream",
                make=partial(forms.stream, experts, num_used),
                num_bytes=float(used_bytes),
            )
        )
    load = f"{trace.rpartition('/')[2]} layer {layer}" if trace else skew
    return Workload(
        name="grouped",
        shapes=f"D={d} H={h} P={p} N={n} k={k} {activation}, {load}{', training' * train}",
        device=device,
        dtype=dtype,
        sets=sets,
        variants=variants,
        reference=_reference(experts, grad_ND, train),
        tolerance=(_TRAINING_TOLERANCE if train else _TOLERANCE)[dtype],
        options=dict(
            n=n,
            p=p,
            k=k,
            d=d,
            h=h,
            activation=activation,
            skew=skew,
            trace=trace,
            layer=layer,
            train=train,
            seed=seed,
        ),
        mode="grad" if train else "inference",
    )


def _leave_kinks(
    x_ND: Tensor, choice_NK: Tensor, up_PHD: Tensor, generator: torch.Generator
) -> None:
    """Draw cells anew while ReLU's gradient at one of their hidden values hangs on rounding."""
    up_PHD = up_PHD.detach().to("cpu", torch.float64)
    left_N = torch.arange(len(x_ND))
    while len(left_N):
        near_N = torch.zeros(len(left_N), dtype=torch.bool)
        for path in choice_NK[left_N].unique().tolist():
            on_N = (choice_NK[left_N] == path).any(1)
            hidden_NH = x_ND[left_N[on_N]].double() @ up_PHD[path].t()
            near_N[on_N] |= (hidden_NH.abs() < _KINK).any(1)
        left_N = left_N[near_N]
        x_ND[left_N] = torch.randn(len(left_N), x_ND.shape[1], generator=generator)


def _reference(experts: Experts, grad_ND: Tensor, train: bool) -> Callable[..., object]:
    form = partial(forms.reference, experts)
    if not train:
        return form
    return forms.trained(form, (experts.up_PHD, experts.down_PDH), grad_ND)


def _kernel(experts: Experts, inputs: tuple[Tensor, Tensor, Tensor]) -> str:
    arguments = forms.mlp_arguments(experts, *inputs)
    return f"on {ops.explain('expert_mlp', *arguments).chosen}"
