"""Label, Task, Hash and GreedyDecoding against loops.

N cells, T ids.
"""

from __future__ import annotations

import pytest
import torch

from brt.decision import Decision
from brt.errors import ProtocolError
from brt.protocols import GreedyDecoding, Hash, Label, Task


def choices(decision: Decision) -> list[list[int]]:
    assert decision.choice_NK is not None
    assert decision.weight is None
    return decision.choice_NK.tolist()


@pytest.mark.parametrize(("n", "t"), [(0, 3), (1, 1), (20, 5)])
def test_label_and_task_take_the_path_of_their_id(n: int, t: int) -> None:
    ids_N = torch.randint(t, (n,))
    expected = [[i] for i in ids_N.tolist()]
    assert choices(Label()(ids_N, t)) == expected
    assert choices(Task(t)(ids_N, t)) == expected


@pytest.mark.parametrize("t", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", [0, 3])
def test_hash_takes_both_ends_of_a_permutation(t: int, seed: int) -> None:
    # As Brainstorm draws it, from a generator of its own
    perm = torch.randperm(t, generator=torch.Generator().manual_seed(seed)).tolist()
    expected = []
    for i in range(t):
        first, second = perm[i], perm[t - 1 - i]
        expected.append([first, -1 if second == first else second])
    assert choices(Hash(t, seed)(torch.arange(t), t)) == expected


@pytest.mark.parametrize("t", [1, 2, 5, 8])
def test_hash_gives_every_path_the_same_number_of_tasks(t: int) -> None:
    taken = [p for row in choices(Hash(t, 1)(torch.arange(t), t)) for p in row if p >= 0]
    loads = [taken.count(p) for p in range(t)]
    assert sorted(loads) == ([1] if t % 2 else []) + [2] * (t - t % 2)


def test_hash_that_knows_of_placement_takes_neighbours() -> None:
    hashed = Hash(4, placement_aware=True)
    assert choices(hashed(torch.arange(4), 4)) == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert choices(Hash(1, placement_aware=True)(torch.zeros(2, dtype=torch.int64), 1)) == [
        [0, -1],
        [0, -1],
    ]


def test_hash_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Hash(16, seed=5)(torch.arange(16), 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_hashes_of_the_same_options_are_equal() -> None:
    assert Hash(8, 1) == Hash(8, 1)
    assert hash(Hash(8, 1)) == hash(Hash(8, 1))
    assert Hash(8, 1) != Hash(8, 2)


@pytest.mark.cuda
def test_hash_copies_its_table_to_a_device_once() -> None:
    hashed, ids_N = Hash(8), torch.arange(8)
    expected = choices(hashed(ids_N, 8))
    assert choices(hashed(ids_N.cuda(), 8)) == expected
    graph = torch.cuda.CUDAGraph()
    static_N = ids_N.cuda()
    with torch.cuda.graph(graph):
        decision = hashed(static_N, 8)
    graph.replay()
    assert choices(decision) == expected


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (GreedyDecoding(2), [0, 0, 1, 0]),
        (GreedyDecoding(2, pad=0), [1, 0, 1, 0]),
        (GreedyDecoding((2, 3)), [0, 0, 1, 1]),
    ],
    ids=repr,
)
def test_greedy_decoding_parts_the_finished_from_the_others(
    protocol: GreedyDecoding, expected: list[int]
) -> None:
    assert choices(protocol(torch.tensor([0, 1, 2, 3]), 2)) == [[p] for p in expected]
    assert choices(protocol(torch.zeros(0, dtype=torch.int64), 2)) == []


IDS = torch.tensor([0, 4, 1, -1])
BAD = {
    "label-out": (lambda: Label()(IDS, 4), r"label: ids must lie in range\(4\): 2 of 4 .* 4 of"),
    "label-negative": (lambda: Label()(IDS[2:], 4), "1 of 2 do not, the first is -1 of cell 1"),
    "task-out": (lambda: Task(4)(IDS, 4), r"task: ids must lie in range\(4\)"),
    "hash-out": (lambda: Hash(4)(IDS, 4), r"hash: ids must lie in range\(4\)"),
    "label-float": (lambda: Label()(torch.rand(4), 4), r"int64 ids \[N\], .* got torch.float32"),
    "label-int32": (lambda: Label()(IDS.int(), 4), "got torch.int32"),
    "label-rank": (lambda: Label()(IDS.view(2, 2), 4), r"of shape \(2, 2\)"),
    "task-paths": (lambda: Task(4)(IDS, 5), "num_tasks=4, but there are 5 paths"),
    "hash-paths": (lambda: Hash(4)(IDS, 5), "num_tasks=4, but there are 5 paths"),
    "no-task": (lambda: Task(0), "num_tasks must be an integer >= 1, got 0"),
    "decoding-paths": (lambda: GreedyDecoding(2)(IDS, 3), "between 2 paths, but num_paths is 3"),
    "decoding-float": (lambda: GreedyDecoding(2)(torch.rand(4), 2), "got torch.float32"),
    "eos-empty": (lambda: GreedyDecoding(()), "at least one token"),
    "eos-negative": (lambda: GreedyDecoding(-1), "eos or pad must be an integer >= 0, got -1"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        call()


@pytest.mark.parametrize("protocol", [Label(), Task(4), Hash(4)], ids=repr)
def test_where_values_are_not_checked_a_bad_id_names_no_path(protocol: Label | Task | Hash) -> None:
    decision = protocol.decide(IDS, 4)
    assert decision.choice_NK is not None
    assert (decision.choice_NK[1] == -1).all()
    assert (decision.choice_NK[3] == -1).all()
    assert (decision.choice_NK[0] >= 0).any()
