"""ExpertRouter: cells to stacked experts and back, where the model's own gate has decided.

Legend: N cells, P paths (experts), K choices per cell, R routed rows, D model and H hidden
features (up has 2H rows where it is gated).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from brt import ops
from brt.decision import Decision
from brt.errors import RouteError
from brt.ops.grouped_linear import activate
from brt.route import Route, make_route
from brt.routers.base import Router

Activation = str | Callable[[Tensor], Tensor]


class ExpertRouter(Router):
    """A sparse MLP from cells to cells: scatter, two linear layers on each path, weighted gather.

    ``forward(x_ND, choice_NK, weight_NK, up_PHD, down_PDH)`` takes the choices that a gate made
    (int64, -1 = none, no path twice in a row), their weights, and the experts' stacked weights. It
    holds no parameters, so that it fits into modules of other libraries. Nothing waits for the
    loads where the kernels do not (`brt.ops.explain`). Profiles see its routes.

    Args:
        num_paths: P.
    """

    def __init__(self, num_paths: int) -> None:
        super().__init__()
        if num_paths < 1:
            raise RouteError(f"ExpertRouter: num_paths must be at least 1, got {num_paths}")
        self.num_paths = num_paths

    def forward(
        self,
        x_ND: Tensor,
        choice_NK: Tensor,
        weight_NK: Tensor | None,
        up_PHD: Tensor,
        down_PDH: Tensor,
        *,
        up_bias_PH: Tensor | None = None,
        down_bias_PD: Tensor | None = None,
        activation: Activation = "swiglu",
    ) -> Tensor:
        """``[N, D]`` -> ``[N, D]``.

        ``activation`` is a name that `brt.ops.expert_mlp` knows, or any function from what ``up``
        gives to what ``down`` takes; that one runs unfused. Weights may be transposed views.
        """
        for what, stacked in (("up", up_PHD), ("down", down_PDH)):
            if stacked.ndim != 3 or stacked.shape[0] != self.num_paths:
                raise RouteError(
                    f"ExpertRouter: {what} must hold {self.num_paths} experts [P, out, in], got "
                    f"{list(stacked.shape)}"
                )
        decision = Decision(self.num_paths, choice_NK=choice_NK, weight=weight_NK)
        route = make_route(decision, x_ND.shape[0])
        self._observe(route, choice_NK)
        if isinstance(activation, str) and not _is_transposed(up_PHD, down_PDH):
            return ops.expert_mlp(
                x_ND, route.cell_R, route.row_NK, route.offsets_P1, route.weight_R, up_PHD,
                up_bias_PH, down_PDH, down_bias_PD, activation,
            )  # fmt: skip
        rows_RD = ops.dispatch(x_ND, route.cell_R, route.row_NK)
        hidden_RH = _activate(_linear(rows_RD, route, up_PHD, up_bias_PH), activation)
        rows_RD = _linear(hidden_RH, route, down_PDH, down_bias_PD)
        return ops.combine(rows_RD, route.row_NK, route.cell_R, route.weight_R)

    def extra_repr(self) -> str:
        """How many paths."""
        return f"num_paths={self.num_paths}"


def _is_transposed(*weights_POI: Tensor) -> bool:
    return any(w.stride(1) == 1 and w.stride(2) != 1 for w in weights_POI)


def _linear(rows_RI: Tensor, route: Route, weight_POI: Tensor, bias_PO: Tensor | None) -> Tensor:
    if bias_PO is None or not _is_transposed(weight_POI):
        return ops.grouped_linear(rows_RI, route.offsets_P1, weight_POI, bias_PO)
    # The kernels read a transposed weight as it lies only where nothing follows the product
    rows_RO = ops.grouped_linear(rows_RI, route.offsets_P1, weight_POI)
    with_none_PO = F.pad(bias_PO, (0, 0, 0, 1))
    return rows_RO + with_none_PO[route.path_R().clamp(max=route.num_paths)]


def _activate(rows_RH: Tensor, activation: Activation) -> Tensor:
    if not isinstance(activation, str):
        return activation(rows_RH)
    if activation == "swiglu":
        gate_RH, up_RH = rows_RH.chunk(2, -1)
        return F.silu(gate_RH) * up_RH
    return activate(rows_RH, activation)
