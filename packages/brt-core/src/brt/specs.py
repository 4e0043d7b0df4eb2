"""What plugins offer, and what brt's own parts offer through the same hooks.

A spec is a name, one line about it, and how to make it. Making is left to `factory`, so that
listing what there is imports nothing heavy.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from brt.errors import PluginError

if TYPE_CHECKING:
    from torch import nn

ANY_DEVICE = "any"

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def _accepts(*args: Any) -> None:
    """The `refuses` of a kernel that takes everything."""


def _require_callable(owner: str, field: str, value: object) -> None:
    if not callable(value):
        raise PluginError(f"{owner}: {field} must be callable, got {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What every spec has: a name of its kind, and one line for the lists that brt prints."""

    kind: ClassVar[str]
    hook: ClassVar[str]

    name: str
    """Kebab-case. Third parties start theirs with their own name: ``acme-...``."""
    summary: str

    def __post_init__(self) -> None:
        _require_kebab(type(self).__name__, self.name)
        if not isinstance(self.summary, str) or len(self.summary.strip().splitlines()) != 1:
            raise PluginError(f"{self}: the summary must be one line of text, got {self.summary!r}")

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.name!r}"

    @property
    def key(self) -> str:
        """What must be unique among the offers of a kind."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class Spec(Offer):
    """An offer that is made by calling its factory."""

    factory: Callable[..., Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_callable(str(self), "factory", self.factory)

    @classmethod
    def of(cls, made: type, **fields: Any) -> Self:
        """The spec of a class that carries its own `name` and opens with a docstring.

        The first line of the docstring is the summary; `fields` override or add.
        """
        given: dict[str, Any] = {
            "name": getattr(made, "name", None),
            "summary": inspect.cleandoc(made.__doc__ or "").partition("\n")[0].replace("``", ""),
            "factory": made,
        }
        return cls(**(given | fields))

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The factory's parameters by name; empty where Python cannot tell."""
        try:
            return dict(inspect.signature(self.factory).parameters)
        except (TypeError, ValueError):
            return {}


@dataclass(frozen=True, kw_only=True)
class ProtocolSpec(Spec):
    """A routing function: ``factory(**options) -> brt.protocols.Protocol``."""

    kind = "protocols"
    hook = "brt_protocols"

    paper: str = ""
    """Where the rule comes from."""

    @classmethod
    def of(cls, made: type, **fields: Any) -> Self:
        """The spec of a `Protocol` class, with the paper that it names."""
        return super().of(made, **({"paper": getattr(made, "paper", "")} | fields))


@dataclass(frozen=True, kw_only=True)
class RouterSpec(Spec):
    """A router: ``factory(**options) -> brt.routers.Router``."""

    kind = "routers"
    hook = "brt_routers"


@dataclass(frozen=True, kw_only=True)
class PassSpec(Spec):
    """A rewrite of a traced graph: ``factory(**options) -> brt.passes.Pass``."""

    kind = "passes"
    hook = "brt_passes"


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """A model: ``factory(**options) -> nn.Module``, which needs no option and no download.

    `sample` makes the positional arguments of one forward call: ``sample(seed=0) -> tuple``;
    another seed gives another batch. `pretrained` makes the model with the weights that ship
    with it, where there are any. `load` makes it of somebody's checkpoint, in eval mode, for
    ``brt load``: ``load(path, **options)`` raises `BrtError` with everything that does not fit.
    """

    kind = "models"
    hook = "brt_models"

    sample: Callable[..., tuple[Any, ...]]
    title: str = ""
    cells: str = ""
    """What is routed: "a token", "a 32x32 patch"."""
    paper: str = ""
    checkpoints: tuple[str, ...] = ()
    """Formats that the model loads: "huggingface", "safetensors"."""
    pretrained: Callable[[], nn.Module] | None = None
    load: Callable[..., nn.Module] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_callable(str(self), "sample", self.sample)
        for field in ("pretrained", "load"):
            if getattr(self, field) is not None:
                _require_callable(str(self), field, getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class AdapterSpec(Offer):
    """What makes brt routers and experts of another library's module.

    ``matches(module) -> bool`` looks at one module and changes nothing. ``adapt(module)`` returns
    the module to put in its place, which shares its parameters under the same names; it may be the
    same object, changed. ``leaves(module)`` may say why a module that looks like experts is none of
    this adapter's; None where there is nothing to say. ``opens(name)`` may build a model of a class
    name or a checkpoint's folder, without weights, for ``brt adapt``; None where it knows neither.
    """

    kind = "adapters"
    hook = "brt_adapters"

    matches: Callable[[nn.Module], bool]
    adapt: Callable[[nn.Module], nn.Module]
    leaves: Callable[[nn.Module], str | None] | None = None
    opens: Callable[[str], nn.Module | None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_callable(str(self), "matches", self.matches)
        _require_callable(str(self), "adapt", self.adapt)
        for name, function in (("leaves", self.leaves), ("opens", self.opens)):
            if function is not None:
                _require_callable(str(self), name, function)


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec(Spec):
    """A benchmark: ``factory(device, dtype, **options) -> brt.bench.Workload``."""

    kind = "workloads"
    hook = "brt_workloads"


@dataclass(frozen=True, kw_only=True)
class DemoSpec(Offer):
    """Something to see, for ``brt demo``: ``run(source, out, *, compiled, console) -> Mapping``.

    It takes what the user gave to show it on (None: something of its own), prints as it goes,
    writes what there is to see into the folder ``out``, and returns its figures, ready for JSON.
    ``compiled`` says whether torch.compile is to be shown beside.
    """

    kind = "demos"
    hook = "brt_demos"

    run: Callable[..., Mapping[str, Any]]
    source: str = ""
    """What the user may give: "a photo", "words to go on from"; empty: nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_callable(str(self), "run", self.run)


@dataclass(frozen=True, kw_only=True)
class SolverSpec(Spec):
    """A solver of placements: ``factory(seed=seed)`` makes what `brt_dist.plan` calls.

    ``command(source, topology, **options)`` may do the work of ``brt place``: it returns a plan,
    with ``rows()``, ``says()``, ``to_json()``, ``save(path)`` and ``plot(path, source)``.
    """

    kind = "solvers"
    hook = "brt_solvers"

    command: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.command is not None:
            _require_callable(str(self), "command", self.command)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One implementation of one operator for one type of device.

    `forward` takes the operator's arguments, positional, in schema order, all of them given.
    Backwards are operators of their own, with kernels of their own. ``refuses(*args)`` returns why
    the kernel cannot take these arguments, or None. ``estimate(*args)`` returns microseconds, from
    shapes only. Neither of the two may read values of a tensor.
    """

    kind: ClassVar[str] = "kernels"
    hook: ClassVar[str] = "brt_kernels"

    op: str
    device: str
    """A `torch.device.type`, or `ANY_DEVICE`."""
    name: str
    forward: Callable[..., Any]
    estimate: Callable[..., float]
    refuses: Callable[..., str | None] = _accepts

    def __post_init__(self) -> None:
        _require_kebab("KernelSpec", self.name)
        for field in ("forward", "estimate", "refuses"):
            _require_callable(str(self), field, getattr(self, field))

    def __str__(self) -> str:
        return f"KernelSpec {self.key!r}"

    @property
    def key(self) -> str:
        """What must be unique among kernels: operator, device and name."""
        return f"{self.op}/{self.device}/{self.name}"


AnySpec = Offer | KernelSpec

SPECS: dict[str, type[Offer] | type[KernelSpec]] = {
    spec.kind: spec
    for spec in (
        ProtocolSpec,
        RouterSpec,
        PassSpec,
        KernelSpec,
        ModelSpec,
        AdapterSpec,
        WorkloadSpec,
        DemoSpec,
        SolverSpec,
    )
}


def _require_kebab(owner: str, name: object) -> None:
    if not isinstance(name, str) or not _KEBAB.fullmatch(name):
        raise PluginError(f"{owner} name {name!r} is not kebab-case (like 'drop-dead-paths')")
