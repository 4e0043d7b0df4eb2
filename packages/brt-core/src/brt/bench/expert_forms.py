"""Ways to compute the experts of a mixture: as models are written, as peers do it, and brt's.

Each is ``run(x_ND, choice_NK, weight_NK) -> [N, D]`` over the stacked weights of `Experts`.

Legend: N cells, P paths (experts), K choices per cell, R routed rows, D H features (with swiglu, up
has 2H rows), C rows of the fullest path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import ops
from brt.bench.routing import offsets
from brt.bench.workload import Unavailable

Activation = Literal["relu", "swiglu"]
Form = Callable[[Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True, eq=False)
class Experts:
    """Stacked weights, and what lies between the two products."""

    up_PHD: Tensor
    down_PDH: Tensor
    activation: Activation

    @property
    def num_paths(self) -> int:
        """P."""
        return self.up_PHD.shape[0]

    def activate(self, up_RH: Tensor) -> Tensor:
        """Hidden features of what ``up`` makes; ReLU in place."""
        if self.activation == "relu":
            return up_RH.relu_()
        gate_RH, other_RH = up_RH.chunk(2, -1)
        return F.silu(gate_RH) * other_RH

    def each(self) -> list[Callable[[Tensor], Tensor]]:
        """Each expert by itself, for its rows.

        Unbound at once: the gradient of an index is as large as all weights.
        """
        weights = zip(self.up_PHD.unbind(), self.down_PDH.unbind(), strict=True)
        return [partial(self._expert, up_HD, down_DH) for up_HD, down_DH in weights]

    def _expert(self, up_HD: Tensor, down_DH: Tensor, rows_RD: Tensor) -> Tensor:
        return F.linear(self.activate(F.linear(rows_RD, up_HD)), down_DH)


def reference(experts: Experts, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """The loop in float64."""
    out_ND = torch.zeros_like(x_ND, dtype=torch.float64)
    weights = zip(experts.up_PHD.unbind(), experts.down_PDH.unbind(), strict=True)
    for p, (up_HD, down_DH) in enumerate(weights):
        cell_R, k_R = (choice_NK == p).nonzero(as_tuple=True)
        if not cell_R.numel():
            continue
        up_RH = x_ND[cell_R].double() @ up_HD.double().T
        rows_RD = experts.activate(up_RH) @ down_DH.double().T
        weighted_RD = rows_RD * weight_NK[cell_R, k_R, None].double()
        out_ND = out_ND.index_add(0, cell_R, weighted_RD)
    return out_ND


def loop(experts: Experts) -> Form:
    """As models are written: for each expert, find its cells, compute, add."""

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        out_ND = torch.zeros_like(x_ND)
        for p, expert in enumerate(experts.each()):
            cell_R, k_R = (choice_NK == p).nonzero(as_tuple=True)
            if cell_R.numel():
                rows_RD = expert(x_ND[cell_R])
                out_ND.index_add_(0, cell_R, rows_RD * weight_NK[cell_R, k_R, None])
        return out_ND

    return run


def sorted_loop(experts: Experts) -> Form:
    """The same with one sort, and sizes read once."""

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        order_R, cell_R = _sorted(choice_NK)
        sizes = choice_NK.flatten().bincount(minlength=experts.num_paths).tolist()
        rows_P = x_ND[cell_R].split(sizes)
        parts = [
            expert(rows) for expert, rows in zip(experts.each(), rows_P, strict=True) if len(rows)
        ]
        return _weighted_sum(torch.cat(parts), order_R, weight_NK)

    return run


def padded(experts: Experts, fullest: int) -> Form:
    """Batched products over experts, each padded to the rows of the fullest."""
    num_paths = experts.num_paths

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        order_R, cell_R = _sorted(choice_NK)
        path_R = choice_NK.flatten()[order_R]
        first_P = F.pad(offsets(choice_NK, num_paths), (1, 0))
        seat_R = torch.arange(len(path_R), device=x_ND.device) - first_P[path_R]
        place_R = path_R * fullest + seat_R
        empty = x_ND.new_zeros(num_paths * fullest, x_ND.shape[1])
        padded_PCD = empty.index_copy(0, place_R, x_ND[cell_R]).view(num_paths, fullest, -1)
        hidden_PCH = experts.activate(torch.bmm(padded_PCD, experts.up_PHD.transpose(1, 2)))
        rows_PCD = torch.bmm(hidden_PCH, experts.down_PDH.transpose(1, 2))
        return _weighted_sum(rows_PCD.flatten(0, 1)[place_R], order_R, weight_NK)

    return run


def grouped_mm(experts: Experts) -> Form:
    """torch's grouped product, rows sorted."""
    product = getattr(F, "grouped_mm", None)
    if product is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        order_R, cell_R = _sorted(choice_NK)
        offs = offsets(choice_NK, experts.num_paths).to(torch.int32)
        up_RH = product(x_ND[cell_R], experts.up_PHD.transpose(1, 2), offs=offs)
        hidden_RH = experts.activate(up_RH)
        rows_RD = product(hidden_RH, experts.down_PDH.transpose(1, 2), offs=offs)
        return _weighted_sum(rows_RD, order_R, weight_NK)

    return run


def transformers(experts: Experts, implementation: str) -> Form:
    """One of the experts implementations of transformers, as its models call it."""
    try:
        from transformers.integrations import moe
    except ImportError as error:
        raise Unavailable(f"needs transformers: {error}") from error
    forward = moe.ALL_EXPERTS_FUNCTIONS.get(implementation)
    if forward is None:
        raise Unavailable(f"this transformers has no experts implementation {implementation!r}")
    gated = experts.activation == "swiglu"
    module = SimpleNamespace(
        num_experts=experts.num_paths,
        has_gate=gated,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
        act_fn=F.silu if gated else F.relu,
        up_proj=experts.up_PHD,
        gate_up_proj=experts.up_PHD,
        down_proj=experts.down_PDH,
        config=SimpleNamespace(_experts_implementation=implementation),
        _apply_gate=experts.activate,
    )
    return lambda x_ND, choice_NK, weight_NK: forward(module, x_ND, choice_NK, weight_NK)


def modules(experts: Experts) -> Form:
    """brt as a model's author uses it, choices given as scores would be; without gradients."""
    if experts.activation != "relu":
        raise Unavailable("brt.grouped reads linear layers with a plain activation between")
    num_paths, hidden, features = experts.up_PHD.shape

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

    stacked = zip(experts.up_PHD, experts.down_PDH, strict=True)
    networks = [expert(up_HD, down_DH) for up_HD, down_DH in stacked]

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        decision = brt.Decision(num_paths, choice_NK=choice_NK, weight=weight_NK)
        route = brt.route.make_route(decision, len(x_ND))
        rows_RD = ops.dispatch(x_ND, route.cell_R, route.row_NK)
        rows_RD = brt.grouped(networks, rows_RD, route)
        return ops.combine(rows_RD, route.row_NK, route.cell_R, route.weight_R)

    return run


def linears(experts: Experts) -> Form:
    """brt's operators one by one."""

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        cell_R, row_NK, offsets_P1, weight_R = _route(choice_NK, weight_NK, experts.num_paths)
        rows_RD = ops.dispatch(x_ND, cell_R, row_NK)
        if experts.activation == "relu":
            hidden_RH = ops.grouped_linear(rows_RD, offsets_P1, experts.up_PHD, None, "relu")
        else:
            hidden_RH = experts.activate(ops.grouped_linear(rows_RD, offsets_P1, experts.up_PHD))
        rows_RD = ops.grouped_linear(hidden_RH, offsets_P1, experts.down_PDH)
        return ops.combine(rows_RD, row_NK, cell_R, weight_R)

    return run


def mlp(experts: Experts) -> Form:
    """brt's one operator for all of it."""

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        return ops.expert_mlp(*mlp_arguments(experts, x_ND, choice_NK, weight_NK))

    return run


def mlp_arguments(
    experts: Experts, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor
) -> tuple[Any, ...]:
    """Arguments of `brt.ops.expert_mlp`, with the route made."""
    cell_R, row_NK, offsets_P1, weight_R = _route(choice_NK, weight_NK, experts.num_paths)
    return (
        x_ND, cell_R, row_NK, offsets_P1, weight_R, experts.up_PHD, None, experts.down_PDH, None,
        experts.activation,
    )  # fmt: skip


def dense(experts: Experts, num_rows: int, train: bool = False) -> Form:
    """One pair of products of as many operations; with its backward where that is timed."""
    one = Experts(
        experts.up_PHD[:1].detach().clone().requires_grad_(train),
        experts.down_PDH[:1].detach().clone().requires_grad_(train),
        experts.activation,
    )
    rows_RD = torch.ones_like(one.up_PHD[0, :1]).repeat(num_rows, 1)
    rows_RD = rows_RD.detach().requires_grad_(train)
    grad_RD = torch.ones_like(one.each()[0](rows_RD)).detach()

    def run(*_: Tensor) -> Any:
        out_RD = one.each()[0](rows_RD)
        if not train:
            return out_RD
        return torch.autograd.grad(out_RD, [rows_RD, one.up_PHD, one.down_PDH], grad_RD)

    return run


def stream(experts: Experts, num_used: int) -> Form:
    """Reading the weights of the experts that are used, once."""
    # As 4-byte words: a sum of 2-byte floats is bound by their conversion, not by memory
    both = (experts.up_PHD, experts.down_PDH)
    words = [weight[:num_used].reshape(-1).view(torch.float32) for weight in both]
    return lambda *_: [word.sum() for word in words]


def trained(form: Form, weights: tuple[Tensor, ...], grad_ND: Tensor) -> Form:
    """Forward and backward: (output, gradients of x, of the gate's weights, of the weights)."""

    def run(x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> tuple[Tensor, ...]:
        x_ND = x_ND.detach().requires_grad_()
        weight_NK = weight_NK.detach().requires_grad_()
        out_ND = form(x_ND, choice_NK, weight_NK)
        grads = torch.autograd.grad(out_ND, [x_ND, weight_NK, *weights], grad_ND.to(out_ND.dtype))
        return out_ND.detach(), *grads

    return run


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
