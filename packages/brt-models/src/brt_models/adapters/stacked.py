"""Experts whose weights are stacked in one parameter a layer, and called with a gate's choices.

That is how transformers 5 keeps nearly all its mixtures: ``gate_up_proj`` (or ``up_proj``) and
``down_proj``, ``forward(hidden_states, top_k_index, top_k_weights)``.

Legend: N cells, K choices per cell, P paths (experts), D model and H hidden features.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import brt
from brt_models.adapters.activations import Function, activation_of, gate_of
from brt_models.adapters.take_over import ROUTER, take_over


@dataclass(frozen=True, eq=False)
class Layout:
    """How a module keeps its experts.

    Attributes:
        up, down: names of the weights.
        transposed: whether they are ``[P, in, out]``.
        gated: whether ``up`` makes a gate and what it is multiplied with.
        activation: between them, as operators know it; None: what the module itself has.
        num_paths: experts that have weights.
        num_identity: experts after those that give back what they get.
    """

    up: str
    down: str
    transposed: bool
    gated: bool
    activation: str | None
    num_paths: int
    num_identity: int = 0

    @classmethod
    def of(cls, module: Any) -> Layout | str | None:
        """The layout of a module; why it has none that is known; None where it is no experts."""
        up = next((n for n in ("gate_up_proj", "up_proj") if _is_stacked(module, n)), None)
        if up is None or not _is_stacked(module, "down_proj"):
            return None
        if len(inspect.signature(type(module).forward).parameters) != 4:
            return None  # not tokens, choices and weights: a family of its own
        gated = getattr(module, "has_gate", up == "gate_up_proj")
        up_PHD, down_PDH = getattr(module, up), module.down_proj
        transposed = getattr(module, "is_transposed", False)
        num_paths, hidden, dim = _sizes(down_PDH, transposed)
        _num_all, rows, features = _sizes(up_PHD, transposed, up=True)
        if (rows, features) != (hidden * (2 if gated else 1), dim):
            return f"its weights do not fit together: {list(up_PHD.shape)}, {list(down_PDH.shape)}"
        function = _between(module, gated)
        if function is None:
            return "neither act_fn nor _apply_gate says what lies between its two layers"
        activation = gate_of(function) if gated else activation_of(function)
        num_identity = int(getattr(module, "zero_expert_num", 0) or 0)
        return cls(up, "down_proj", transposed, gated, activation, num_paths, num_identity)

    def weight(self, module: nn.Module, name: str) -> Tensor:
        """A weight as ``[P, out, in]``."""
        stacked: Tensor = getattr(module, name)[: self.num_paths]
        return stacked.transpose(1, 2) if self.transposed else stacked


class StackedExperts(nn.Module):
    """The forward of stacked experts, through `brt.ExpertRouter`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[N, D]``, choices ``[N, K]`` and their weights -> ``[N, D]``."""
        router: brt.ExpertRouter = getattr(self, ROUTER)
        return run_experts(self, router, hidden_states, top_k_index, top_k_weights)


def run_experts(
    module: nn.Module,
    router: brt.ExpertRouter,
    x_ND: Tensor,
    choice_NK: Tensor,
    weight_NK: Tensor,
) -> Tensor:
    """The mixture of a module whose experts are stacked; ids of no expert take no part."""
    layout = layout_of(module)
    with_weights_NK = torch.where(choice_NK < layout.num_paths, choice_NK, -1)
    biases = getattr(module, f"{layout.up}_bias", None), getattr(module, "down_proj_bias", None)
    out_ND = router(
        x_ND,
        with_weights_NK.long(),
        weight_NK,
        layout.weight(module, layout.up),
        layout.weight(module, layout.down),
        up_bias_PH=biases[0],
        down_bias_PD=biases[1],
        activation=layout.activation or _between(module, layout.gated),
    )
    if layout.num_identity:
        last = layout.num_paths + layout.num_identity
        identity_NK = (choice_NK >= layout.num_paths) & (choice_NK < last)
        share_N1 = (weight_NK * identity_NK).sum(1, keepdim=True)
        out_ND = out_ND + (x_ND * share_N1).to(out_ND.dtype)
    return out_ND.to(x_ND.dtype)


def layout_of(module: nn.Module) -> Layout:
    """The layout, found once a module."""
    found: Any = module.__dict__.get("_brt_layout")
    if found is None:
        found = Layout.of(module)
        if not isinstance(found, Layout):
            raise brt.BrtError(f"{type(module).__name__}: {found or 'no stacked experts'}")
        module.__dict__["_brt_layout"] = found
    return found


def matches(module: nn.Module) -> bool:
    """Whether a module keeps its experts like this."""
    return isinstance(Layout.of(module), Layout)


def leaves(module: nn.Module) -> str | None:
    """Why a module with stacked experts is left alone."""
    layout = Layout.of(module)
    return layout if isinstance(layout, str) else None


def adapt(module: nn.Module) -> nn.Module:
    """The same module, run by brt."""
    router = brt.ExpertRouter(layout_of(module).num_paths)
    return take_over(module, StackedExperts, **{ROUTER: router})


def _is_stacked(module: nn.Module, name: str) -> bool:
    weight = getattr(module, name, None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3


def _sizes(weight: Tensor, transposed: bool, up: bool = False) -> tuple[int, int, int]:
    """(P, hidden, model) sizes of a weight."""
    num_paths, rows, columns = weight.shape
    return (num_paths, rows, columns) if up != transposed else (num_paths, columns, rows)


def _between(module: Any, gated: bool) -> Function | None:
    """What the module has between its two layers."""
    function: Function | None = getattr(module, "act_fn", None)
    if not gated:
        return function
    if hasattr(module, "_apply_gate"):
        gate_function: Function = module._apply_gate
        return gate_function
    if function is None:
        return None

    def gate(x_RH: Tensor) -> Tensor:
        gate_RH, up_RH = x_RH.chunk(2, -1)
        return function(gate_RH) * up_RH

    return gate
