"""`check_kernel`: what a kernel promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brt import ops, plugins
from brt.hookspecs import hookimpl
from brt.passes.verify import cloned
from brt.specs import ANY_DEVICE, KernelSpec
from brt.testing.rules import Rules, describe, equal, tensors

_TOLERANCE = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


def check_kernel(
    spec: KernelSpec, calls: Sequence[tuple[Any, ...]], *, gradients: bool = True
) -> None:
    """Raise `AssertionError` at the first rule of kernels that this one breaks.

    ``calls`` are arguments of the operator (defaults may be left out), on the kernel's device; at
    least one of them must be accepted. Results, and with ``gradients`` the gradients of the
    operator that runs on this kernel, are compared with the reference's.
    """
    rules = Rules(f"kernel {getattr(spec, 'name', spec)!r}")
    rules.require(isinstance(spec, KernelSpec), "is a brt.KernelSpec")
    rules.require(
        spec.op in ops.OPERATORS,
        f"is for an operator of brt ({', '.join(sorted(ops.OPERATORS))})",
        f"got {spec.op!r}",
    )
    rules.require(spec.name != "reference", "has a name of its own, not 'reference'")
    operator = ops.OPERATORS[spec.op]
    num_taken = 0
    for i, given in enumerate(calls):
        args = operator._with_defaults(tuple(given))
        case = f"call {i}: {spec.op}({describe(args)})"
        device = next((t.device.type for t in tensors(args)), "none")
        rules.require(
            spec.device in (device, ANY_DEVICE), f"is called on its device, {spec.device}", case
        )
        with rules.holds(f"`refuses` answers for any arguments ({case})"):
            refusal = spec.refuses(*args)
        rules.require(
            refusal is None or (isinstance(refusal, str) and bool(refusal)),
            "`refuses` returns a reason, or None",
            f"{case}: {refusal!r}",
        )
        if refusal is not None:
            continue
        num_taken += 1
        _estimates(rules, spec, args, case)
        _computes(rules, spec, args, case)
        if gradients and any(t.is_floating_point() for t in tensors(args)):
            _differentiates(rules, spec, args, case)
    rules.require(num_taken > 0, "takes at least one of the calls", f"it refused all {len(calls)}")


def _estimates(rules: Rules, spec: KernelSpec, args: tuple[Any, ...], case: str) -> None:
    with rules.holds(f"`estimate` answers for what the kernel takes ({case})"):
        time = spec.estimate(*args)
    rules.require(
        isinstance(time, (int, float)) and math.isfinite(time) and time >= 0,
        "`estimate` returns microseconds",
        f"{case}: {time!r}",
    )
    blank = tuple(torch.zeros_like(a) if isinstance(a, Tensor) else a for a in args)
    rules.require(
        spec.refuses(*blank) is None and spec.estimate(*blank) == time,
        "`refuses` and `estimate` go by shapes only, not by values",
        case,
    )


def _computes(rules: Rules, spec: KernelSpec, args: tuple[Any, ...], case: str) -> None:
    kept = cloned(args)
    with torch.no_grad():
        wanted = _reference(spec, cloned(args))
        with rules.holds(f"runs what it does not refuse ({case})"):
            found = spec.forward(*args)
    rules.require(equal(args, kept), "leaves its arguments as they are", case)
    _compare(rules, found, wanted, "gives what the reference gives", case)


def _differentiates(rules: Rules, spec: KernelSpec, args: tuple[Any, ...], case: str) -> None:
    class Offer:
        @hookimpl
        def brt_kernels(self) -> list[KernelSpec]:
            return [spec]

    operator = ops.OPERATORS[spec.op]
    found = {}
    with plugins.using(Offer()):
        for name in ("reference", spec.name):
            leaves = [
                a.detach().clone().requires_grad_()
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in args
            ]
            with ops.use(name), rules.holds(f"runs under autograd ({case})"):
                out = operator.overload(*leaves)
                total = sum(
                    (t.double() * t.double()).sum() for t in tensors(out) if t.requires_grad
                )
                if not isinstance(total, Tensor):
                    return
                total.backward()
            found[name] = [a.grad for a in leaves if isinstance(a, Tensor) and a.grad is not None]
    _compare(
        rules, found[spec.name], found["reference"], "has the gradients of the reference", case, 10
    )


def _reference(spec: KernelSpec, args: tuple[Any, ...]) -> Any:
    with ops.use("reference"):
        return ops.OPERATORS[spec.op].run(*args)


def _compare(
    rules: Rules, found: Any, wanted: Any, rule: str, case: str, factor: float = 1.0
) -> None:
    ours, theirs = tensors(found), tensors(wanted)
    rules.require(len(ours) == len(theirs), rule, f"{case}: {describe(ours)}")
    for a, b in zip(ours, theirs, strict=True):
        rules.require(
            a.shape == b.shape and a.dtype == b.dtype,
            rule,
            f"{case}: {describe(a)} instead of {describe(b)}",
        )
        rtol, atol = _TOLERANCE.get(b.dtype, (0.0, 0.0))
        if not torch.allclose(a, b, rtol=factor * rtol, atol=factor * atol, equal_nan=True):
            most = float((a.double() - b.double()).abs().max())
            rules.require(False, rule, f"{case}: differs by up to {most:.3g}")
