"""What a pass is: a rewrite of a traced graph, with the record of what it did."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import fx, nn

from brt.errors import PassError
from brt.guard import Guard

if TYPE_CHECKING:
    from brt.passes.match import Scatter
    from brt.profile import Profile, RouterProfile

Lowering = Literal["spill", "conditional", "check"]

_TOLERANCE = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}
_EXACT = (0.0, 0.0)


@dataclass(frozen=True)
class Left:
    """Something that a pass looked at and left alone."""

    what: str
    why: str


@dataclass(frozen=True)
class Record:
    """What one pass did to one region.

    Attributes:
        name: of the pass.
        region: module path of the region; "" is the whole model.
        seconds: that `run` and the clean-up after it took.
        nodes_before, nodes_after: of the region's graph.
        changed: whether the graph is another one now.
        notes: what it decided, and why; a sentence each.
        left: what it left alone, and why.
        refused: why the pass did not take this region; None where it did.
        max_error: the largest difference from the original's output on the sample, after this
            pass; None where nothing was compared.
        decisions: what it measured: whether the new form was worth it, by the name of the place.
    """

    name: str
    region: str
    seconds: float
    nodes_before: int
    nodes_after: int
    changed: bool
    notes: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    refused: str | None = None
    max_error: float | None = None
    decisions: Mapping[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        where = self.region or "model"
        if self.refused is not None:
            return f"{self.name} on {where}: refused: {self.refused}"
        what = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.changed else "no change"
        return f"{self.name} on {where}: {what}, {1e3 * self.seconds:.1f} ms"

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "name": self.name,
            "region": self.region,
            "seconds": self.seconds,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "changed": self.changed,
            "notes": list(self.notes),
            "left": [{"what": left.what, "why": left.why} for left in self.left],
            "refused": self.refused,
            "max_error": self.max_error,
            "decisions": dict(self.decisions),
        }


@dataclass(frozen=True)
class Candidate:
    """One form of a region that was measured on the sample.

    Attributes:
        passes: whose rewriting is in it, in order; () is the original.
        seconds: the median of one run over the region's calls on the sample.
        kept: whether it is the form that runs.
    """

    passes: tuple[str, ...]
    seconds: float
    kept: bool = False

    @property
    def name(self) -> str:
        """The form, as a table names it."""
        return " + ".join(self.passes) or "the original"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a region on the sample, with what the original answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def batch_for(self, module: nn.Module) -> Any:
        """The arguments as the batch that `trace` takes; None where they are none."""
        try:
            signature = inspect.signature(module.forward)
            bound = signature.bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            return None
        kinds = {signature.parameters[name].kind for name in bound.arguments}
        if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
            return dict(bound.arguments)
        return self.args if not self.kwargs else None


@dataclass(eq=False)
class Context:
    """What a pass knows besides the graph, and where it says what it decided.

    Attributes:
        pass_name: of the pass that runs.
        region: module path of the region in the model; "" is the model itself.
        scope: the region's own module: names of parameters and modules in the graph are its.
        profile: of the region: keys start at it, and each of its calls is a forward; None where
            there is no profile, or it knows no router of the region.
        sample: the region's calls while the model ran on the sample; empty without one.
        known: decisions of earlier optimisations, by `decide`'s keys.
    """

    pass_name: str
    region: str
    scope: nn.Module
    profile: Profile | None = None
    sample: tuple[Call, ...] = ()
    known: Mapping[str, bool] = field(default_factory=dict)
    decisions: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Record a decision and its reason."""
        self.notes.append(text)

    def leave(self, what: str, why: str) -> None:
        """Record what is left alone."""
        self.left.append(Left(what, why))

    def decide(self, where: str, measure: Callable[[], bool]) -> bool:
        """What ``measure()`` says, or said before: in a saved plan, or on this machine.

        ``where`` is what it is about, in the region: the name of a scatter.
        """
        key = f"{self.pass_name}:{self.path(where)}"
        if key in self.known:
            self.note(f"{where}: as it was measured before")
        self.decisions[key] = self.known[key] if key in self.known else measure()
        return self.decisions[key]

    def seen(self, scatter: Scatter) -> RouterProfile | None:
        """What the profile knows of a scatter; None where it never ran."""
        if self.profile is None:
            return None
        return self.profile.routers.get(f"{scatter.target}#{scatter.call}")

    def path(self, target: str) -> str:
        """The path in the model of a name in this region."""
        return f"{self.region}.{target}" if self.region and target else self.region or target

    def guard(self, where: str, assumes: str) -> Guard:
        """A guard of this pass; ``where`` is what it is about, in the region: ``scatter[3]``."""
        return Guard(f"{self.pass_name}:{self.path(where)}", assumes)

    def insert(self, graph: fx.GraphModule, module: nn.Module, name: str) -> str:
        """Let the graph call a module of the pass's own; returns the name that it has there.

        It must hold neither parameters nor persistent buffers. It is in the graph only, not among
        the submodules of the region, whose code may count or walk through these.
        """
        require_stateless(self.pass_name, module)
        at = 0
        while hasattr(graph, f"{name}_{at}") or hasattr(self.scope, f"{name}_{at}"):
            at += 1
        module.train(self.scope.training)
        graph.add_submodule(f"{name}_{at}", module)
        self.scope.__dict__[f"{name}_{at}"] = module
        return f"{name}_{at}"


def require_stateless(pass_name: str, module: nn.Module) -> None:
    """Raise where a module that a pass inserts has state that the model would have to save."""
    if next(module.parameters(), None) is not None or module.state_dict():
        raise PassError(
            f"pass {pass_name!r} inserts a {type(module).__name__} with weights of its own; hold "
            "the model's by name (brt.guard.Guarded), or in non-persistent buffers"
        )


class Pass(ABC):
    """A rewrite of a graph. Subclasses are frozen dataclasses: their fields are their options.

    A pass names its lowerings: how it guards what it takes from the profile. "spill": rows outside
    the assumption go to the generic code, without work where there are none; "conditional": a
    conditional node of a CUDA graph; "check": one deferred check at the region's end. A rewrite
    that holds for any input by itself names none.
    """

    name: ClassVar[str]
    """Kebab-case and unique; third parties start theirs with their own name."""
    after: ClassVar[tuple[str, ...]] = ()
    """Passes that run first, where they run at all."""
    lowering: ClassVar[tuple[Lowering, ...]] = ()
    needs_profile: ClassVar[bool] = False

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:  # noqa: B027 - may be left out
        """Raise `PassError`, saying what to do, if this pass cannot take this graph."""

    @abstractmethod
    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Rewrite ``graph`` in place; return whether anything changed."""

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """(relative, absolute) difference that a result may have: as in `torch.testing`.

        Relative to the largest value in a row of dim 0. Where torch may use TF32 on a GPU, float32
        is compared as bfloat16 is.
        """
        return _TOLERANCE.get(dtype, _EXACT)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return inspect.cleandoc(type(self).__doc__ or "").partition("\n")[0]
