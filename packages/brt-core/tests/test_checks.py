"""Value checks: at the call on the CPU, deferred on CUDA, absent from graphs."""

from __future__ import annotations

import runpy

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from brt import checks
from brt.errors import BrtError, ProtocolError

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def test_a_check_that_holds_says_nothing() -> None:
    checks.check_values(TRUE, "scores hold NaN", detail=lambda: pytest.fail("not wanted"))


def test_a_check_that_fails_raises_at_the_call_on_the_cpu() -> None:
    with pytest.raises(ProtocolError, match=r"^scores hold NaN: 3 of 8$"):
        checks.check_values(FALSE, "scores hold NaN", detail=lambda: "3 of 8", error=ProtocolError)
    with pytest.raises(BrtError, match=r"^scores hold NaN$"):
        checks.check_values(FALSE, "scores hold NaN")


def test_off_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MODE", "off")
    assert not checks.wanted(FALSE)
    checks.check_values(FALSE, "scores hold NaN")


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRT_CHECK", "sometimes")
    with pytest.raises(BrtError, match="BRT_CHECK must be sync, off or unset, got 'sometimes'"):
        runpy.run_path(checks.__file__)


def test_values_that_do_not_exist_are_not_checked() -> None:
    assert checks.wanted(torch.nn.Parameter(torch.rand(2)))
    assert not checks.wanted(torch.empty(2, device="meta"))
    with FakeTensorMode():
        fake = torch.empty((), dtype=torch.bool)
        assert not checks.wanted(fake)
        checks.check_values(fake, "never")


def test_a_graph_holds_no_checks() -> None:
    def checked(x: Tensor) -> Tensor:
        checks.check_values((x > 0).all(), "x must be positive")
        return x + 1

    compiled = torch.compile(checked, fullgraph=True, backend="eager")
    assert torch.equal(compiled(-torch.ones(2)), torch.zeros(2))


def test_check_is_quiet_where_nothing_was_flagged() -> None:
    checks.check()
    checks.check("cuda")
    checks.check(0)


@pytest.mark.cuda
def test_cuda_raises_at_the_next_check() -> None:
    bad = FALSE.cuda()
    checks.check_values(bad, "scores hold NaN", error=ProtocolError)
    checks.check_values(bad, "a second one")
    checks.check_values(TRUE.cuda(), "a third one")
    with pytest.raises(ProtocolError, match=r"^scores hold NaN \(on cuda:0\); a second one \(on"):
        checks.check("cuda")
    checks.check()


@pytest.mark.cuda
def test_cuda_raises_at_the_call_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MODE", "sync")
    with pytest.raises(BrtError, match="scores hold NaN: here"):
        checks.check_values(FALSE.cuda(), "scores hold NaN", detail=lambda: "here")


@pytest.mark.cuda
@pytest.mark.parametrize("warm", [False, True], ids=["flags-made-in-capture", "flags-made-before"])
def test_a_captured_check_fires_on_replay(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_flags_of", {})
    x = torch.ones(4, device="cuda")
    if warm:
        checks.check_values((x > 0).all(), "x must be positive")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        checks.check_values((x > 0).all(), "x must be positive")
    graph.replay()
    checks.check()
    x.neg_()
    graph.replay()
    x.neg_()
    graph.replay()
    with pytest.raises(BrtError, match="x must be positive"):
        checks.check()
    graph.replay()
    checks.check()


@pytest.mark.cuda
def test_more_messages_than_flags_still_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_slot_of", {})
    bad = FALSE.cuda()
    for i in range(300):
        checks.check_values(TRUE.cuda() if i < 299 else bad, f"message {i}")
    with pytest.raises(BrtError, match=r"message 299 \(on"):
        checks.check()
