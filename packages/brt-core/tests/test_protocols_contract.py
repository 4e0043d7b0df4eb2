"""What holds for every protocol: its declarations, its decisions at edge sizes, and in graphs.

N cells, P paths, K choices of a cell.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from brt import checks
from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols import (
    BUILTIN,
    BinaryThreshold,
    CapacityTopK,
    ExpertChoice,
    GreedyDecoding,
    Hash,
    Label,
    MissHit,
    NoisyTopK,
    Protocol,
    Random,
    ResidualThreshold,
    Switch,
    Task,
    Threshold,
    TopK,
    Uniform,
)


@dataclass(frozen=True)
class Case:
    """A protocol with its options, a number of paths, and scores for so many cells."""

    protocol: Protocol
    num_paths: int
    scores: Callable[[int], Tensor]

    def __str__(self) -> str:
        return f"{self.protocol}-P{self.num_paths}"

    def decide(self, num_cells: int) -> Decision:
        return self.protocol(self.scores(num_cells), self.num_paths)


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.rand(n, *shape)


def ids(num_ids: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(num_ids, (n,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


CASES = [
    Case(TopK(1), 1, floats(1)),
    Case(TopK(2), 4, floats(4)),
    Case(TopK(4, "before", renormalise=True), 4, floats(4)),
    Case(NoisyTopK(2), 4, floats(8)),
    Case(Threshold(0.5), 4, floats(4)),
    Case(Threshold(0.9, residual_path=2), 4, floats(4)),
    Case(ResidualThreshold(1.0), 2, floats(2)),
    Case(BinaryThreshold(0.3), 2, floats(5)),
    Case(BinaryThreshold(1.5, 1, "entropy"), 2, floats(5)),
    Case(BinaryThreshold(0.5, 1, "score"), 2, floats(1)),
    Case(Label(), 4, ids(4)),
    Case(Task(4), 4, ids(4)),
    Case(Hash(5), 5, ids(5)),
    Case(Hash(4, placement_aware=True), 4, ids(4)),
    Case(Switch(), 4, floats(4)),
    Case(Switch(1.0, jitter=0.1), 4, floats(3, 4)),
    Case(CapacityTopK(2, 0.5, batch_prioritized=True, softmax="after"), 4, floats(4)),
    Case(CapacityTopK(2, 1.1, alignment=4, softmax="before", noise_std=0.1), 4, floats(3, 4)),
    Case(ExpertChoice(), 4, floats(4)),
    Case(ExpertChoice(1.5, "before"), 4, floats(3, 4)),
    Case(GreedyDecoding((1, 2), pad=0), 2, ids(4)),
    Case(Random(2), 4, floats(4)),
    Case(Uniform(), 4, floats(4)),
    Case(MissHit(False), 4, floats(4)),
]

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def pairs_of(decision: Decision) -> list[tuple[int, int, int]]:
    """(choice rank, cell, path) of every choice, by loops, in the order that capacity counts."""
    named = decision.choice_NK if decision.choice_NK is not None else decision.mask_NP
    if decision.cell_PC is not None:
        rows = decision.cell_PC.tolist()
        return [(0, cell, path) for path, row in enumerate(rows) for cell in row if cell >= 0]
    assert named is not None
    by_mask = decision.mask_NP is not None
    pairs = [
        (0, cell, j) if by_mask else (j, cell, entry)
        for cell, row in enumerate(named.tolist())
        for j, entry in enumerate(row)
        if (entry if by_mask else entry >= 0)
    ]
    priority = [0.0] * decision.num_cells
    if decision.priority_N is not None:
        priority = decision.priority_N.tolist()
    return sorted(pairs, key=lambda pair: (pair[0], -priority[pair[1]], pair[1]))


def rows_kept(decision: Decision) -> int:
    """How many rows a route of this decision has: what its capacity lets through."""
    if decision.capacity is None:
        return len(pairs_of(decision))
    assert isinstance(decision.capacity, int)
    load: dict[tuple[int, int], int] = {}
    kept = 0
    for _, cell, path in pairs_of(decision):
        slot = (cell // decision.group_size if decision.group_size else 0, path)
        load[slot] = load.get(slot, 0) + 1
        kept += load[slot] <= decision.capacity
    return kept


def check_decision(
    protocol: Protocol, decision: Decision, num_cells: int, num_paths: int, group_size: int
) -> None:
    assert (decision.num_cells, decision.num_paths) == (num_cells, num_paths)
    pairs = [(cell, path) for _, cell, path in pairs_of(decision)]
    assert len(set(pairs)) == len(pairs), "a cell names a path twice"
    assert all(0 <= cell < num_cells and 0 <= path < num_paths for cell, path in pairs)
    kept = rows_kept(decision)
    assert kept <= protocol.max_rows(num_cells, num_paths, group_size)
    assert kept <= protocol.max_rows(num_cells, num_paths)
    mask = decision.to_mask()
    assert {(cell, path) for _, cell, path in pairs_of(mask)} == set(pairs)
    assert {(cell, path) for _, cell, path in pairs_of(mask.to_choice())} == set(pairs)


def check_decided(case: Case, decision: Decision, scores: Tensor) -> None:
    groups, cells = scores.shape[:2] if scores.ndim == 3 else (1, scores.shape[0])
    check_decision(case.protocol, decision, groups * cells, case.num_paths, cells)


def same(a: Decision, b: Decision) -> None:
    assert pairs_of(a) == pairs_of(b)
    assert (a.num_cells, a.num_paths) == (b.num_cells, b.num_paths)
    assert (a.capacity, a.group_size) == (b.capacity, b.group_size)
    torch.testing.assert_close(a.weight, b.weight) if a.weight is not None else None
    assert (a.weight is None) == (b.weight is None)


def drawn_alike(protocol: Protocol, scores: Tensor, num_paths: int) -> Decision:
    torch.manual_seed(11)
    return protocol(scores, num_paths)


# Declarations


def test_every_built_in_has_a_case() -> None:
    assert {type(case.protocol) for case in CASES} == set(BUILTIN)


def test_names_are_unique_and_kebab_case() -> None:
    names = [protocol.name for protocol in BUILTIN]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name), name


@pytest.mark.parametrize("protocol", BUILTIN, ids=lambda protocol: protocol.name)
def test_a_protocol_names_its_source_and_freezes_its_options(protocol: type[Protocol]) -> None:
    assert re.search(r"\b(19|20)\d\d\b|^none: ", protocol.paper)
    assert protocol.__doc__
    assert protocol.__dataclass_params__.frozen
    assert not any(f.init and f.name.startswith("_") for f in dataclasses.fields(protocol))


@each_case
def test_copies_are_equal_and_decide_alike(case: Case) -> None:
    scores = case.scores(9)
    for copied in (copy.deepcopy(case.protocol), pickle.loads(pickle.dumps(case.protocol))):
        assert copied == case.protocol
        assert hash(copied) == hash(case.protocol)
        same(
            drawn_alike(copied, scores, case.num_paths),
            drawn_alike(case.protocol, scores, case.num_paths),
        )


# Decisions


@each_case
@pytest.mark.parametrize("num_cells", [0, 1, 2, 33])
def test_decisions_at_edge_sizes(case: Case, num_cells: int) -> None:
    scores = case.scores(num_cells)
    check_decided(case, case.protocol(scores, case.num_paths), scores)


@each_case
def test_scores_need_not_be_contiguous(case: Case) -> None:
    scores = case.scores(12)
    strided = (
        scores.t().contiguous().t() if scores.ndim == 2 else scores.repeat_interleave(2, 0)[::2]
    )
    assert scores.ndim == 1 or scores.shape[-1] == 1 or not strided.is_contiguous()
    same(
        drawn_alike(case.protocol, strided, case.num_paths),
        drawn_alike(case.protocol, scores, case.num_paths),
    )


@each_case
def test_only_stochastic_protocols_draw(case: Case) -> None:
    scores, before = case.scores(5), torch.get_rng_state()
    case.protocol(scores, case.num_paths)
    drawn = not torch.equal(torch.get_rng_state(), before)
    assert drawn == case.protocol.stochastic


STOCHASTIC: list[Callable[[torch.Generator | None], Case]] = [
    lambda generator: Case(NoisyTopK(2, generator=generator), 4, floats(8)),
    lambda generator: Case(Switch(jitter=0.3, generator=generator), 4, floats(4)),
    lambda generator: Case(CapacityTopK(2, noise_std=1.0, generator=generator), 4, floats(4)),
    lambda generator: Case(Random(2, generator), 4, floats(4)),
]


@pytest.mark.parametrize("make", STOCHASTIC, ids=lambda make: make(None).protocol.name)
def test_a_generator_is_all_that_is_drawn_from(make: Callable[..., Case]) -> None:
    case, again = make(seeded()), make(seeded())
    scores, before = case.scores(50), torch.get_rng_state()
    first = case.protocol(scores, 4)
    assert torch.equal(torch.get_rng_state(), before)
    copied = copy.deepcopy(case.protocol)
    second = case.protocol(scores, 4)
    assert case.protocol == again.protocol, "a generator is no option"
    same(again.protocol(scores, 4), first)
    same(copied(scores, 4), second)
    assert pairs_of(first) != pairs_of(second)


@pytest.mark.parametrize("make", STOCHASTIC, ids=lambda make: make(None).protocol.name)
def test_a_generator_does_not_compile(make: Callable[..., Case]) -> None:
    case = make(seeded())
    with pytest.raises(Exception, match="leave generator=None and seed with"):
        torch.compile(case.decide, fullgraph=True, backend="eager")(5)


def test_a_generator_that_is_not_drawn_from_does_no_harm() -> None:
    protocol = CapacityTopK(2, noise_std=1.0, generator=seeded()).without_noise()
    case = Case(protocol, 4, floats(4))
    check_same_graph(torch.compile(Decides(case), fullgraph=True, backend="eager"), case, 9)


@pytest.mark.cuda
def test_a_generator_of_another_device_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="the generator is on cpu, but the scores are on cuda"):
        Random(2, seeded())(torch.rand(4, 4, device="cuda"), 4)


# Bad scores


FLOAT_CASES = [
    case
    for case in CASES
    if case.scores(1).ndim > 1 and not isinstance(case.protocol, Random | Uniform | MissHit)
]


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_nan_scores_are_an_error_that_says_where(case: Case) -> None:
    scores = case.scores(6)
    scores[4, ..., -1] = torch.nan
    first = scores.isnan().nonzero()[0].tolist()
    message = (
        f"scores hold NaN: {int(scores.isnan().sum())} of {scores.numel()}, the first at {first}"
    )
    with pytest.raises(ProtocolError, match=re.escape(message)):
        case.protocol(scores, case.num_paths)


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_bad_scores_are_refused(case: Case) -> None:
    scores = case.scores(6)
    with pytest.raises(ProtocolError, match=r"scores must be floats, got torch\.int64"):
        case.protocol(scores.long(), case.num_paths)
    with pytest.raises(ProtocolError, match=r"scores must be \[N, .*got shape \(6,\)"):
        case.protocol(scores.flatten(1)[:, 0], case.num_paths)
    with pytest.raises(
        ProtocolError, match=f"num_paths is 3|came for {case.num_paths + 1} paths|2 paths"
    ):
        case.protocol(scores, 3 if case.num_paths == 2 else case.num_paths + 1)


# Graphs


class Decides(nn.Module):
    """Returns a decision and both of its conversions."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, scores: Tensor) -> tuple[Decision, Decision, Decision]:
        decision = self.case.protocol(scores, self.case.num_paths)
        return decision, decision.to_mask(), decision.to_choice()


def check_same_graph(graph: Callable[..., Any], case: Case, num_cells: int) -> None:
    scores = case.scores(num_cells)
    got, expected = graph(scores), Decides(case)(scores)
    check_decided(case, got[0], scores)
    if not case.protocol.stochastic:
        for a, b in zip(got, expected, strict=True):
            same(a, b)


@each_case
def test_compiles_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Decides(case), fullgraph=True, backend="eager")
    for num_cells in (16, 9, 23):
        check_same_graph(compiled, case, num_cells)


@each_case
def test_exports_with_any_number_of_cells(case: Case) -> None:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(Decides(case), (case.scores(16),), dynamic_shapes=shapes)
    for num_cells in (9, 23):
        check_same_graph(exported.module(), case, num_cells)


@each_case
def test_exports_after_rows_of_unknown_number(case: Case) -> None:
    """A nested scatter: the cells of a path, whose number is data."""

    class Nested(nn.Module):
        def forward(self, scores: Tensor, keep_N: Tensor) -> tuple[Decision, Decision, Decision]:
            return Decides(case)(scores[keep_N])

    scores, keep_N = case.scores(16), torch.arange(16) % 3 == 0
    exported = torch.export.export(Nested(), (scores, keep_N)).module()
    check_same_graph(
        lambda _: exported(scores, keep_N),
        dataclasses.replace(case, scores=lambda _: scores[keep_N]),
        6,
    )


# CUDA


def on_cpu(decision: Decision) -> Decision:
    moved: Decision = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, decision)
    return moved


@pytest.mark.cuda
@each_case
def test_cuda_decides_alike_without_waiting_for_the_device(case: Case) -> None:
    scores = case.scores(33)
    static = scores.cuda()
    eager = case.protocol(static, case.num_paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, torch says
        torch.cuda.set_sync_debug_mode("error")
    try:
        Decides(case)(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, masked, chosen = Decides(case)(static)
    graph.replay()
    for decision in (eager, captured, masked, chosen):
        check_decided(case, on_cpu(decision), scores)
    if not case.protocol.stochastic:
        expected = case.protocol(scores, case.num_paths)
        same(on_cpu(eager), expected)
        same(on_cpu(captured), expected)
    checks.check()


@pytest.mark.cuda
@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_nan_scores_on_cuda_are_an_error_at_the_next_check(case: Case) -> None:
    scores = case.scores(6).cuda()
    scores[4, ..., -1] = torch.nan
    case.protocol(scores, case.num_paths)
    with pytest.raises(ProtocolError, match=f"{case.protocol.name}: scores hold NaN"):
        checks.check()


# Properties


some = settings(max_examples=40, deadline=None, database=None, derandomize=True)
sizes = st.integers(0, 40)
seeds = st.integers(0, 2**31)


def scores_of(seed: int, *shape: int) -> Tensor:
    """Scores with ties: a few levels only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, shape, generator=generator) / 4


@some
@given(data=st.data(), num_cells=sizes, num_paths=st.integers(1, 9), seed=seeds)
def test_top_k_at_random(data: st.DataObject, num_cells: int, num_paths: int, seed: int) -> None:
    k = data.draw(st.integers(1, num_paths))
    protocol = TopK(k, data.draw(st.sampled_from([None, "before", "after"])))
    scores = scores_of(seed, num_cells, num_paths)
    decision = protocol(scores, num_paths)
    check_decision(protocol, decision, num_cells, num_paths, num_cells)
    assert decision.choice_NK is not None
    best = scores.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(scores.gather(1, decision.choice_NK), best)


@some
@given(
    data=st.data(),
    num_groups=st.integers(0, 4),
    num_in_group=st.integers(0, 12),
    num_paths=st.integers(1, 6),
    factor=st.floats(0.05, 4),
    seed=seeds,
)
def test_capacity_at_random(
    data: st.DataObject,
    num_groups: int,
    num_in_group: int,
    num_paths: int,
    factor: float,
    seed: int,
) -> None:
    grouped = data.draw(st.booleans())
    shape = (num_groups, num_in_group) if grouped else (num_in_group,)
    k = data.draw(st.integers(1, num_paths))
    alignment, prioritized = data.draw(st.integers(1, 8)), data.draw(st.booleans())
    scores = scores_of(seed, *shape, num_paths)
    num_cells = scores[..., 0].numel()
    for protocol in (
        Switch(factor),
        CapacityTopK(k, factor, alignment, batch_prioritized=prioritized),
        ExpertChoice(min(factor, num_paths)),
    ):
        decision = protocol(scores, num_paths)
        check_decision(protocol, decision, num_cells, num_paths, num_in_group)
        if decision.capacity is not None:
            assert not isinstance(protocol, CapacityTopK) or decision.capacity % alignment == 0
            assert decision.capacity >= 1


@some
@given(
    num_cells=sizes,
    num_paths=st.integers(1, 9),
    threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0]),
    residual=st.booleans(),
    seed=seeds,
)
def test_threshold_at_random(
    num_cells: int, num_paths: int, threshold: float, residual: bool, seed: int
) -> None:
    protocol = Threshold(threshold, seed % num_paths if residual else None)
    decision = protocol(scores_of(seed, num_cells, num_paths), num_paths)
    check_decision(protocol, decision, num_cells, num_paths, num_cells)
    if residual:
        assert decision.mask_NP is not None
        assert decision.mask_NP.any(dim=1).all()
