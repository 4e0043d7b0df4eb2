"""The alpha-beta simulator, by hand-computed cases and by what must hold of any.

Legend: W ranks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import clustered

from brt_dist.placement import Descent, PlacementError, Work, plan
from brt_dist.placement.traffic import of_loads, of_trace
from brt_dist.simulator import EXCHANGES, Simulator, calibrate, even_step
from brt_dist.topology import Link, Topology

WORK = Work(row_bytes=1000, row_flops=1e9)
TWO_BY_TWO = Topology(
    hosts=2,
    ranks_per_host=2,
    within=Link(alpha_us=1, beta_gbs=1),
    between=Link(alpha_us=10, beta_gbs=0.1),
    tflops=1,
)
SIM = Simulator(topology=TWO_BY_TWO, work=WORK)
QUICK = Descent(kicks=2, starts=0)


def test_one_message_by_hand() -> None:
    rows_WW = np.zeros((4, 4))
    rows_WW[0, 1] = 2
    assert SIM.exchange_s(rows_WW) == pytest.approx(1e-6 + 2000 / 1e9)
    rows_WW[0, 2] = 3
    assert SIM.exchange_s(rows_WW) == pytest.approx(1e-6 + 2000 / 1e9 + 10e-6 + 3000 / 1e8)
    rows_WW[3, 3] = 1e9  # stays
    assert SIM.exchange_s(rows_WW) == pytest.approx(1e-6 + 2000 / 1e9 + 10e-6 + 3000 / 1e8)


def test_ranks_that_share_their_host() -> None:
    rows_WW = np.zeros((4, 4))
    rows_WW[0, 1], rows_WW[1, 0] = 6, 2
    shared = dataclasses.replace(SIM, shared_within=True)
    assert SIM.exchange_s(rows_WW) == pytest.approx(1e-6 + 6000 / 1e9)
    assert shared.exchange_s(rows_WW) == pytest.approx(1e-6 + 4000 / 1e9)


def test_hierarchical_by_hand() -> None:
    rows_WW = np.zeros((4, 4))
    rows_WW[0, 3] = 2  # by rank 1 of its host
    two_hops = dataclasses.replace(SIM, exchange="hierarchical")
    expected = (1e-6 + 2000 / 1e9) + (10e-6 + 2000 / 1e8)
    assert two_hops.exchange_s(rows_WW) == pytest.approx(expected)


def test_hierarchical_sends_fewer_messages_between_hosts() -> None:
    topology = Topology(hosts=8, ranks_per_host=8)
    few = np.full((64, 64), 1e-3)
    direct = Simulator(topology=topology, work=WORK)
    two_hops = Simulator(topology=topology, work=WORK, exchange="hierarchical")
    assert two_hops.exchange_s(few) < direct.exchange_s(few)
    assert two_hops.exchange_s(1e9 * few) > direct.exchange_s(1e9 * few)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from(EXCHANGES))
def test_more_rows_take_longer(seed: int, exchange: str) -> None:
    rows_WW = np.random.default_rng(seed).gamma(0.3, 100, (4, 4))
    simulator = dataclasses.replace(SIM, exchange=exchange)
    once, twice = simulator.exchange_s(rows_WW), simulator.exchange_s(2 * rows_WW)
    assert once < twice < 2 * once
    padded = dataclasses.replace(SIM, exchange="padded")
    assert padded.exchange_s(rows_WW) >= SIM.exchange_s(rows_WW) - 1e-12


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_plan_for_traffic_is_faster(top_k: int) -> None:
    traffic = of_trace(clustered(top_k=top_k, noise=0.1))
    found = plan(traffic, TWO_BY_TWO, "traffic", solver=QUICK)
    contiguous_LE = np.tile(np.repeat(np.arange(4), 2), (4, 1))
    before, after = (SIM.step(traffic, p, 600) for p in (contiguous_LE, found))
    assert after.exchange_s < before.exchange_s
    assert after.total_s == after.exchange_s + after.compute_s
    assert SIM.step(traffic, found.rank_LE, 600) == after


def test_compute_is_that_of_the_slowest_rank() -> None:
    loads = of_loads([[10.0, 0, 0, 0], [4.0, 3, 2, 1]])
    found = SIM.step(loads, np.tile(np.arange(4), (2, 1)), 10)
    assert found.compute_s == pytest.approx(14 * 1e9 / 1e12)
    replicated = plan(loads, 4, "balance", replicas=4, solver=QUICK)
    assert SIM.step(loads, replicated, 10).compute_s < found.compute_s


def test_ranks_that_share_cores() -> None:
    rows_W = np.array([1.0, 2, 3, 4])
    one, two, many = (dataclasses.replace(SIM, shared_cores=cores) for cores in (1, 2, 9))
    assert one.compute_s(rows_W) == pytest.approx(7e-3)  # all of the second host, one by one
    assert two.compute_s(rows_W) == pytest.approx(4e-3)
    assert many.compute_s(rows_W) == SIM.compute_s(rows_W) == pytest.approx(4e-3)


def test_calibration_finds_the_link() -> None:
    link = Link(alpha_us=20, beta_gbs=2.5)
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    rng = np.random.default_rng(0)
    exact = [link.seconds(b) for b in sizes]
    found, error = calibrate(sizes, exact)
    assert found.alpha_us == pytest.approx(20)
    assert found.beta_gbs == pytest.approx(2.5)
    assert error < 1e-9
    noisy = [s * f for s, f in zip(exact, rng.uniform(0.9, 1.1, 5), strict=True)]
    found, error = calibrate(sizes, noisy)
    assert found.beta_gbs == pytest.approx(2.5, rel=0.1)
    assert 0 < error < 0.1
    three, _ = calibrate(sizes, [3 * 20e-6 + b / 2.5e9 for b in sizes], [3] * 5)
    assert three.alpha_us == pytest.approx(20)


@pytest.mark.parametrize(
    ("num_bytes", "seconds"), [([1], [1]), ([1, 1], [1, 2]), ([1, 2], [1, 0]), ([1, 2], [1])]
)
def test_what_cannot_be_calibrated(num_bytes: list[float], seconds: list[float]) -> None:
    with pytest.raises(PlacementError, match="calibrate"):
        calibrate(num_bytes, seconds)


def test_times_that_shrink_with_bytes_are_no_link() -> None:
    with pytest.raises(PlacementError, match="do not grow"):
        calibrate([1e3, 1e6], [1.0, 1e-3])


def test_cost_grows_up_to_as_many_ranks_as_experts() -> None:
    steps = {}
    for num_ranks in (8, 64, 256, 512, 4096):
        topology = Topology(hosts=num_ranks // 8, ranks_per_host=8)
        simulator = Simulator(topology=topology, work=WORK)
        steps[num_ranks] = even_step(
            simulator, num_experts=256, top_k=8, num_layers=64, cells_per_rank=1024
        )
    times = [step.exchange_s for step in steps.values()]
    assert times == sorted(times)
    assert steps[512] == steps[4096] == steps[256]
    assert len({step.compute_s for step in steps.values()}) == 1


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(PlacementError, match="exchange is one of"):
        Simulator(topology=TWO_BY_TWO, work=WORK, exchange="magic")
    with pytest.raises(PlacementError, match="shared_cores must be"):
        dataclasses.replace(SIM, shared_cores=0)
    with pytest.raises(PlacementError, match="a plan for 2 ranks on 4"):
        SIM.step(of_trace(clustered(50)), plan(clustered(50), 2, solver=QUICK), 1)
    with pytest.raises(PlacementError, match="must divide"):
        even_step(SIM, num_experts=6, top_k=1, num_layers=1, cells_per_rank=1)
    with pytest.raises(PlacementError, match="row_bytes"):
        Work(row_bytes=0, row_flops=1)
