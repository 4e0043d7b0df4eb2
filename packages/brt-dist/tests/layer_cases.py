"""What ranks do in test_experts: a layer on W ranks against the same layer in one process.

Legend: W ranks, N cells of all ranks, P experts, K choices per cell, D model and H hidden features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import brt
import brt_dist
from brt.route import make_route
from brt_dist import experts, fastest
from brt_dist.stacked import Activation
from brt_dist.topology import Link, Topology

DIM, HIDDEN = 5, 4
HOSTS: dict[int, brt_dist.Hosts] = {}
WAYS = (
    brt_dist.Transport(), brt_dist.Transport(degree=2), brt_dist.Transport(replicated=True),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A layer and the cells of each rank; equal on every rank."""

    num_experts: int = 4
    sizes: tuple[int, ...] = (3, 5, 0, 2)
    top_k: int = 2
    gated: bool = True
    bias: bool = True
    weighted: bool = True
    skewed: bool = False
    seed: int = 0


def tensors_of(layer: Layer, num_cells: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Cells, choices, their weights, and the experts' up, down and biases."""
    made = torch.Generator().manual_seed(layer.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    scores = random(num_cells, layer.num_experts)
    if layer.skewed:
        scores[:, 0] += 5
    choice_NK = scores.topk(layer.top_k, 1).indices
    choice_NK[::4, -1] = -1
    weight_NK = scores.softmax(1).gather(1, choice_NK.clamp(min=0))
    halves = 2 if layer.gated else 1
    weights = [random(layer.num_experts, halves * HIDDEN, DIM)]
    weights += [random(layer.num_experts, DIM, HIDDEN)]
    weights += [random(layer.num_experts, halves * HIDDEN), random(layer.num_experts, DIM)]
    return random(num_cells, DIM), choice_NK, weight_NK, weights[: 4 if layer.bias else 2]


def hosts_of(ranks_per_host: int) -> brt_dist.Hosts:
    if ranks_per_host not in HOSTS:
        HOSTS[ranks_per_host] = brt_dist.Hosts.of(ranks_per_host)
    return HOSTS[ranks_per_host]


def transport_of(name: str) -> brt_dist.Transport:
    if name.startswith("overlap"):
        return brt_dist.Transport(degree=int(name[-1]))
    if name.startswith("hosts"):
        return brt_dist.Transport(hosts=hosts_of(int(name[-1])))
    if name.startswith("capacity"):
        return brt_dist.Transport(capacity=int(name.removeprefix("capacity")))
    if name == "fastest":
        return brt_dist.Transport(among=WAYS)
    return brt_dist.Transport(replicated=name == "replicated")


def activation_of(layer: Layer, by_function: bool) -> Activation:
    if by_function:
        return swiglu if layer.gated else F.gelu
    return "swiglu" if layer.gated else "gelu"


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def close(came: Tensor | None, wanted: Tensor | None, what: str = "") -> None:
    """Equal up to 1e-5 of the largest value."""
    assert came is not None, what
    assert wanted is not None, what
    assert came.shape == wanted.shape, what
    if wanted.numel():
        error = (came - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
        assert error <= 1e-5, f"{what}: {error}"


def equals_one_process(
    rank: int, layer: Layer, transport: str, placement: tuple[int, ...] | None, function: bool
) -> None:
    num_ranks = dist.get_world_size()
    sizes = layer.sizes[:num_ranks]
    ends = torch.tensor((0, *sizes)).cumsum(0).tolist()
    own = slice(ends[rank], ends[rank + 1])
    x_ND, choice_NK, weight_NK, weights = tensors_of(layer, sum(sizes))
    activation = activation_of(layer, function)

    whole = [w.clone().requires_grad_() for w in (x_ND, weight_NK, *weights)]
    one = brt.ExpertRouter(layer.num_experts)
    biases = dict(zip(("up_bias_PH", "down_bias_PD"), whole[4:], strict=False))
    wanted = one(
        whole[0], choice_NK, whole[1] if layer.weighted else None, whole[2], whole[3],
        activation=activation, **biases,
    )  # fmt: skip
    wanted.square().sum().backward()

    parallel = brt_dist.ExpertParallel(
        weights[0], weights[1], activation=activation, placement=placement,
        transport=transport_of(transport),
        **dict(zip(("up_bias_PH", "down_bias_PD"), weights[2:], strict=False)),
    )  # fmt: skip
    x = x_ND[own].clone().requires_grad_()
    weight = weight_NK[own].clone().requires_grad_()
    out = parallel(x, choice_NK[own], weight if layer.weighted else None)
    close(out, wanted[own].detach())
    out.square().sum().backward()
    close(x.grad, whole[0].grad[own])
    if layer.weighted:
        close(weight.grad, whole[1].grad[own])
    held = list(parallel.router.spread.held)
    names = ("up", "down", "up_bias", "down_bias")
    for name, full in zip(names, whole[2:], strict=False):
        close(getattr(parallel, name).grad, full.grad[held], name)
    with torch.no_grad():
        again = parallel(x, choice_NK[own], weight if layer.weighted else None)
    close(again, out.detach())


def in_bfloat16(rank: int, transport: str) -> None:
    """Under autocast, also where a rank holds no expert: dtypes agree between ranks."""
    layer = Layer(num_experts=2, sizes=(3, 3, 3, 3), bias=False)
    x_ND, choice_NK, weight_NK, weights = tensors_of(layer, 3)
    parallel = brt_dist.ExpertParallel(*weights, transport=transport_of(transport))
    with torch.autocast("cpu", torch.bfloat16):
        out = parallel(x_ND, choice_NK, weight_NK)
        one = brt.ExpertRouter(2)
        wanted = one(x_ND, choice_NK, weight_NK, *weights)
    assert out.dtype == wanted.dtype
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    out.sum().backward()


def frozen_gate_and_cells(rank: int, transport: str) -> None:
    """Only the experts have gradients, and one rank has no expert."""
    layer = Layer(num_experts=2, bias=False)
    x_ND, choice_NK, weight_NK, weights = tensors_of(layer, 3)
    parallel = brt_dist.ExpertParallel(
        *weights, placement=[0, dist.get_world_size() - 1], transport=transport_of(transport)
    )
    parallel(x_ND, choice_NK, weight_NK).sum().backward()
    for parameter in parallel.parameters():
        assert parameter.grad is not None
        assert parameter.shape[0] == 0 or parameter.grad.abs().sum() > 0


def wrong_layer(rank: int, wrong: str) -> str:
    layer = Layer(sizes=(2, 2, 2, 2))
    x_ND, choice_NK, weight_NK, weights = tensors_of(layer, 2)
    placement = None
    if rank == 1 and wrong == "choice":
        choice_NK[0, 0] = 9
    if rank == 1 and wrong == "cells":
        x_ND = x_ND[:1]
    if rank == 1 and wrong == "experts":
        weights = [w[:3] for w in weights]
        choice_NK = choice_NK.clamp(max=2)
    if rank == 1 and wrong == "placement":
        placement = [1, 1, 0, 0]
    if rank == 1 and wrong == "dtype":
        x_ND = x_ND.double()
    parallel = brt_dist.ExpertParallel(weights[0], weights[1], placement=placement)
    try:
        parallel(x_ND, choice_NK, weight_NK)
    except brt.BrtError as error:
        return str(error)
    return "no error"


def hierarchical_equals_flat(rank: int, ranks_per_host: int, seed: int) -> None:
    made = torch.Generator().manual_seed(100 * seed + rank)
    counts_WG = torch.randint(0, 4, (dist.get_world_size(), 3), generator=made)
    if seed == 0:
        counts_WG[1:] = 0
    rows = torch.randn(int(counts_WG.sum()), 3, generator=made)
    ids = torch.arange(rows.shape[0]) + 100 * rank
    hosts = hosts_of(ranks_per_host)
    (flat, flat_ids), exchange = brt_dist.sparse_all_to_all((rows, ids), counts_WG)
    (came, came_ids), hops = brt_dist.hierarchical_all_to_all((rows, ids), counts_WG, hosts)
    assert torch.equal(came, flat)
    assert torch.equal(came_ids, flat_ids)
    assert torch.equal(hops.load_G, exchange.load_G)
    back, back_ids = brt_dist.reverse_hierarchical_all_to_all((came, came_ids), hops)
    assert torch.equal(back, rows)
    assert torch.equal(back_ids, ids)


def wrong_hosts(rank: int) -> list[str]:
    errors = []
    counts_WG = torch.ones(dist.get_world_size(), 2, dtype=torch.int64)
    if rank == 3:
        counts_WG[0, 0] = 9
    for call in (
        lambda: brt_dist.Hosts.of(3),
        lambda: brt_dist.hierarchical_all_to_all(torch.ones(8, 1), counts_WG, hosts_of(2)),
    ):
        try:
            call()
        except brt.BrtError as error:
            errors.append(str(error))
    return errors


def beyond_capacity(rank: int, capacity: int) -> None:
    """Of each rank's rows for an expert the first are kept, as by a capacity in one process."""
    layer = Layer(skewed=True, num_experts=5, sizes=(9, 9, 9, 9))
    x_ND, choice_NK, weight_NK, _ = tensors_of(layer, 9 + rank)
    weights = tensors_of(layer, 9)[3]
    decision = brt.Decision(5, choice_NK=choice_NK, weight=weight_NK, capacity=capacity)
    kept_NK = torch.where(make_route(decision, 9 + rank).row_NK >= 0, choice_NK, -1)
    assert bool((kept_NK != choice_NK).any())
    biases = {"up_bias_PH": weights[2], "down_bias_PD": weights[3]}
    wanted = brt.ExpertRouter(5)(x_ND, kept_NK, weight_NK, *weights[:2], **biases)
    parallel = brt_dist.ExpertParallel(
        *weights[:2], **biases, transport=brt_dist.Transport(capacity=capacity)
    )
    for _ in range(2):
        close(parallel(x_ND, choice_NK, weight_NK), wanted)


def sizes_never_change(rank: int) -> set[tuple[int, ...]]:
    """The sizes that travel, whatever the gate decides; counts are compared once."""
    layer = Layer()
    parallel = brt_dist.ExpertParallel(
        *tensors_of(layer, 1)[3][:2], transport=brt_dist.Transport(capacity=6)
    )
    sizes, agrees = set(), 0
    for seed in range(3):
        x_ND, choice_NK, weight_NK, _ = tensors_of(dataclasses.replace(layer, seed=seed), 6)
        with (
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as swap,
            mock.patch.object(experts, "agree", wraps=experts.agree) as agree,
            torch.no_grad(),
        ):
            parallel(x_ND, choice_NK, weight_NK)
        agrees += agree.call_count
        sizes |= {tuple(call.args[0].shape) for call in swap.call_args_list[-2:]}
    assert agrees == 1
    return sizes


def replicas_share_rows(rank: int) -> tuple[list[int], list[int]]:
    """Rows for each slot, of ten cells that choose an expert of two ranks, by either router."""
    spread = brt_dist.Spread.of(3, None, [[0, 1], 0, 1])
    slot_NK = spread.slots(torch.zeros(10, 1, dtype=torch.int64), turn=rank)
    counts_WG = spread.counts_WG(torch.tensor([7, 2, 3]))
    return slot_NK.flatten().bincount(minlength=4).tolist(), counts_WG.flatten().tolist()


def fastest_by_size(rank: int) -> tuple[dict[int, int], list[int]]:
    """Which way is taken from how many cells on, and what was measured: rank 0 has most cells."""
    layer = layer_of_ones(brt_dist.Transport(among=WAYS))
    measured: list[int] = []

    def seconds(calls: list[object], *_: object) -> list[float]:
        measured.append(len(calls))
        return [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]][len(measured) - 1]

    with mock.patch.object(fastest, "side_by_side", seconds):
        for num_cells in (5, 7, 4, 40, 63, 6):
            layer(*cells_of_ones(num_cells if rank == 0 else rank))
    return {size: WAYS.index(way) for size, way in layer.router.chosen.items()}, measured


def fastest_by_topology(rank: int, num_choices: int, beta_gbs: float, alpha_us: float) -> list[int]:
    """The way for few cells and for many, by a topology."""
    link = Link(alpha_us=alpha_us, beta_gbs=beta_gbs)
    topology = Topology(ranks_per_host=dist.get_world_size(), within=link, tflops=1e-6)
    layer = layer_of_ones(brt_dist.Transport(among=WAYS, topology=topology))
    with mock.patch.object(fastest, "side_by_side", None):
        for num_cells in (1, 300):
            x_ND, choice_NK = cells_of_ones(num_cells)
            layer(x_ND, choice_NK[:, :num_choices])
    return [WAYS.index(way) for way in layer.router.chosen.values()]


def layer_of_ones(transport: brt_dist.Transport) -> brt_dist.ExpertParallel:
    weights = torch.ones(4, HIDDEN, DIM), torch.ones(4, DIM, HIDDEN)
    return brt_dist.ExpertParallel(*weights, activation="relu", transport=transport)


def cells_of_ones(num_cells: int) -> tuple[Tensor, Tensor]:
    return torch.ones(num_cells, DIM), torch.arange(4).expand(num_cells, 4)


def wrong_ways(rank: int) -> list[str]:
    """Errors of a way that is of another group, and of cells that one rank has wrong."""
    small = Topology(ranks_per_host=dist.get_world_size() + 1)
    found = []
    for transport in (
        brt_dist.Transport(among=WAYS, topology=small),
        brt_dist.Transport(among=(dataclasses.replace(transport_of("hosts1")),)),
    ):
        group = dist.group.WORLD if transport.topology else dist.new_group()
        spread = brt_dist.Spread.of(4, group)
        try:
            brt_dist.ParallelExpertRouter(spread, transport)
        except brt_dist.ParallelError as error:
            found.append(str(error))
    layer = layer_of_ones(brt_dist.Transport(among=WAYS))
    x_ND, choice_NK = cells_of_ones(3)
    try:
        layer(x_ND[rank:], choice_NK[:3])
    except ValueError as error:
        found.append(str(error))
    return found
