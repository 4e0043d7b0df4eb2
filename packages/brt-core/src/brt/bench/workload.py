"""What a benchmark is: inputs, and several ways to compute the same thing from them.

A package registers a workload through the hook that brt-core's own come by. ``shapes`` is free
text; options of the factory are options of the command, with the types of their defaults
(``brt bench acme-scale --option n=4096``)::

    import brt, torch
    from brt.bench import Variant, Workload

    def scale(device, dtype, *, n=1024):
        sets = [(torch.randn(n, 64, device=device, dtype=dtype),) for _ in range(4)]
        buffer = torch.empty_like(sets[0][0])
        return Workload(
            name="acme-scale", shapes=f"N={n} D=64", device=device, dtype=dtype, sets=sets,
            reference=lambda x: x.double() * 2, tolerance=1e-6,
            variants=[
                Variant(name="x + x", kind="eager", make=lambda: lambda x: x + x),
                Variant(name="compiled", kind="peer", make=lambda: torch.compile(lambda x: x + x)),
                Variant(name="acme", kind="brt", make=lambda: acme.scale),
                Variant(name="copy", kind="limit", make=lambda: buffer.copy_, num_bytes=n * 512),
            ],
        )

    @brt.hookimpl
    def brt_workloads():
        yield brt.WorkloadSpec(name="acme-scale", summary="twice x", factory=scale)

``make`` is not timed: it loads, compiles and allocates, and returns what is called with each of
``sets`` in turn. It raises `Unavailable` where the variant cannot run here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from brt.errors import BrtError

Kind = Literal["eager", "peer", "brt", "limit", "oracle", "part"]
Mode = Literal["inference", "no_grad", "grad"]

COMPETITORS = ("eager", "peer")
"""Kinds of which the fastest is the best peer."""
UNCHECKED = ("limit", "part")
"""Kinds whose outputs are not those of the workload."""


class Unavailable(Exception):  # noqa: N818 - not an error: the row says why it has no numbers
    """Raised by `Variant.make`: this way cannot be taken here, and why."""


def _whole(output: Any) -> Any:
    return output


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a workload.

    Attributes:
        name: what its row is called.
        kind: "eager" is plain torch, to which every row is compared (the first that is right);
            "peer" what people use instead; "brt" ours; "limit" what the machine cannot pass (a
            copy of the same bytes, a dense product of the same operations; of several, the slowest
            binds); "oracle" knows what a real run cannot; "part" is a step that is reported apart.
        make: untimed setup; returns what is timed.
        checks: whether the output is compared with the reference; None: unless a limit or a part.
        outcome: what of the output is compared.
        num_bytes: bytes read and written by one run, for GB/s.
        flops: floating-point operations of one run, for GFLOP/s.
        replay: on CUDA, time it a second time as the replay of a CUDA graph.
        detail: a few words for the row, or a function that is asked after the first run.
    """

    name: str
    kind: Kind
    make: Callable[[], Callable[..., Any]]
    checks: bool | None = None
    outcome: Callable[[Any], Any] = _whole
    num_bytes: float | None = None
    flops: float | None = None
    replay: bool = False
    detail: str | Callable[[], str] = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BrtError(
                f"variant {self.name!r}: kind {self.kind!r}; there are {', '.join(get_args(Kind))}"
            )

    @property
    def is_checked(self) -> bool:
        """Whether its output must be that of the workload."""
        return self.kind not in UNCHECKED if self.checks is None else self.checks


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Inputs, the ways to compute, and what is right.

    Attributes:
        name: kebab-case, that of its spec.
        shapes: sizes as text: "N=4096 P=64".
        device: where it runs.
        dtype: of the data.
        sets: argument tuples; each run gets the next. More than one lets a workload go beyond the
            last-level cache (`num_sets_beyond_cache`): then as many outputs are kept alive too.
        variants: the rows, in their order.
        reference: the right outcome for one set, best in float64; None: nothing is checked.
        tolerance: the largest error allowed: largest absolute difference over the largest
            magnitude of the reference, the worst of the outcome's tensors.
        options: those it was made with.
        mode: what autograd does while it runs.
        is_uneven: whether sets cost differently (images that leave at different exits): then a
            sample is the mean of one run of each; a median over runs would be that of one set.
    """

    name: str
    shapes: str
    device: torch.device
    dtype: torch.dtype
    sets: Sequence[tuple[Any, ...]]
    variants: Sequence[Variant]
    reference: Callable[..., Any] | None = None
    tolerance: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: Mode = "inference"
    is_uneven: bool = False

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BrtError(f"workload {self.name!r}: two variants are called {', '.join(twice)}")
        if not self.sets or not self.variants:
            raise BrtError(f"workload {self.name!r} needs at least one set and one variant")
        if self.mode not in get_args(Mode):
            raise BrtError(f"workload {self.name!r}: mode must be one of {get_args(Mode)}")

    def only(self, patterns: Sequence[str]) -> Sequence[Variant]:
        """The variants whose names match one of these (regular expressions, anywhere)."""
        if not patterns:
            return self.variants
        found = [v for v in self.variants if any(re.search(p, v.name) for p in patterns)]
        if not found:
            names = ", ".join(variant.name for variant in self.variants)
            raise BrtError(f"no variant of {self.name!r} matches {list(patterns)}; it has: {names}")
        return found
