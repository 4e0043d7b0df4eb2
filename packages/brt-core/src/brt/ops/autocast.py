"""The autocast rule of operators that multiply matrices: run in the autocast dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brt.ops.registry import LIBRARY, Operator


def register_autocast(operator: Operator, floats: tuple[int, ...]) -> None:
    """Cast the float arguments at these positions, as torch does for ``nn.Linear``.

    Operators without a rule keep the dtypes they are given.
    """
    for device in ("cpu", "cuda"):

        def cast(*args: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            given = [_cast(a, dtype) if i in floats else a for i, a in enumerate(args)]
            with torch.autocast(device, enabled=False):
                return operator.overload(*given)

        LIBRARY.impl(operator.name, cast, "AutocastCPU" if device == "cpu" else "AutocastCUDA")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or those of a list, in this dtype; float64 stays, as torch has it."""
    if isinstance(value, (list, tuple)):
        return [_cast(one, dtype) for one in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype != torch.float64 else value
