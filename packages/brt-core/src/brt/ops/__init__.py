"""The operators of brt: what graphs contain, and how each call finds its kernel."""

from brt.conv_steps import ConvProgram
from brt.ops.combine import combine
from brt.ops.compact import compact
from brt.ops.conv_chain import conv_chain
from brt.ops.dispatch import dispatch, same_size
from brt.ops.expert_mlp import expert_mlp
from brt.ops.grouped_conv2d import grouped_conv2d
from brt.ops.grouped_linear import grouped_linear, grouped_outer
from brt.ops.path_sizes import path_sizes
from brt.ops.reference_kernels import REFERENCE_KERNELS
from brt.ops.registry import (
    OPERATORS,
    Candidate,
    Explanation,
    Operator,
    explain,
    forget,
    remember,
    use,
)
from brt.ops.route import route, route_mask
from brt.ops.row_dot import row_dot
from brt.ops.torch_kernels import TORCH_KERNELS

__all__ = [
    "OPERATORS",
    "REFERENCE_KERNELS",
    "TORCH_KERNELS",
    "Candidate",
    "ConvProgram",
    "Explanation",
    "Operator",
    "combine",
    "compact",
    "conv_chain",
    "dispatch",
    "expert_mlp",
    "explain",
    "forget",
    "grouped_conv2d",
    "grouped_linear",
    "grouped_outer",
    "path_sizes",
    "remember",
    "route",
    "route_mask",
    "row_dot",
    "same_size",
    "use",
]
