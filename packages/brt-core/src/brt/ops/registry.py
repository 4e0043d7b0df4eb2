"""How an operator of brt is defined, and how one call of it finds its kernel.

Every operator is a ``torch.library`` operator of namespace ``brt``, so graphs, exports and
``torch.compile`` see one node whichever kernel runs. The kernel is chosen inside, at call time.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brt import checks, plugins
from brt.errors import KernelError
from brt.specs import KernelSpec
from brt.tuning import size_class

LIBRARY = torch.library.Library("brt", "DEF")
OPERATORS: dict[str, Operator] = {}

# What a call may hold on its way around the dispatcher: no subclasses, proxies or symbols
_TENSORS = (Tensor, nn.Parameter)
_VALUES = (type(None), int, float, bool, str)
# Lists of more are counted in messages, not shown
_LONG = 4
# Not a ContextVar: the backward of CUDA work runs on a thread of autograd's
_used: str | None = None
_from_environment = os.environ.get("BRT_OPS") or None
# (operator, signature of the arguments) -> name of the kernel that measured fastest
_measured: dict[tuple[Any, ...], str] = {}
WATCHERS: list[Callable[[str, tuple[Any, ...]], None]] = []
"""Called with the operator's name and the arguments of every call (`brt.ops.measured`)."""


@dataclass(frozen=True)
class Candidate:
    """One kernel for one call: what `explain` prints a line of."""

    name: str
    owner: str
    microseconds: float | None
    refusal: str | None
    chosen: bool = False


@dataclass(frozen=True)
class Explanation:
    """Why one call of an operator runs the kernel that it runs."""

    op: str
    arguments: str
    candidates: tuple[Candidate, ...]
    reason: str

    @property
    def chosen(self) -> str | None:
        """Name of the kernel that runs; None where all refuse."""
        return next((c.name for c in self.candidates if c.chosen), None)

    def __str__(self) -> str:
        what = f"{self.chosen}, {self.reason}" if self.chosen else "every kernel refuses"
        lines = [f"{self.op}({self.arguments}): {what}"]
        width = max(len(c.name) for c in self.candidates)
        for c in self.candidates:
            if c.refusal is not None:
                what = f"refused: {c.refusal}"
            else:
                what = f"about {c.microseconds:.0f} us" + (", chosen" if c.chosen else "")
            lines.append(f"  {c.name:<{width}}  {what}  ({c.owner})")
        return "\n".join(lines)


class Operator:
    """One operator ``brt::<name>``: its schema, and the choice of its kernel at each call."""

    def __init__(self, name: str, schema: str) -> None:
        self.name = name
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self.run, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.brt, name).default
        self.summary = ""
        self._kernels: dict[str, list[tuple[KernelSpec, str]]] = {}
        self._generation = -1
        OPERATORS[name] = self

    def kernels(self, device: str) -> list[tuple[KernelSpec, str]]:
        """(spec, owner) of every kernel registered for a device type, by name."""
        if self._generation != plugins.generation():
            self._kernels.clear()
            self._generation = plugins.generation()
        found = self._kernels.get(device)
        if found is None:
            found = self._kernels[device] = plugins.kernels(self.name, device)
            if not found:
                raise KernelError(
                    f"brt::{self.name}: no kernel for device {device!r}; there is a reference for "
                    "every device in brt-core: is BRT_PLUGINS hiding the built-ins?"
                )
        return found

    def __call__(self, *args: Any) -> Any:
        """One call from Python: `overload`, or straight to the kernel where that is the same.

        The way through the dispatcher and its autograd rule in Python takes 10 us, as long as a
        small kernel; nothing on it acts on plain tensors that nobody differentiates or watches.
        """
        return self.run(*args) if _unwatched(args) else self.overload(*args)

    def run(self, *args: Any) -> Any:
        """The operator itself: choose a kernel for these arguments and run its forward."""
        out = self.choose(args).forward(*args)
        if checks.at_once():
            checks.raise_found(torch.device(_device_of(args)), wait=True)
        return out

    def choose(self, args: tuple[Any, ...]) -> KernelSpec:
        """The kernel for these arguments; an error that lists every refusal where none fits."""
        for watcher in WATCHERS:
            watcher(self.name, args)
        spec, _ = self._choose(args)
        if spec is None:
            raise KernelError(f"no kernel takes this call\n{self.explain(*args)}")
        return spec

    def _choose(self, args: tuple[Any, ...]) -> tuple[KernelSpec | None, str]:
        kernels = self.kernels(_device_of(args))
        wanted = _used or _from_environment
        if wanted is not None:
            named = self._named(wanted, kernels, args)
            if named is not None:
                return named, "named by the user"
        if len(kernels) == 1:
            return kernels[0][0], "the only one"
        if _measured:
            name = _measured.get((self.name, *signature(args)))
            for spec, _ in kernels:
                if spec.name == name and spec.refuses(*args) is None:
                    return spec, "measured fastest"
        best, best_time = None, float("inf")
        for spec, _ in kernels:  # sorted by name: the first of equals wins
            if spec.refuses(*args) is None:
                time = spec.estimate(*args)
                if time < best_time:
                    best, best_time = spec, time
        return best, "lowest estimate"

    def _named(
        self, wanted: str, kernels: list[tuple[KernelSpec, str]], args: tuple[Any, ...]
    ) -> KernelSpec | None:
        for spec, _ in kernels:
            if spec.name == wanted:
                refusal = spec.refuses(*args)
                if refusal is not None:
                    raise KernelError(
                        f"brt::{self.name}: kernel {wanted!r} was named and refuses "
                        f"{_describe(args)}: {refusal}"
                    )
                return spec
        known = {spec.name for op in OPERATORS.values() for spec, _ in op.kernels("cpu")}
        known |= {spec.name for op in OPERATORS.values() for spec, _ in op.kernels("cuda")}
        if wanted not in known:
            raise KernelError(f"no kernel named {wanted!r}; there are: {', '.join(sorted(known))}")
        return None  # a kernel of other operators: this one chooses as always

    def explain(self, *args: Any) -> Explanation:
        """Every candidate for these arguments, with its estimate or its refusal."""
        args = self._with_defaults(args)
        chosen, reason = self._choose(args)
        rows = []
        for spec, owner in self.kernels(_device_of(args)):
            refusal = spec.refuses(*args)
            time = spec.estimate(*args) if refusal is None else None
            rows.append(Candidate(spec.name, owner, time, refusal, spec is chosen))
        return Explanation(f"brt::{self.name}", _describe(args), tuple(rows), reason)

    def _with_defaults(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # The schemas have none: the dispatcher would leave out arguments equal to their defaults
        if len(args) == len(self.overload._schema.arguments):
            return args
        from brt import ops

        bound = inspect.signature(getattr(ops, self.name)).bind(*args)
        bound.apply_defaults()
        return bound.args


def call(name: str, *args: Any) -> Any:
    """The operator of this name, from another operator's gradient."""
    return OPERATORS[name](*args)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run every operator on the kernel of this name inside the block, where it has one.

    ``use("reference")`` is the plain-torch specification. A kernel that refuses the arguments is
    an error here, not a silent fallback. An operator that has no kernel of this name chooses as
    always. It holds for the whole process, because backward passes run on threads of their own.
    """
    global _used
    before, _used = _used, name
    try:
        yield
    finally:
        _used = before


def explain(op: str, *args: Any) -> Explanation:
    """Why ``brt::op(*args)`` would run the kernel that it would run: `print` the result."""
    if op not in OPERATORS:
        raise KernelError(f"no operator brt::{op}; there are: {', '.join(sorted(OPERATORS))}")
    return OPERATORS[op].explain(*args)


def remember(op: str, args: tuple[Any, ...], name: str) -> None:
    """Prefer a kernel, by measurement, for calls with arguments of this signature."""
    remember_signature(op, signature(args), name)


def remember_signature(op: str, of: tuple[Any, ...], name: str) -> None:
    """`remember`, by the signature itself."""
    _measured[(op, *of)] = name


def forget() -> None:
    """Drop every measured choice."""
    _measured.clear()


def signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a measured choice depends on: dtypes, devices and shapes of tensors; other values.

    The size of dim 0, which changes from call to call, is rounded up to a power of two.
    """
    return tuple(
        (a.dtype, a.device.type, (size_class(a.shape[0]), *a.shape[1:]) if a.ndim else ())
        if isinstance(a, Tensor)
        else signature(tuple(a))
        if isinstance(a, (list, tuple))
        else a
        for a in args
    )


def _unwatched(args: tuple[Any, ...]) -> bool:
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return _plain(args, torch.is_grad_enabled()) and not torch.is_autocast_enabled(_device_of(args))


def _plain(args: Sequence[Any], with_grad: bool) -> bool:
    for a in args:
        kind = type(a)
        if kind in _TENSORS:
            if with_grad and a.requires_grad:
                return False
        elif kind is list or kind is tuple:  # of tensors, or of hundreds of numbers
            if len(a) > 0 and type(a[0]) not in _VALUES and not _plain(a, with_grad):
                return False
        elif kind not in _VALUES:
            return False
    return True


def _device_of(args: tuple[Any, ...]) -> str:
    for a in args:
        if isinstance(a, Tensor):
            return a.device.type
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device.type
    raise KernelError("an operator of brt needs at least one tensor")


def _describe(args: tuple[Any, ...]) -> str:
    def one(a: Any) -> str:
        if isinstance(a, Tensor):
            return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)} {a.device.type}"
        if isinstance(a, (list, tuple)) and len(a) > _LONG:
            return f"{len(a)} {'tensors' if isinstance(a[0], Tensor) else 'values'}"
        return "[" + ", ".join(map(one, a)) + "]" if isinstance(a, (list, tuple)) else repr(a)

    return ", ".join(map(one, args))
