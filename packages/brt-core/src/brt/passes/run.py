"""Running passes: their order, what each must leave as it was, and a record of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from brt import plugins
from brt.errors import PassError, PluginWarning
from brt.guard import compiled
from brt.passes.base import Call, Candidate, Context, Left, Pass, Record, require_stateless
from brt.passes.match import writes
from brt.passes.remembered import Remembered, keep
from brt.passes.verify import Moved, Tolerance, cloned, largest_error, without_traces

if TYPE_CHECKING:
    from brt.profile import Profile


@dataclass(frozen=True, eq=False)
class Form:
    """A region's graph at one moment, after the passes that changed it so far."""

    passes: tuple[str, ...]
    graph: fx.Graph
    inserted: Mapping[str, nn.Module]


@dataclass(eq=False)
class Work:
    """One region while passes run on it.

    Attributes:
        path: of its module in the model.
        scope: its module; graph targets are names in it.
        graph: what passes rewrite; it shares the scope's parameters and buffers, and has its
            modules and those that passes insert.
        opened: the modules in it whose own code the trace took in.
        closed: {path: why} of modules that the trace could not open.
        calls: of the region on the sample.
        profile: of the region.
        records: of the passes so far.
        changed: whether any of them changed the graph.
        verified: whether each pass is checked on the calls.
        tolerances: of the passes that changed the graph: their errors add up.
        forms: the original, and what each pass that changed it made of it; empty where forms are
            not measured.
        wanted: the passes that were kept here before; None where that is not known.
        candidates: the forms that were measured.
        key: what measurements depend on; "" where none are remembered.
    """

    path: str
    scope: nn.Module
    graph: fx.GraphModule
    opened: tuple[nn.Module, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    profile: Profile | None = None
    records: list[Record] = field(default_factory=list)
    changed: bool = False
    verified: bool = False
    tolerances: list[Tolerance] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    wanted: tuple[str, ...] | None = None
    candidates: tuple[Candidate, ...] = ()
    key: str = ""

    @property
    def type(self) -> str:
        """Class of its module."""
        return type(self.scope).__name__

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        tensors = (*self.scope.parameters(), *self.scope.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def name(self) -> str:
        """The region, as a sentence names it."""
        return f"region {self.path!r}" if self.path else "the model"

    def inserted(self) -> dict[str, nn.Module]:
        """The modules that passes put into the graph, by name."""
        own = self.scope._modules
        return {k: m for k, m in self.graph._modules.items() if k not in own and m is not None}

    def snapshot(self) -> None:
        """Add the graph as it is to the forms."""
        changed = tuple(record.name for record in self.records if record.changed)
        self.forms.append(Form(changed, _copied(self.graph.graph), self.inserted()))

    def restore(self, form: Form) -> None:
        """Go back to a form."""
        for name in self.inserted():
            self.scope.__dict__.pop(name, None)
        self.graph.__dict__["_modules"] = {**self.scope._modules, **form.inserted}
        self.scope.__dict__.update(form.inserted)
        self.graph.graph = _copied(form.graph)

    def check(self, tolerance: Tolerance) -> float | None:
        """Run the graph on the sample's calls; raises `Moved` where it answers otherwise."""
        if not self.calls:
            return None
        run, errors = compiled(self.graph.graph), []
        with without_traces(self.scope):
            for call in self.calls:
                found = run(self.scope, *cloned(call.args), **cloned(call.kwargs))
                errors.append(largest_error(found, call.output, tolerance))
        return max(errors)


def resolve(passes: Iterable[str | Pass]) -> tuple[Pass, ...]:
    """Passes by name or as they are, in the order in which they are to run."""
    if isinstance(passes, (str, Pass)):
        raise PassError(f"passes= takes a list of names or passes, got {passes!r}; put it in [ ]")
    made: list[Pass] = []
    for item in passes:
        one = plugins.get("passes", item).factory() if isinstance(item, str) else item
        if isinstance(one, type) and issubclass(one, Pass):
            raise PassError(f"passes= takes names or passes; make one: {one.__name__}()")
        if not isinstance(one, Pass):
            raise PassError(f"passes= takes names or brt.passes.Pass instances, got {item!r}")
        made.append(one)
    names = [p.name for p in made]
    for name in names:
        if names.count(name) > 1:
            raise PassError(f"passes= lists {name!r} {names.count(name)} times; name each once")
    return order(made)


def order(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The order given, bent only by what passes declare in `after`; a cycle is an error."""
    waiting, ordered = list(passes), []
    while waiting:
        names = {p.name for p in waiting}
        ready = next((p for p in waiting if not names.intersection(p.after)), None)
        if ready is None:
            raise PassError(
                f"passes wait for each other: {' after '.join(_cycle(waiting))}; leave one of "
                "them out, or change its `after`"
            )
        waiting.remove(ready)
        ordered.append(ready)
    return tuple(ordered)


def _cycle(waiting: Sequence[Pass]) -> list[str]:
    by_name = {p.name: p for p in waiting}
    walk = [waiting[0].name]
    while True:
        following = next(name for name in by_name[walk[-1]].after if name in by_name)
        if following in walk:
            return [*walk[walk.index(following) :], following]
        walk.append(following)


def run_passes(
    passes: Sequence[Pass],
    works: Sequence[Work],
    *,
    verify: bool,
    warn_refusals: bool,
    memory: Remembered,
) -> None:
    """Run every pass on every region, in order; records and forms go to the regions.

    A pass that refuses every region is warned about where the user named it. Where it is known
    which passes a region keeps, only these run.
    """
    for work in works:
        work.verified = verify
    for one in passes:
        for work in works:
            if work.wanted is None or one.name in work.wanted:
                run_pass(one, work, memory)
            else:
                work.records.append(_left_out(one, work))
        refusals = [w.records[-1].refused for w in works]
        if warn_refusals and refusals and all(reason is not None for reason in refusals):
            reasons = "; ".join(dict.fromkeys(reason for reason in refusals if reason))
            warnings.warn(
                f"pass {one.name!r} refused every region: {reasons}", PluginWarning, stacklevel=4
            )


def run_pass(one: Pass, work: Work, memory: Remembered) -> None:
    """Run a pass on a region; the region gets the record, and the form where it changed."""
    known = memory.decisions_of(one, work)
    record = _run(one, work, known)
    keep(known, record.decisions)
    work.records.append(record)
    work.changed |= record.changed
    if record.changed and work.forms:
        work.snapshot()
    plugins.pass_ran(record, work.graph)


def _left_out(one: Pass, work: Work) -> Record:
    num_nodes = len(work.graph.graph.nodes)
    left = Left("the region", "the form that was measured fastest before is without this pass")
    return Record(one.name, work.path, 0.0, num_nodes, num_nodes, False, left=(left,))


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def _run(one: Pass, work: Work, known: Mapping[str, bool]) -> Record:
    graph = work.graph
    ctx = Context(one.name, work.path, work.scope, work.profile, work.calls, known)
    before, num_before = _names(work.scope), len(graph.graph.nodes)
    start = time.perf_counter()
    refused, changed = None, False
    try:
        one.requires(graph, ctx)
    except PassError as error:
        refused = str(error)
    except Exception as error:
        raise PassError(f"{_failed(one, work)}: {type(error).__name__}: {error}") from error
    if refused is None:
        try:
            changed = bool(one.run(graph, ctx))
            _clean(work)
        except Exception as error:
            raise PassError(f"{_failed(one, work)}: {type(error).__name__}: {error}") from error
    after = _names(work.scope)
    if before != after:
        lost, new = sorted(before - after), sorted(after - before)
        raise PassError(
            f"pass {one.name!r} changed the modules or the state of {work.name}: lost {lost}, new "
            f"{new}; a pass must leave both as they are, and insert its own by Context.insert"
        )
    for module in work.inserted().values():
        require_stateless(one.name, module)
    record = Record(
        one.name,
        work.path,
        time.perf_counter() - start,
        num_before,
        len(graph.graph.nodes),
        changed,
        tuple(ctx.notes),
        tuple(ctx.left),
        refused,
        decisions=ctx.decisions,
    )
    return replace(record, max_error=_checked(one, work)) if work.verified and changed else record


def _checked(one: Pass, work: Work) -> float | None:
    work.tolerances.append(one.tolerance)

    def loosest(dtype: torch.dtype) -> tuple[float, float]:
        each = [tolerance(dtype) for tolerance in work.tolerances]
        return max(relative for relative, _ in each), max(absolute for _, absolute in each)

    try:
        return work.check(loosest)
    except Moved as error:
        raise PassError(f"pass {one.name!r} changed the result of {work.name}: {error}") from error
    except Exception as error:
        raise PassError(
            f"after pass {one.name!r} {work.name} no longer runs on the sample: "
            f"{type(error).__name__}: {error}"
        ) from error


def _failed(one: Pass, work: Work) -> str:
    done = [r.name for r in work.records if r.refused is None]
    return f"pass {one.name!r} failed on {work.name}, after {done}"


def _clean(work: Work) -> None:
    """Drop nodes that nothing reads, and modules of passes that nothing calls; check the rest."""
    graph = work.graph.graph
    work.scope.__dict__.update(work.inserted())  # not all passes use Context.insert
    graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node, work.scope))
    called = {
        str(node.target).partition(".")[0] for node in graph.nodes if node.op == "call_module"
    }
    todo = list(called)
    while todo:
        module = work.inserted().get(todo.pop())
        # What an earlier pass inserted may run inside what this one moved
        inner: frozenset[str] = getattr(module, "calls", frozenset())
        todo += inner - called
        called |= inner
    for name in work.inserted():
        if name not in called:
            del work.graph._modules[name], work.scope.__dict__[name]
    graph.lint()
    work.graph.recompile()


def _names(scope: nn.Module) -> set[str]:
    return {*scope.state_dict(keep_vars=True), *(name for name, _ in scope.named_modules())}
