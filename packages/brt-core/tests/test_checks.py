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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_is_found_among_infinities(dtype: torch.dtype) -> None:
    values = torch.tensor([[torch.inf, 0.0], [-torch.inf, 1.0]], dtype=dtype, requires_grad=True)
    checks.check_not_nan(values, "scores hold NaN")
    checks.check_not_nan(values[:0], "scores hold NaN")
    with pytest.raises(ProtocolError, match=r"^scores hold NaN: here$"):
        checks.check_not_nan(
            values / values, "scores hold NaN", detail=lambda: "here", error=ProtocolError
        )


def test_off_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MODE", "off")
    assert not checks.wanted(FALSE)
    checks.check_values(FALSE, "scores hold NaN")
    checks.check_not_nan(torch.tensor(torch.nan), "scores hold NaN")


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cuda_finds_nan_too(dtype: torch.dtype) -> None:
    values = torch.tensor([torch.inf, -torch.inf], dtype=dtype, device="cuda")
    checks.check_not_nan(values, "scores hold NaN")
    checks.check()
    checks.check_not_nan(values / values, "scores hold NaN", error=ProtocolError)
    checks.check_not_nan(values, "scores hold NaN", error=ProtocolError)
    with pytest.raises(ProtocolError, match="scores hold NaN"):
        checks.check("cuda:0")
    checks.check()


@pytest.mark.cuda
def test_a_captured_check_fires_on_replay() -> None:
    x = torch.ones(4, device="cuda")
    checks.check_values((x > 0).all(), "made before the capture")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        checks.check_values((x > 0).all(), "x must be positive")
    graph.replay()
    checks.check()
    for sign in (-1, 1):
        x.fill_(sign)
        graph.replay()
    with pytest.raises(BrtError, match=r"^x must be positive \(on cuda:0\)$"):
        checks.check()
    graph.replay()
    checks.check()


@pytest.mark.cuda
def test_the_first_check_of_a_device_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_flags_of", {})
    ok = TRUE.cuda()
    with (
        pytest.raises(BrtError, match="run the region once before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        checks.check_values(ok, "scores hold NaN")


@pytest.mark.cuda
def test_more_checks_than_flags_still_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_flags_of", {})
    monkeypatch.setattr(checks, "_NUM_FLAGS", 4)
    for i in range(6):
        checks.check_values((FALSE if i == 5 else TRUE).cuda(), f"message {i}")
    with pytest.raises(BrtError, match=r"^message 3 .*; message 4 .*; message 5 \(on cuda:0\)$"):
        checks.check()


@pytest.mark.cuda
def test_each_stream_has_flags_of_its_own() -> None:
    bad, good = FALSE.cuda(), TRUE.cuda()
    torch.cuda.synchronize()
    for ok in (bad, good):
        with torch.cuda.stream(torch.cuda.Stream()):
            checks.check_values(ok, "scores hold NaN")
    with pytest.raises(BrtError, match=r"^scores hold NaN \(on cuda:0\)$"):
        checks.check()
