"""The benchmark runner, through fake clocks, variants and probes; and the built-in workloads."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import brt
from brt import bench, plugins
from brt.bench import (
    Instruments,
    Machine,
    Result,
    Settings,
    Unavailable,
    Variant,
    Workload,
    experts,
)
from brt.bench.check import Mismatch, largest_error
from brt.bench.experts import grouped
from brt.bench.loads import choices, skewed_scores, traced_choices
from brt.bench.probe import CopyProbe, ForeignLoad, GemmProbe, kept_memory
from brt.bench.routing import routing
from brt.bench.timer import HostTimer
from brt.bench.workloads import BUILTIN
from brt.cli import bench as cli
from brt.errors import BrtError

CPU = torch.device("cpu")
MACHINE = Machine(
    name="abacus", cores=2, gemm_gflops=1.0, copy_gbps=1.0, cache_bytes=1, load_average=None,
    keeps_memory=False, versions={"python": "3", "torch": "2"},
)  # fmt: skip


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(
        self, name: str, seconds: float | Iterator[float], output: Any = None
    ) -> Callable[[], Callable[..., Any]]:
        """A `make` whose run takes so long and doubles its input, or gives `output`."""
        steps = itertools.repeat(seconds) if isinstance(seconds, float) else seconds

        def run(x: torch.Tensor) -> Any:
            self.ran.append(name)
            self.now += next(steps)
            return 2 * x if output is None else output

        return lambda: run


def instruments(
    clock: Callable[[], float],
    gemm: Sequence[float] = (1e9,),
    foreign: Sequence[float | None] = (None,),
    slept: list[float] | None = None,
) -> Instruments:
    """Probes that give these values in turn, then the last one for ever."""
    rates = itertools.chain(gemm, itertools.repeat(gemm[-1]))
    loads = itertools.chain(foreign, itertools.repeat(foreign[-1]))
    return Instruments(
        timer=HostTimer(clock),
        gemm=lambda: next(rates),
        foreign=lambda: next(loads),
        sleep=(slept if slept is not None else []).append,
        describe=lambda device, rate, keeps: MACHINE,
    )


def doubling(*variants: Variant, num_sets: int = 1, **fields: Any) -> Workload:
    sets = [(torch.arange(4.0) + i,) for i in range(num_sets)]
    given = {
        "name": "doubling", "shapes": "N=4", "device": CPU, "dtype": torch.float32, "sets": sets,
        "variants": variants, "reference": lambda x: 2 * x.double(), "tolerance": 1e-6,
    }  # fmt: skip
    return Workload(**(given | fields))


def plain(clock: Clock, seconds: float | Iterator[float] = 0.04) -> Variant:
    return Variant(name="plain", kind="eager", make=clock.taking("plain", seconds))


def measured(workload: Workload, tools: Instruments, **settings: Any) -> Result:
    given: dict[str, Any] = {"repeats": 4, "retries": 4, **settings}
    return bench.run(workload, settings=Settings(**given), instruments=tools)


def test_ratios_of_the_right_and_timed():
    clock = Clock()
    result = measured(
        doubling(
            plain(clock),
            Variant(name="peer", kind="peer", make=clock.taking("peer", 0.03)),
            Variant(name="ours", kind="brt", make=clock.taking("ours", 0.01), num_bytes=1e6),
            Variant(name="stream", kind="limit", make=clock.taking("stream", 0.001, "x")),
            Variant(name="dense", kind="limit", make=clock.taking("dense", 0.005, "x"), flops=1e9),
            Variant(name="top-k", kind="part", make=clock.taking("top-k", 0.002, "x")),
        ),
        instruments(clock),
    )
    ours = result.row("ours")
    assert (ours.status, ours.error) == ("ok", 0.0)
    assert ours.median_ms == pytest.approx(10)
    assert ours.ratio_to_eager == pytest.approx(4)
    assert (ours.best_peer, ours.ratio_to_best_peer) == ("peer", pytest.approx(3))
    # of two limits the slower one binds
    assert (ours.limit, ours.limit_fraction) == ("dense", pytest.approx(0.5))
    assert ours.gbps == pytest.approx(0.1)
    assert result.row("dense").gflops == pytest.approx(200)
    assert result.row("top-k").median_ms == pytest.approx(2)
    assert result.row("top-k").ratio_to_eager is None
    assert not result.disturbed
    assert not result.failed


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        pytest.param(torch.ones(4), "error 8.3e-01 is above 1.0e-06", id="values"),
        pytest.param(torch.full((4,), float("nan")), "error inf is above", id="nan"),
        pytest.param(torch.ones(5), "gave shape [5], the reference [4]", id="shape"),
        pytest.param((torch.ones(4),) * 2, "gave 2 tensors, the reference 1", id="structure"),
        pytest.param("four", "cannot compare a str", id="type"),
    ],
)
@pytest.mark.parametrize("kind", ["peer", "brt"])
def test_a_wrong_variant_never_wins(kind: Any, output: Any, reason: str):
    clock = Clock()
    wrong = Variant(name="wrong", kind=kind, make=clock.taking("wrong", 0.001, output))
    result = measured(doubling(plain(clock), wrong), instruments(clock))
    row = result.row("wrong")
    assert row.status == "wrong"
    assert reason in row.reason
    assert (row.median_ms, row.ratio_to_eager, row.samples) == (None, None, 0)
    assert result.row("plain").best_peer == "plain"
    assert bool(result.failed) == (kind == "brt")
    assert reason in str(result)


def test_a_variant_that_turns_wrong_has_no_numbers():
    clock = Clock()
    calls = itertools.count()

    def make() -> Callable[..., Any]:
        def run(x: torch.Tensor) -> torch.Tensor:
            clock.now += 0.01
            return 2 * x if next(calls) < 5 else x

        return run

    result = measured(
        doubling(plain(clock), Variant(name="rots", kind="brt", make=make)), instruments(clock)
    )
    assert result.row("rots").status == "wrong"
    assert result.row("rots").median_ms is None


def test_what_raises_is_shown_and_stops_nobody_else():
    clock = Clock()

    def no_make() -> Callable[..., Any]:
        raise RuntimeError("no compiler\nwith a long tail")

    def absent() -> Callable[..., Any]:
        raise Unavailable("not installed")

    def breaks(after: int) -> Callable[[], Callable[..., Any]]:
        def times() -> Iterator[float]:
            yield from [0.01] * after
            raise RuntimeError("out of memory")

        return clock.taking("breaks", times())

    result = measured(
        doubling(
            plain(clock),
            Variant(name="unmade", kind="brt", make=no_make),
            Variant(name="absent", kind="brt", make=absent),
            Variant(name="at once", kind="peer", make=breaks(0)),
            Variant(name="later", kind="peer", make=breaks(6)),
        ),
        instruments(clock),
    )
    rows = {row.variant: (row.status, row.reason) for row in result.rows}
    assert rows["plain"] == ("ok", "")
    assert rows["unmade"] == ("failed", "RuntimeError: no compiler")
    assert rows["absent"] == ("skipped", "not installed")
    assert rows["at once"][0] == "failed"
    assert rows["later"] == ("failed", "RuntimeError: out of memory")
    assert [row.variant for row in result.failed] == ["unmade"]
    assert result.row("plain").best_peer == "plain"


def test_a_disturbed_round_is_repeated_and_does_not_count():
    clock, slept = Clock(), list[float]()
    # warm-up: the check, then two bursts; then a slow round
    times = itertools.chain([0.04] * 3, [0.9], itertools.repeat(0.04))
    probes = [1e9] * 3 + [0.5e9] + [1e9]  # three to begin with, then one after each round
    result = measured(
        doubling(plain(clock, times)), instruments(clock, gemm=probes, slept=slept), pause_s=0.25
    )
    assert (result.rounds, result.rounds_rejected, result.disturbed) == (4, 1, False)
    assert result.disturbances == ("the product ran at 0.50 of its best",)
    assert slept == [0.25]
    row = result.row("plain")
    assert (row.samples, row.median_ms, row.p95_ms) == (4, pytest.approx(40), pytest.approx(40))


def test_a_machine_that_stays_busy_ends_and_is_marked():
    clock = Clock()
    probes = [1e9, 1e9, 1e9, *[0.5e9] * 100]
    result = measured(doubling(plain(clock)), instruments(clock, gemm=probes))
    assert (result.rounds, result.rounds_rejected, result.disturbed) == (0, 8, True)
    assert "DISTURBED" in str(result)
    assert result.row("plain").samples == 8


def test_a_later_best_judges_earlier_rounds():
    clock = Clock()
    # busy from the start: only the last probes show what the machine can do
    probes = [0.5e9] * 3 + [0.5e9] * 2 + [1e9]
    result = measured(doubling(plain(clock)), instruments(clock, gemm=probes))
    assert (result.rounds, result.rounds_rejected, result.disturbed) == (4, 3, False)


def test_other_processes_on_our_cores_disturb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("brt.bench.runner.num_cores", lambda: 2)
    for threads, rejected in ((2, 1), (1, 0)):
        clock = Clock()
        # one reading to begin with, one after each round, one after a pause
        tools = instruments(clock, foreign=[0.0, 0.9, 0.0])
        result = measured(doubling(plain(clock)), tools, threads=threads)
        assert result.rounds_rejected == rejected, threads
        if rejected:
            assert result.disturbances == ("other processes took 0.9 cores",)


def test_variants_take_turns_in_another_order_each_round():
    clock = Clock()
    names = ("a", "b", "c")
    variants = [Variant(name=n, kind="peer", make=clock.taking(n, 0.04)) for n in names]
    measured(doubling(*variants), instruments(clock), repeats=6)
    rounds = clock.ran[9:-3]  # without the check, two bursts to warm up, and the last check
    orders = ["".join(rounds[i : i + 3]) for i in range(0, 18, 3)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_sets_rotate_and_short_runs_are_timed_together():
    clock, seen = Clock(), list[float]()

    def make() -> Callable[..., Any]:
        def run(x: torch.Tensor) -> torch.Tensor:
            seen.append(float(x[0]))
            clock.now += 2e-6
            return 2 * x

        return run

    workload = doubling(Variant(name="short", kind="brt", make=make), num_sets=3)
    result = measured(workload, instruments(clock), burst_ms=0.2)
    assert seen[1:7] == [0, 1, 2, 0, 1, 2]
    assert result.row("short").median_ms == pytest.approx(2e-3)
    # 10 runs of 2 us make the 20 us that the clock can tell; 9 or 10 of those a burst of 0.2 ms
    assert 4 * 9 <= result.row("short").samples <= 4 * 10


def test_a_sample_of_uneven_sets_is_their_mean():
    clock = Clock()

    def make() -> Callable[..., Any]:
        def run(x: torch.Tensor) -> torch.Tensor:
            clock.now += 0.09 if x[0] == 2 else 0.03
            return 2 * x

        return run

    def median_ms(*, is_uneven: bool) -> float:
        variant = Variant(name="one", kind="brt", make=make)
        workload = doubling(variant, num_sets=3, is_uneven=is_uneven)
        found = measured(workload, instruments(clock)).row("one").median_ms
        assert found is not None
        return found

    assert median_ms(is_uneven=False) != pytest.approx(50)
    assert median_ms(is_uneven=True) == pytest.approx(50)


def test_modes_threads_and_collector_are_restored():
    import gc

    clock, seen = Clock(), list[tuple[bool, int, bool]]()

    def make() -> Callable[..., Any]:
        def run(x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_grad_enabled(), torch.get_num_threads(), gc.isenabled()))
            clock.now += 0.04
            return 2 * x

        return run

    before = (torch.is_grad_enabled(), torch.get_num_threads(), gc.isenabled())
    variant = Variant(name="sees", kind="brt", make=make)
    measured(doubling(variant, mode="grad"), instruments(clock), threads=1)
    measured(doubling(variant), instruments(clock), threads=1)
    assert (torch.is_grad_enabled(), torch.get_num_threads(), gc.isenabled()) == before
    assert set(seen) == {(True, 1, False), (False, 1, False)}


def test_an_interrupt_goes_through():
    clock = Clock()

    def times() -> Iterator[float]:
        yield from [0.04] * 5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(doubling(plain(clock, times())), instruments(clock))


def test_progress_is_told():
    clock, told = Clock(), list[tuple[str, int, int]]()
    bench.run(
        doubling(plain(clock)),
        settings=Settings(repeats=2),
        instruments=instruments(clock),
        progress=lambda *step: told.append(step),
    )
    assert told == [
        ("reference", 0, 1), ("set-up: plain", 0, 1), ("warm-up: plain", 0, 1),
        ("round 1", 0, 2), ("round 2", 1, 2),
    ]  # fmt: skip


def test_json_round_trip(tmp_path: Path):
    clock = Clock()
    ours = Variant(name="ours", kind="brt", make=clock.taking("ours", 0.01, "wrong"))
    result = measured(doubling(plain(clock), ours, options={"n": 4}), instruments(clock))
    path = tmp_path / "new" / "result.json"
    bench.save([result], path)
    data = json.loads(path.read_text())
    assert data["schema"] == "brt-bench/1"
    assert data["results"][0]["options"] == {"n": 4}
    assert data["results"][0]["rows"][1]["median_ms"] is None
    assert bench.load(path) == [result]


def test_json_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    result = measured(doubling(plain(clock)), instruments(clock))
    path = tmp_path / "result.json"
    path.write_text("what was there")

    def interrupted(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.save([result], path)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "what was there"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no benchmark results"),
        ("[]", "holds no benchmark results"),
        ('{"schema": "brt-bench/9"}', "this brt reads 'brt-bench/1'"),
        ('{"schema": "brt-bench/1", "results": [{}]}', "is damaged"),
    ],
)
def test_json_of_something_else(tmp_path: Path, text: str, message: str):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BrtError, match=message):
        bench.load(path)


def test_errors_say_what_to_do():
    clock = Clock()
    with pytest.raises(BrtError, match="kind 'ours'; there are eager, peer"):
        Variant(name="x", kind="ours", make=clock.taking("x", 1.0))  # type: ignore[arg-type]
    with pytest.raises(BrtError, match="two variants are called plain"):
        doubling(plain(clock), plain(clock))
    with pytest.raises(BrtError, match="needs at least one set"):
        doubling(plain(clock), sets=[])
    with pytest.raises(BrtError, match="mode must be one of"):
        doubling(plain(clock), mode="training")
    with pytest.raises(BrtError, match="repeats and threads must be at least 1"):
        Settings(repeats=0)
    with pytest.raises(BrtError, match=r"no variant of 'doubling' matches \['x'\]; it has: plain"):
        doubling(plain(clock)).only(["x"])
    with pytest.raises(BrtError, match="has no variant 'x'; it has: plain"):
        measured(doubling(plain(clock)), instruments(clock)).row("x")
    with pytest.raises(BrtError, match="has no option 'num'; there are: n, p, k, d, skew, seed"):
        bench.make_workload(BUILTIN[0], "cpu", torch.float32, {"num": "1"})
    with pytest.raises(BrtError, match="option n=many: expected an integer"):
        bench.make_workload(BUILTIN[0], "cpu", torch.float32, {"n": "many"})
    with pytest.raises(BrtError, match="skew 'even'; there are uniform, zipf, one"):
        bench.make_workload(BUILTIN[0], "cpu", torch.float32, {"skew": "even"})
    if not torch.cuda.is_available():
        with pytest.raises(BrtError, match="finds no CUDA device"):
            bench.make_workload(BUILTIN[0], "cuda", torch.float32, {})


def test_largest_error_is_relative_to_the_largest_magnitude():
    wanted = {"a": torch.tensor([0.0, 10.0]), "b": [torch.tensor([1, 2])]}
    came = {"b": [torch.tensor([1, 2])], "a": torch.tensor([0.5, 10.0])}
    assert largest_error(came, wanted) == pytest.approx(0.05)
    assert largest_error(torch.ones(0), torch.ones(0)) == 0
    assert largest_error(torch.ones(2), torch.zeros(2)) == 1
    with pytest.raises(Mismatch):
        largest_error(torch.ones(1, 2), torch.ones(2))


def test_loads_are_as_skewed_as_asked():
    loads = {}
    for skew in ("uniform", "zipf", "one"):
        scores_NP = skewed_scores(4000, 8, skew, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        choice_NK, weight_NK = choices(scores_NP, 1)
        loads[skew] = choice_NK.flatten().bincount(minlength=8)
        assert bool((weight_NK == 1).all())
    assert loads["uniform"].min() > 400
    assert loads["zipf"].argsort(descending=True)[:3].tolist() == [0, 1, 2]
    assert loads["one"].tolist() == [4000, 0, 0, 0, 0, 0, 0, 0]


def test_probes_of_this_machine():
    assert GemmProbe(CPU)() > 1e6
    assert CopyProbe(CPU)() > 1e6
    load = ForeignLoad()
    assert load() is None  # too early to tell
    assert bench.cache_bytes(CPU) > 0
    assert bench.num_sets_beyond_cache(1 << 40, CPU) == 2
    assert bench.num_sets_beyond_cache(1, CPU) == 64
    with kept_memory() as kept:
        assert kept in (True, False)


SMALL = {
    "routing": {"n": 48, "p": 5, "k": 2, "d": 16},
    "grouped": {"n": 24, "p": 5, "k": 2, "d": 16, "h": 24},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skew", ["uniform", "zipf", "one"])
@pytest.mark.parametrize("spec", BUILTIN, ids=lambda spec: spec.name)
def test_builtin_workloads_agree(spec: brt.WorkloadSpec, skew: str, dtype: torch.dtype):
    workload = bench.make_workload(spec, "cpu", dtype, {**SMALL[spec.name], "skew": skew})
    result = bench.run(
        workload,
        settings=Settings(repeats=1, warm_up_ms=0, burst_ms=0.01),
        variants=["^(?!compiled)"],
        instruments=instruments(time.perf_counter),
    )
    for row in result.rows:
        maybe = ("brt", "torch grouped_mm", "transformers grouped_mm", "transformers batched_mm")
        allowed = ("ok", "skipped") if row.variant in maybe else ("ok",)
        assert row.status in allowed, f"{spec.name} {skew} {dtype} {row.variant}: {row.reason}"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_experts_agree(activation: str, train: bool):
    options = {**SMALL["grouped"], "activation": activation, "train": train}
    result = bench.run(
        bench.make_workload(BUILTIN[1], "cpu", torch.float32, options),
        settings=Settings(repeats=1, warm_up_ms=0, burst_ms=0.01),
        instruments=instruments(time.perf_counter),
    )
    rows = {row.variant: row for row in result.rows}
    assert all(row.status in ("ok", "skipped") for row in rows.values()), rows
    assert rows["brt expert_mlp"].status == rows["one dense pair"].status == "ok"
    assert ("weight stream" in rows) is not train


def test_gradients_do_not_hang_on_rounding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts, "_KINK", 1e-2)
    generator = torch.Generator().manual_seed(0)
    up_PHD = torch.randn(4, 16, 8, generator=generator) / 8**0.5
    x_ND, choice_NK = torch.randn(64, 8, generator=generator), torch.arange(128).view(64, 2) % 4
    before_ND = x_ND.clone()

    def nearest_N() -> torch.Tensor:
        hidden_NKH = torch.einsum("nd,nkhd->nkh", x_ND.double(), up_PHD[choice_NK].double())
        return hidden_NKH.abs().amin((1, 2))

    is_near_N = nearest_N() < 1e-2
    assert is_near_N.any()
    experts._leave_kinks(x_ND, choice_NK, up_PHD, generator)
    assert nearest_N().min() >= 1e-2
    assert torch.equal((x_ND != before_ND).any(1), is_near_N)


def test_choices_of_a_trace(tmp_path: Path):
    ids = np.random.default_rng(0).integers(0, 6, (10, 3, 4), dtype=np.uint8)
    np.savez(tmp_path / "routes.npz", lens=np.arange(3), law=ids, other=ids[::-1])
    generator = torch.Generator().manual_seed(0)

    def taken(file: str, **changed: int):
        args = {"layer": 1, "first": 8, "num_cells": 4, "num_paths": 6, "k": 2} | changed
        return traced_choices(str(tmp_path / file), generator=generator, **args)

    choice_NK, weight_NK = taken("routes.npz")
    assert choice_NK.tolist() == ids[[8, 9, 0, 1], 1, :2].tolist()
    assert torch.allclose(weight_NK.sum(1), torch.ones(4))
    assert taken("routes.npz#other")[0].tolist() == ids[::-1][[8, 9, 0, 1], 1, :2].tolist()
    for file, changed, what in (
        ("none.npz", {}, "no .npz file"),
        ("routes.npz#lens", {}, "no array of expert ids"),
        ("routes.npz#nowhere", {}, "no array of expert ids"),
        ("routes.npz", {"layer": 3}, "asked for layer 3"),
        ("routes.npz", {"k": 5}, "k=5"),
        ("routes.npz", {"num_paths": 2}, "p=2"),
    ):
        with pytest.raises(BrtError, match=what):
            taken(file, **changed)


def test_builtin_workloads_beyond_the_cache():
    workload = routing(CPU, torch.float32, n=64, p=4, d=8)
    assert len(workload.sets) == 64
    assert "N=64 P=4 k=2 D=8 uniform" in workload.shapes
    assert grouped(CPU, torch.bfloat16, n=4, p=2, d=4, h=8).tolerance == 3e-2


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run `brt bench` on three workloads of a plugin, with instruments that never disturb."""
    clock = Clock()

    def factory(device: torch.device, dtype: torch.dtype, *, n: int = 4, fast: bool = False):
        return doubling(plain(clock), shapes=f"N={n} {fast}", options={"n": n, "fast": fast})

    def wrong(device: torch.device, dtype: torch.dtype):
        bad = clock.taking("bad", 0.01, torch.ones(4))
        return doubling(plain(clock), Variant(name="ours", kind="brt", make=bad))

    class Acme:
        @brt.hookimpl
        def brt_workloads(self) -> Iterator[brt.WorkloadSpec]:
            yield brt.WorkloadSpec(name="acme-fine", summary="Right.", factory=factory)
            yield brt.WorkloadSpec(name="acme-wrong", summary="Wrong.", factory=wrong)

    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register(app)

    def run(*args: str, gemm: Sequence[float] = (1e9,)) -> Any:
        monkeypatch.setattr(Instruments, "of", lambda device: instruments(clock, gemm=gemm))
        return CliRunner().invoke(app, ["bench", *args])

    with plugins.using(Acme()):
        yield run


def test_command_lists(command: Callable[..., Any]):
    result = command("--list")
    assert result.exit_code == 0
    for text in ("acme-fine", "Wrong.", "n=4, fast=False", "routing", "grouped"):
        assert text in result.output


def test_command_prints_json(command: Callable[..., Any]):
    listed = json.loads(command("--list", "--json", "-").stdout)
    assert [entry["name"] for entry in listed] == ["acme-fine", "acme-wrong", "grouped", "routing"]
    result = command("acme-fine", "--repeats", "1", "--json", "-")
    assert json.loads(result.stdout)["results"][0]["workload"] == "doubling"


def test_command_sweeps_and_writes(command: Callable[..., Any], tmp_path: Path):
    path = tmp_path / "r.json"
    given = ("--option", "n=8", "--option", "n=16", "--option", "fast=yes", "--json", str(path))
    result = command("acme-fine", *given, "--repeats", "2")
    assert result.exit_code == 0, result.output
    assert "N=8 True" in result.output
    found = bench.load(path)
    assert [entry.options for entry in found] == [
        {"n": 8, "fast": True},
        {"n": 16, "fast": True},
    ]


def test_command_exit_codes(command: Callable[..., Any], tmp_path: Path):
    path = tmp_path / "r.json"
    wrong = command("acme-wrong", "--repeats", "2", "--json", str(path))
    assert (wrong.exit_code, path.exists()) == (1, True)
    busy = command("acme-fine", "--retries", "1", "--repeats", "2", gemm=[1e9] * 3 + [1e8])
    assert busy.exit_code == 3
    assert "DISTURBED" in busy.output
    for args, message in (
        (("acme-fin",), "did you mean 'acme-fine'"),
        (("acme-fine", "--option", "n"), "expected NAME=VALUE"),
        (("acme-fine", "--option", "fast=maybe"), "expected true or false"),
        (("acme-fine", "--dtype", "int64"), "expected float32"),
    ):
        with pytest.raises(BrtError, match=message):
            raise command(*args).exception


def test_command_interrupted_leaves_nothing(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupted)
    path = tmp_path / "r.json"
    result = command("acme-fine", "--json", str(path))
    assert result.exit_code != 0
    assert list(tmp_path.iterdir()) == []
