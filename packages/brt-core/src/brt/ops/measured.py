"""Which kernel of an operator is fastest for the calls that a model makes: measured, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from brt import tuning
from brt.ops import registry
from brt.race import Objective, race
from brt.tuning import Choice, Store

Calls = dict[tuple[Any, ...], tuple[Any, ...]]
"""{(operator, its signature): the arguments of the first such call}."""


@dataclass(frozen=True)
class KernelChoice:
    """What was measured for the calls of one operator with arguments of one class.

    Attributes:
        op: name of the operator.
        arguments: in words.
        kernel: that was chosen.
        microseconds: {kernel: median of a call}, of all that take the call; by the objective.
    """

    op: str
    arguments: str
    kernel: str
    microseconds: Mapping[str, float]


@contextmanager
def watching() -> Iterator[Calls]:
    """The calls of operators with several kernels that are made in the block, in this process."""
    calls: Calls = {}

    def seen(op: str, args: tuple[Any, ...]) -> None:
        calls.setdefault((op, *registry.signature(args)), args)

    registry.WATCHERS.append(seen)
    try:
        yield calls
    finally:
        registry.WATCHERS.remove(seen)


def measure(calls: Calls, objective: Objective, store: Store | None) -> list[KernelChoice]:
    """Run every kernel that takes a call, prefer the best from now on, and keep it in the store."""
    found = []
    for (op, *signature), args in calls.items():
        device = registry._device_of(args)
        specs = [spec for spec, _ in registry.OPERATORS[op].kernels(device)]
        specs = [spec for spec in specs if spec.refuses(*args) is None]
        if len(specs) < 2:
            continue
        runs: list[Callable[[], Any]] = [partial(spec.forward, *args) for spec in specs]
        with torch.no_grad():
            seconds = race(runs, _where(args), objective=objective)
        best = min(range(len(specs)), key=seconds.__getitem__)
        times = {spec.name: 1e6 * s for spec, s in zip(specs, seconds, strict=True)}
        choice = KernelChoice(op, registry._describe(args), specs[best].name, times)
        registry.remember(op, args, choice.kernel)
        if store is not None:
            _keep(store, choice, tuple(signature), _where(args), objective)
        found.append(choice)
    return found


def load(store: Store | None) -> int:
    """Prefer the kernels that the store knows for this machine; returns how many."""
    if store is None:
        return 0
    found = 0
    for choice in store.choices("kernel"):
        value = choice.value
        try:
            here = value["versions"] == list(tuning.versions())
            if here and choice.device == tuning.device_name(value["device"]):
                registry.remember_signature(
                    value["op"], _decoded(value["signature"]), value["kernel"]
                )
                found += 1
        except (RuntimeError, AssertionError):  # a device that this process does not see
            continue
    return found


def _keep(
    store: Store,
    choice: KernelChoice,
    signature: tuple[Any, ...],
    device: torch.device,
    objective: Objective,
) -> None:
    value = {
        "op": choice.op,
        "signature": _encoded(signature),
        "kernel": choice.kernel,
        "microseconds": dict(choice.microseconds),
        "objective": objective,
        "device": device.type,
        "versions": list(tuning.versions()),
    }
    name = tuning.device_name(device)
    key = tuning.key_of(
        "kernel", name, tuning.versions(), choice.op, json.dumps(value["signature"])
    )
    what = f"brt::{choice.op}({choice.arguments}): {choice.kernel}, by {objective}"
    store.put(key, Choice("kernel", name, what, value))


def _encoded(value: Any) -> Any:
    """A signature as JSON can hold it."""
    if isinstance(value, (tuple, list)):
        return [_encoded(one) for one in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(one) for one in value)
    return getattr(torch, value["dtype"]) if isinstance(value, dict) else value


def _where(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        for one in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(one, Tensor):
                return one.device
    raise AssertionError("an operator of brt takes a tensor")
