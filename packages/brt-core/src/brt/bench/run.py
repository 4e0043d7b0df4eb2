"""From the name of a workload to its result."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from brt import plugins
from brt.bench.result import Result
from brt.bench.runner import Progress, measure
from brt.bench.settings import Instruments, Settings
from brt.bench.workload import Workload
from brt.errors import BrtError
from brt.specs import WorkloadSpec

_GIVEN = ("device", "dtype")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def run(
    workload: Workload | WorkloadSpec | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
    variants: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress | None = None,
    instruments: Instruments | None = None,
) -> Result:
    """Measure a workload, its spec or its name; `print` the result.

    ``device``, ``dtype`` and ``options`` make the workload where it is not made yet. ``variants``
    are regular expressions: the rows whose names match one. On a machine that is shared while it
    runs, ``result.disturbed`` is True, and the numbers say nothing.
    """
    if not isinstance(workload, Workload):
        workload = make_workload(workload, device, dtype, options or {})
    return measure(
        workload,
        settings=settings,
        variants=variants,
        progress=progress,
        instruments=instruments,
    )


def make_workload(
    spec: WorkloadSpec | str,
    device: torch.device | str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> Workload:
    """The workload of a spec; options may be text, which takes the type of the default."""
    if isinstance(spec, str):
        spec = cast(WorkloadSpec, plugins.get("workloads", spec))
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BrtError(f"device {str(device)!r}: torch {torch.__version__} finds no CUDA device")
    known = {name: p for name, p in spec.options.items() if name not in _GIVEN}
    values = {}
    for name, value in options.items():
        if name not in known:
            there = ", ".join(known) or "none"
            raise BrtError(
                f"workload {spec.name!r} has no option {name!r}"
                f"{plugins.did_you_mean(name, known)}; there are: {there}"
            )
        values[name] = parsed(name, value, known[name].default)
    workload = spec.factory(device, dtype, **values)
    if not isinstance(workload, Workload):
        raise BrtError(f"{spec} must make a brt.bench.Workload, got {type(workload).__name__}")
    return workload


def parsed(name: str, value: Any, default: Any) -> Any:
    """Text as a value of the type of ``default``; what is no text stays as it is."""
    if not isinstance(value, str) or default is inspect.Parameter.empty:
        return value
    if isinstance(default, bool):
        if value.lower() not in _TRUE + _FALSE:
            raise BrtError(f"option {name}={value}: expected true or false")
        return value.lower() in _TRUE
    if isinstance(default, int | float):
        try:
            return type(default)(value)
        except ValueError:
            raise BrtError(f"option {name}={value}: expected {_article(default)}") from None
    return value


def _article(default: int | float) -> str:
    return "an integer" if isinstance(default, int) else "a number"
