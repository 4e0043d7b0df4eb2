"""`check_pass`: what a pass promises."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from brt.errors import PassError, PluginWarning
from brt.graph import as_call
from brt.optimize import optimize
from brt.passes.base import Context, Lowering, Pass
from brt.passes.prepare import copy_of, regions_of
from brt.passes.run import Work
from brt.passes.verify import Moved, cloned, largest_error, without_traces
from brt.profile import Profile, profile
from brt.specs import PassSpec
from brt.testing.rules import Rules


def check_pass(
    one: Pass,
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    profiled: Profile | None = None,
    others: Sequence[Any] = (),
) -> None:
    """Raise `AssertionError` at the first rule of passes that this one breaks on a model.

    ``inputs`` are batches, as `brt.profile` takes them; the profile is made of them unless one is
    given. ``others`` are further batches on which the result must be right; some that are unlike
    the profile are made from the inputs anyway: negated, ten times as large, and in reverse.
    A pass that refuses the model (`PassError`) keeps the rules, where it changes nothing.
    """
    rules = Rules(f"pass {getattr(one, 'name', type(one).__name__)!r}")
    rules.require(isinstance(one, Pass), "is a brt.passes.Pass")
    rules.offered(PassSpec, type(one))
    rules.options(one)
    _check_declarations(rules, one)
    if profiled is None:
        profiled = profile(model, inputs, progress=False)
    before = _state(model)
    _check_region_by_region(rules, one, model, profiled, inputs[0])
    _require_untouched(rules, model, before)
    with (
        warnings.catch_warnings(),
        rules.holds("runs, or raises PassError in `requires`"),
    ):
        warnings.simplefilter("ignore", PluginWarning)  # it may refuse
        fast = optimize(model, profiled, passes=[one], sample=inputs[0])
    _require_untouched(rules, model, before)
    rules.require(
        _names(fast) == _names(model), "leaves the names of parameters and buffers as they are"
    )
    theirs = dict(fast.named_parameters())
    for name, parameter in model.named_parameters():
        rules.require(theirs.get(name) is parameter, "shares the model's parameters", name)
    twin = copy.deepcopy(fast)
    for batch in (*inputs, *others, *(b for i in inputs for b in _unlike(i))):
        wanted = _run(model, batch)
        for what, module in (("", fast), (" in a copy (copy.deepcopy)", twin)):
            with rules.holds(f"gives what the model gives{what}, also unlike the profile"):
                found = _run(module, batch)
            try:
                largest_error(found, wanted, one.tolerance)
            except Moved as error:
                raise AssertionError(
                    f"{rules.what}: gives what the model gives{what}, also unlike the profile; "
                    f"{error}"
                ) from error


def _check_declarations(rules: Rules, one: Pass) -> None:
    rules.require(
        isinstance(one.after, tuple) and all(isinstance(name, str) for name in one.after),
        "`after` is a tuple of names of passes",
        repr(one.after),
    )
    rules.require(one.name not in one.after, "does not wait for itself")
    known = get_args(Lowering)
    rules.require(
        isinstance(one.lowering, tuple) and set(one.lowering) <= set(known),
        f"`lowering` is a tuple of {known}",
        repr(one.lowering),
    )
    rules.require(
        not one.needs_profile or bool(one.lowering),
        "a pass that goes by the profile says how it guards that (`lowering`)",
    )


def _check_region_by_region(
    rules: Rules, one: Pass, model: nn.Module, profiled: Profile, sample: Any
) -> None:
    works, left = regions_of(copy_of(model), profiled, sample)
    reasons = "; ".join(str(region.reason) for region in left)
    rules.require(bool(works), "is checked on a model that can be traced", reasons)
    for work in works:
        case = f"region {work.path!r}"
        code = work.graph.code
        try:
            one.requires(work.graph, _context(one, work))
        except PassError as error:
            rules.require(bool(str(error)), "says why it refuses", case)
            rules.require(_code(work) == code, "leaves a graph alone that it refuses", case)
            continue
        with rules.holds(f"refuses in `requires`, and does not fail in `run` ({case})"):
            changed = one.run(work.graph, _context(one, work))
        rules.require(isinstance(changed, bool), "`run` returns whether it changed anything", case)
        rules.require(
            changed == (_code(work) != code),
            "says truthfully whether it changed the graph",
            f"{case}: returned {changed}, and the code is "
            f"{'another' if _code(work) != code else 'the same'}",
        )
        with rules.holds(f"leaves a graph that passes lint ({case})"):
            work.graph.graph.lint()
        code = _code(work)
        with rules.holds(f"runs a second time ({case})"):
            again = one.run(work.graph, _context(one, work))
        rules.require(
            not again and _code(work) == code, "does nothing the second time (idempotent)", case
        )


def _context(one: Pass, work: Work) -> Context:
    return Context(one.name, work.path, work.scope, work.profile, work.calls)


def _code(work: Work) -> str:
    return work.graph.graph.python_code("self").src


def _names(module: nn.Module) -> list[str]:
    return list(module.state_dict(keep_vars=True))


def _state(model: nn.Module) -> dict[str, tuple[int, Tensor, bool]]:
    state = model.state_dict(keep_vars=True)
    return {
        name: (id(tensor), tensor.detach().clone(), tensor.requires_grad)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


def _require_untouched(
    rules: Rules, model: nn.Module, before: dict[str, tuple[int, Tensor, bool]]
) -> None:
    now = model.state_dict(keep_vars=True)
    rules.require(list(now) == list(before), "leaves the model it is given as it is", "other names")
    for name, (which, value, requires_grad) in before.items():
        rules.require(
            id(now[name]) == which
            and now[name].requires_grad == requires_grad
            and torch.equal(now[name], value),
            "leaves the model it is given as it is",
            f"{name} changed",
        )


def _run(module: nn.Module, batch: Any) -> Any:
    args, kwargs = as_call(batch)
    with without_traces(module):
        return module(*cloned(args), **cloned(kwargs))


def _unlike(batch: Any) -> list[Any]:
    """Batches of the same form with other values in their float tensors."""
    args, kwargs = as_call(batch)

    def changed(by: Any) -> Any:
        def one(value: Any) -> Any:
            return by(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        if kwargs:
            return {name: one(value) for name, value in kwargs.items()}
        return tuple(one(value) for value in args)

    return [
        changed(lambda x: -x),
        changed(lambda x: 10 * x),
        changed(lambda x: x.flip(-1) if x.ndim else x),
    ]
