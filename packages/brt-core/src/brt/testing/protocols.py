"""`check_protocol`: what a protocol promises.

Legend: N cells, P paths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols.base import Protocol
from brt.route import make_route
from brt.specs import ProtocolSpec
from brt.testing.rules import Rules, equal, tensors

_NUM_CELLS = (0, 1, 2, 33)


def check_protocol(
    protocol: Protocol,
    *,
    num_paths: int = 4,
    scores: Callable[[int, int], Tensor] | None = None,
) -> None:
    """Raise `AssertionError` at the first rule of protocols that this one breaks.

    ``scores(num_cells, num_paths)`` makes what it decides by; by default probabilities ``[N, P]``.
    Give it for protocols that take ids or groups.
    """
    rules = Rules(f"protocol {getattr(protocol, 'name', type(protocol).__name__)!r}")
    rules.require(isinstance(protocol, Protocol), "is a brt.protocols.Protocol")
    rules.offered(ProtocolSpec, type(protocol))
    rules.options(protocol)
    paper = getattr(protocol, "paper", "")
    rules.require(isinstance(paper, str) and bool(paper), "names its source in `paper`")
    make = _probabilities if scores is None else scores
    for num_cells in _NUM_CELLS:
        _decides(rules, protocol, make(num_cells, num_paths), num_cells, num_paths)
    if make(2, num_paths).is_floating_point():
        for dtype in (torch.float16, torch.bfloat16):
            with rules.holds(f"takes {dtype} scores"):
                protocol(make(5, num_paths).to(dtype), num_paths)
        _differentiates(rules, protocol, make(5, num_paths), num_paths)
        _refuses(rules, protocol, make(5, num_paths), num_paths)


def _probabilities(num_cells: int, num_paths: int) -> Tensor:
    made = torch.Generator().manual_seed(num_cells)
    return torch.rand(num_cells, num_paths, generator=made).softmax(-1)


def _decides(
    rules: Rules, protocol: Protocol, scores: Tensor, num_cells: int, num_paths: int
) -> None:
    case = f"N={num_cells}, P={num_paths}"
    kept = scores.clone()
    with rules.holds(f"decides for any number of cells ({case})"):
        decision = protocol(scores, num_paths)
    rules.require(isinstance(decision, Decision), "returns a brt.Decision", case)
    rules.require(equal(scores, kept), "leaves the scores as they are", case)
    rules.require(
        decision.num_paths == num_paths,
        "decides between the paths that it is asked about",
        f"{case}, got num_paths={decision.num_paths}",
    )
    rules.require(
        decision.num_cells == num_cells,
        "decides about every cell",
        f"{case}, got {decision.num_cells} cells",
    )
    for tensor in tensors(decision):
        rules.require(tensor.device == scores.device, "stays on the device of the scores", case)
    _check_values(rules, decision, num_cells, num_paths, case)
    with rules.holds(f"its decision can be carried out ({case})"):
        route = make_route(decision, num_cells).with_sizes()
    assert route.sizes is not None
    most = protocol.max_rows(num_cells, num_paths, decision.group_size)
    rules.require(
        sum(route.sizes) <= most,
        "max_rows(num_cells, num_paths) bounds the rows that it routes",
        f"{case}: {sum(route.sizes)} rows, max_rows {most}",
    )
    if not protocol.stochastic:
        again = protocol(scores, num_paths)
        rules.require(
            equal(decision, again),
            "decides the same for the same scores, or is `stochastic`",
            case,
        )


def _check_values(
    rules: Rules, decision: Decision, num_cells: int, num_paths: int, case: str
) -> None:
    if decision.choice_NK is not None:
        chosen, bound, what = decision.choice_NK, num_paths, "a path"
    elif decision.cell_PC is not None:
        chosen, bound, what = decision.cell_PC, num_cells, "a cell"
    else:
        return
    rules.require(
        not chosen.numel() or (int(chosen.min()) >= -1 and int(chosen.max()) < bound),
        f"chooses {what} in range({bound}), or -1 for none",
        case,
    )
    ordered = chosen.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    rules.require(not bool(twice.any()), f"names {what} at most once in a row", case)
    if decision.weight is not None:
        rules.require(
            bool(decision.weight[chosen >= 0].isfinite().all()), "gives finite weights", case
        )


def _differentiates(rules: Rules, protocol: Protocol, scores: Tensor, num_paths: int) -> None:
    leaf = scores.clone().requires_grad_()
    weight = protocol(leaf, num_paths).weight
    if weight is None:
        return
    rules.require(
        weight.requires_grad,
        "its weights are differentiable in the scores; return weight=None where they are all 1",
    )
    weight.sum().backward()
    rules.require(
        leaf.grad is not None and bool(leaf.grad.isfinite().all()), "gives finite gradients"
    )


def _refuses(rules: Rules, protocol: Protocol, scores: Tensor, num_paths: int) -> None:
    quiet = protocol.without_noise()
    flipped = scores.flip(-1)
    if quiet.stochastic or equal(quiet(scores, num_paths), quiet(flipped, num_paths)):
        return  # it does not look at the scores
    bad = (
        ("NaN", torch.full_like(scores, torch.nan)),
        ("more columns than paths", torch.cat([scores, scores], -1)),
        ("scores of rank 1", scores[0]),
    )
    for what, given in bad:
        try:
            protocol(given, num_paths)
        except ProtocolError:
            continue
        except Exception as error:
            came = f"it raised {type(error).__name__}: {error}"
            raise AssertionError(
                f"{rules.what}: refuses {what} by a ProtocolError (Protocol.check); {came}"
            ) from error
        rules.require(False, f"refuses {what} by a ProtocolError (Protocol.check)")
