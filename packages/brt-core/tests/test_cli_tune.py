"""`brt tune`, and kernels that are chosen by what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from dynamic_models import Mixture, to_paths

import brt
from brt import cli, ops, plugins, tuning
from brt.ops import measured, registry
from brt.tuning_run import tune

Run = Callable[..., tuple[int, str, str]]
PATHS = to_paths([0, 1, 1, 0])


def slow(*args: Any) -> Any:
    out = args[0]
    for _ in range(300):  # keeps a processor busy, and gives the same
        out = args[0] + 0
    return reference(*args) if out is not None else None


def reference(x: Any, cell_R: Any, row_NK: Any, weight_R: Any) -> Any:
    return brt.reference.dispatch(x, cell_R, row_NK, weight_R)


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of our own, a model, and a kernel that only says that it is fast."""
    monkeypatch.setenv("BRT_TUNING", str(tmp_path / "tuning.sqlite3"))
    module = ModuleType("acme")
    model = brt.ModelSpec(
        name="acme-mixture",
        summary="a mixture",
        factory=Mixture,
        sample=lambda seed=0: (to_paths([0, 1] * (seed + 1)),),
    )
    kernel = brt.KernelSpec(
        op="dispatch", device="cpu", name="acme-slow", forward=slow, estimate=lambda *_: 0.001
    )
    module.brt_models = brt.hookimpl(lambda: [model])  # type: ignore[attr-defined]
    module.brt_kernels = brt.hookimpl(lambda: [kernel])  # type: ignore[attr-defined]
    with plugins.using(module):
        yield tmp_path / "tuning.sqlite3"
    ops.forget()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["brt", "tune", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def dispatch_call() -> tuple[Any, ...]:
    x, cell_R = torch.randn(4, 6), torch.arange(4)
    return x, cell_R, cell_R[:, None], None


def test_tune_list_clear(run: Run, zoo: Path) -> None:
    code, out, _ = run("acme-mixture", "--batches", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["objective"] == "latency"
    chosen = {row["operator"]: row for row in found["kernels"]}["dispatch"]
    assert chosen["kernel"] == "reference"
    assert set(chosen["microseconds"]) == {"acme-slow", "reference"}
    code, out, _ = run("--list", "--json")
    kinds = [choice["kind"] for choice in json.loads(out)]
    assert "kernel" in kinds
    code, out, _ = run("--list")
    assert "brt::dispatch(" in out
    code, out, _ = run("--clear")
    assert f"forgot {len(kinds)} choices in {zoo}" in out
    assert json.loads(run("--list", "--json")[1]) == []
    assert run("acme-mixture", "--objective", "occupancy")[0] == 0
    assert "by occupancy" in run("--list")[1]


def test_wrong_use(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in ((), ("acme-mixture", "--list"), ("--list", "--clear")):
        code, _, error = run(*args)
        assert (code, "give one of" in error) == (2, True)
    code, _, error = run("acme-mixture", "--objective", "speed")
    assert (code, "there are latency, occupancy" in error) == (2, True)
    monkeypatch.setenv("BRT_TUNING", "off")
    code, _, error = run("--list")
    assert (code, "BRT_TUNING=off" in error) == (2, True)


def test_another_process_prefers_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixture().eval()
    tune(model, brt.profile(model, [PATHS]), PATHS)
    call = dispatch_call()
    assert ops.explain("dispatch", *call).reason == "measured fastest"
    ops.forget()  # as another process begins
    assert ops.explain("dispatch", *call).chosen == "acme-slow"
    brt.optimize(model, brt.profile(model, [PATHS]), sample=PATHS)
    assert ops.explain("dispatch", *call).chosen == "reference"
    ops.forget()
    monkeypatch.setattr(tuning, "versions", lambda: ("another torch",))
    assert measured.load(tuning.store()) == 0


def test_signatures_come_back_from_the_store() -> None:
    signature = registry.signature((torch.zeros(5, 3), [torch.zeros(2)], None, "gelu", 1.5, (1, 2)))
    again = measured._decoded(json.loads(json.dumps(measured._encoded(signature))))
    assert again == signature
    assert signature[0] == (torch.float32, "cpu", (8, 3))


def test_nothing_is_watched_afterwards() -> None:
    with measured.watching() as calls:
        brt.ops.dispatch(*dispatch_call())
    assert [key[0] for key in calls] == ["dispatch"]
    assert not registry.WATCHERS
