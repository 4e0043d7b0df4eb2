"""`path_sizes`: the one place where loads come to the host.

Legend: P paths.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from brt import checks
from brt._inductor import allow_unbacked_convolutions
from brt.ops.registry import Operator

_PATH_SIZES = Operator("path_sizes", "(Tensor offsets_P1) -> Tensor[]")


def path_sizes(offsets_P1: Tensor) -> tuple[int, ...]:
    """Loads of the paths on the host, by one read of the device.

    In a traced graph the operator returns P empty tensors ``[load_p, 0]``: their shapes carry the
    loads as data-dependent sizes, which ``torch.compile`` and ``torch.export`` understand without
    a graph break, and without a read for each path.
    """
    if type(offsets_P1) is Tensor and not torch.compiler.is_compiling():
        loads = offsets_P1.tolist()
        checks.raise_found(offsets_P1.device)  # the host has just waited
        return tuple(b - a for a, b in itertools.pairwise(loads))
    carriers = torch.ops.brt.path_sizes(offsets_P1)
    return tuple(carrier.shape[0] for carrier in carriers)


@torch.library.register_fake("brt::path_sizes")
def _(offsets_P1: Tensor) -> list[Tensor]:
    allow_unbacked_convolutions()
    ctx = torch.library.get_ctx()
    num_paths = offsets_P1.shape[0] - 1
    return [offsets_P1.new_empty((ctx.new_dynamic_size(), 0)) for _ in range(num_paths)]
