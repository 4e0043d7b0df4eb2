"""Families of transformers whose experts are kept in ways of their own, each with its forward.

Legend: B S batch and sequence, N tokens (B * S), K choices per token, P paths (experts), D model
and H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import brt
from brt import ops
from brt.protocols import TopK
from brt_models.adapters.take_over import ROUTER, take_over


class Switch(nn.Module):
    """SwitchTransformersSparseMLP: experts are modules; every token goes to at most one.

    As transformers has it: since 5.0 its router's capacity never binds.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``."""
        me: Any = self
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, taken_NKP, weight_NK = me.router(x_ND)
        # A weight that is exactly 0 adds nothing: such a token takes no path
        scores_NP = (taken_NKP * weight_NK[..., None]).sum(1)
        paths, route = me.brt_scatter(x_ND, scores_NP)
        out_ND = me.brt_gather(brt.each(me.experts.values(), paths), route)
        return out_ND.to(hidden_states.dtype).view(hidden_states.shape)


class Dbrx(nn.Module):
    """DbrxExperts: three weights of all experts one below the other, the last transposed."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[B, S, D]``, choices ``[N, K]`` -> ``[B, S, D]``."""
        me: Any = self
        mlp = me.mlp
        shape = (me.num_experts, me.ffn_hidden_size, me.hidden_size)
        x_ND = hidden_states.reshape(-1, me.hidden_size)
        w1_PHD, v1_PHD, w2_PHD = (w.view(shape) for w in (mlp.w1, mlp.v1, mlp.w2))
        up_PHD = torch.cat([w1_PHD, v1_PHD], 1)

        def gate(x_RH: Tensor) -> Tensor:
            gate_RH, up_RH = x_RH.chunk(2, -1)
            return mlp.activation_fn(gate_RH) * up_RH

        router: brt.ExpertRouter = getattr(self, ROUTER)
        out_ND = router(
            x_ND, top_k_index, top_k_weights, up_PHD, w2_PHD.transpose(1, 2), activation=gate
        )
        return out_ND.to(x_ND.dtype).view(hidden_states.shape[0], -1, me.hidden_size)


class Aria(nn.Module):
    """AriaExperts: both weights are transposed, and the router's scores come unsorted."""

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """``[N, D]`` and scores ``[N, P]`` -> ``[N, D]``."""
        me: Any = self
        choice_NK, weight_NK = me.route_tokens_to_experts(router_logits)
        weights = (me.fc1.weight.transpose(1, 2), me.fc2.weight.transpose(1, 2))
        router: brt.ExpertRouter = getattr(self, ROUTER)
        return router(hidden_states, choice_NK, weight_NK, *weights, activation="swiglu")


class JetMoe(nn.Module):
    """JetMoeMoE: the gate picks by itself and sorts; the sorting is not needed."""

    def forward(self, layer_input: Tensor) -> Tensor:
        """``[B, S, D]`` -> ``[B, S, D]``."""
        me: Any = self
        x_ND = layer_input.reshape(-1, layer_input.shape[-1])
        logits_NP = me.router.layer(x_ND).float()
        score_NK, choice_NK = logits_NP.topk(me.router.top_k, dim=1)
        weight_NK = torch.softmax(score_NK, dim=1).type_as(x_ND)

        def gate(x_RH: Tensor) -> Tensor:
            gate_RH, up_RH = x_RH.chunk(2, -1)
            return me.activation(gate_RH) * up_RH

        router: brt.ExpertRouter = getattr(self, ROUTER)
        weights = (me.input_linear.weight, me.output_linear.weight)
        out_ND = router(x_ND, choice_NK, weight_NK, *weights, activation=gate)
        return out_ND.to(x_ND.dtype).view(layer_input.shape) + me.bias


class Llama4(nn.Module):
    """Llama4TextMoe: tokens are weighted on the way in, and zero for experts not chosen.

    Experts have no bias, so that those can be left out.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, D]`` -> (``[N, D]``, the router's scores)."""
        me: Any = self
        x_ND = hidden_states.reshape(-1, me.hidden_dim)
        scores_NP, logits_NP = me.router(x_ND)
        rows_RD, route = me.brt_scatter(x_ND, scores_NP)
        up_PHD = me.experts.gate_up_proj.transpose(1, 2)
        gate_RH, up_RH = ops.grouped_linear(rows_RD, route.offsets_P1, up_PHD).chunk(2, 1)
        hidden_RH = up_RH * me.experts.act_fn(gate_RH)
        down_PDH = me.experts.down_proj.transpose(1, 2)
        rows_RD = ops.grouped_linear(hidden_RH, route.offsets_P1, down_PDH)
        return me.shared_expert(x_ND) + me.brt_gather(rows_RD, route), logits_NP


@dataclass(frozen=True)
class Family:
    """How a module of a family is told, and what it needs to run as brt's."""

    cls: str
    """Name of the class in transformers."""
    needs: tuple[str, ...]
    """Attributes that the forward reads."""
    forward_of: type[nn.Module]
    routers: Callable[[Any], dict[str, nn.Module]]

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this family."""
        of_family = type(module).__name__ == self.cls and not isinstance(module, self.forward_of)
        return of_family and all(hasattr(module, name) for name in self.needs)

    def adapt(self, module: nn.Module) -> nn.Module:
        """The same module, run by brt."""
        return take_over(module, self.forward_of, **self.routers(module))


def _expert_router(num_paths: int) -> dict[str, nn.Module]:
    return {ROUTER: brt.ExpertRouter(num_paths)}


FAMILIES = (
    Family(
        "SwitchTransformersSparseMLP",
        ("router", "experts"),
        Switch,
        lambda m: {
            "brt_scatter": brt.ScatterRouter(TopK(1), len(m.experts)),
            "brt_gather": brt.GatherRouter(),
        },
    ),
    Family(
        "DbrxExperts",
        ("mlp", "num_experts", "ffn_hidden_size", "hidden_size"),
        Dbrx,
        lambda m: _expert_router(m.num_experts),
    ),
    Family(
        "AriaExperts",
        ("fc1", "fc2", "route_tokens_to_experts"),
        Aria,
        lambda m: _expert_router(m.fc1.weight.shape[0]),
    ),
    Family(
        "JetMoeMoE",
        ("router", "input_linear", "output_linear", "activation", "bias"),
        JetMoe,
        lambda m: _expert_router(m.input_linear.num_experts),
    ),
    Family(
        "Llama4TextMoe",
        ("router", "experts", "shared_expert", "top_k", "hidden_dim"),
        Llama4,
        lambda m: {
            "brt_scatter": brt.ScatterRouter(
                TopK(m.top_k), m.num_experts, weighted=True, result="packed"
            ),
            "brt_gather": brt.GatherRouter(weighted=False),
        },
    ),
)

LEFT = {
    "NllbMoeSparseMLP": "transformers' own experts take the router's mask for ids of experts, so "
    "that all but two experts never run; brt does not repeat that",
    "DogeCDMoE": "its experts are rows of embeddings, not layers",
    "JetMoeMoA": "its experts are attention heads",
    "InklingSharedExperts": "no gate: every token takes all of them",
    "VitPoseNaiveMoe": "no gate: every expert runs, masked by the data set of the photo",
}
"""Classes of mixtures that stay as they are, and why."""


def leaves(module: nn.Module) -> str | None:
    """Why a module of a family is left alone."""
    return LEFT.get(type(module).__name__)
