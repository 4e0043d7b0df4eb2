"""How a call finds its kernel, and says why."""

from __future__ import annotations

import threading
import timeit
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from core_cases import SMALL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import brt
from brt import KernelSpec, hookimpl, ops, plugins, reference


class Kernels:
    """A plugin with two kernels of dispatch, which leave a mark."""

    def __init__(self, fast: float = 1.0, slow: float = 1e9) -> None:
        self.estimates = {"acme-fast": fast, "acme-slow": slow}
        self.ran: list[str] = []

    @hookimpl
    def brt_kernels(self) -> Iterator[KernelSpec]:
        for name, estimate in self.estimates.items():

            def forward(*args: Tensor | None, name: str = name) -> Tensor:
                self.ran.append(name)
                return reference.dispatch(*args)

            def refuses(x: Tensor, *rest: object, name: str = name) -> str | None:
                return "only floats" if name == "acme-fast" and not x.is_floating_point() else None

            yield KernelSpec(
                op="dispatch",
                device="cpu",
                name=name,
                forward=forward,
                estimate=lambda *args, us=estimate: us,
                refuses=refuses,
            )


@pytest.fixture
def call() -> tuple:
    cell_R, _, row_NK, _ = SMALL.route()
    return torch.randn(7, 4), cell_R, row_NK


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with plugins.using(made := Kernels()):
        yield made
    ops.forget()


def test_lowest_estimate_of_those_that_accept(kernels: Kernels, call: tuple) -> None:
    x, cell_R, row_NK = call
    ops.dispatch(x, cell_R, row_NK)
    assert kernels.ran == ["acme-fast"]
    ops.dispatch(x.long(), cell_R, row_NK)  # acme-fast refuses; the reference is the fastest left
    assert kernels.ran == ["acme-fast"]


def test_equal_estimates_go_by_name(call: tuple) -> None:
    with plugins.using(made := Kernels(fast=1.0, slow=1.0)):
        ops.dispatch(*call)
        assert made.ran == ["acme-fast"]


def test_named_kernel(kernels: Kernels, call: tuple) -> None:
    with ops.use("acme-slow"):
        ops.dispatch(*call)
        with ops.use("reference"):
            ops.dispatch(*call)
        ops.dispatch(*call)
        ops.compact(torch.tensor([True]))  # it has no kernel of that name, and chooses as always
    ops.dispatch(*call)
    assert kernels.ran == ["acme-slow", "acme-slow", "acme-fast"]


def test_named_kernel_holds_in_threads(kernels: Kernels, call: tuple) -> None:
    """The backward of CUDA work runs on a thread of autograd's."""
    with ops.use("acme-slow"):
        thread = threading.Thread(target=ops.dispatch, args=call)
        thread.start()
        thread.join()
    assert kernels.ran == ["acme-slow"]


def test_name_is_dropped_after_an_error(kernels: Kernels, call: tuple) -> None:
    with pytest.raises(RuntimeError, match=r"mine"), ops.use("acme-slow"):
        raise RuntimeError("mine")
    ops.dispatch(*call)
    assert kernels.ran == ["acme-fast"]


def test_named_kernel_that_refuses_is_an_error(kernels: Kernels, call: tuple) -> None:
    x, cell_R, row_NK = call
    with (
        ops.use("acme-fast"),
        pytest.raises(brt.KernelError, match=r"'acme-fast' was named and refuses.*only floats"),
    ):
        ops.dispatch(x.long(), cell_R, row_NK)


def test_unknown_name_is_an_error(kernels: Kernels, call: tuple) -> None:
    with (
        ops.use("acme-fats"),
        pytest.raises(brt.KernelError, match=r"no kernel named 'acme-fats'.*acme-fast.*reference"),
    ):
        ops.dispatch(*call)


def test_measured_choice(kernels: Kernels, call: tuple) -> None:
    x, cell_R, row_NK = call
    ops.remember("dispatch", (x, cell_R, row_NK, None), "acme-slow")
    ops.dispatch(*call)
    ops.dispatch(torch.cat([x, x], 1), cell_R, row_NK)  # of other shapes nothing is known
    assert kernels.ran == ["acme-slow", "acme-fast"]
    assert ops.explain("dispatch", *call).reason == "measured fastest"
    ops.forget()
    ops.dispatch(*call)
    assert kernels.ran[2:] == ["acme-fast"]


def test_measured_choice_that_refuses_is_passed_over(kernels: Kernels, call: tuple) -> None:
    x, cell_R, row_NK = call
    ops.remember("dispatch", (x.long(), cell_R, row_NK, None), "acme-fast")
    ops.dispatch(x.long(), cell_R, row_NK)
    assert kernels.ran == []


def test_explain_lists_every_candidate(kernels: Kernels, call: tuple) -> None:
    x, cell_R, row_NK = call
    found = ops.explain("dispatch", x.long(), cell_R, row_NK)
    assert [c.name for c in found.candidates] == ["acme-fast", "acme-slow", "reference"]
    assert found.chosen == "reference"
    text = str(found)
    assert "brt::dispatch(int64[7, 4] cpu, int64[14] cpu, int64[7, 2] cpu, None)" in text
    assert "refused: only floats" in text
    assert "about 1000000000 us" in text
    assert "Kernels" in text  # who offers it


# Their arguments are lists, without defaults to fill in
OF_LISTS = {"conv_chain", "conv_chain_backward", "grouped_conv2d"}


@pytest.mark.parametrize("op", sorted(set(ops.OPERATORS) - OF_LISTS))
def test_explain_fills_in_defaults(op: str) -> None:
    x = torch.randn(3, 2)
    index = torch.arange(3)
    offsets = torch.tensor([0, 3])
    mask = torch.ones(3, 1, dtype=torch.bool)
    args = {
        "route": (index[:, None], 3),
        "route_mask": (mask,),
        "dispatch": (x, index, index[:, None]),
        "combine": (x, index[:, None], index),
        "row_dot": (x, x, index, index[:, None]),
        "path_sizes": (offsets,),
        "compact": (mask[:, 0],),
        "grouped_linear": (x, offsets, torch.randn(1, 4, 2)),
        "grouped_outer": (x, x, offsets),
        "expert_mlp": (
            *(x, index, index[:, None], offsets, None, torch.randn(1, 4, 2), None),
            *(torch.randn(1, 2, 4), None, "relu"),
        ),
    }
    assert ops.explain(op, *args[op]).chosen == "reference"


def test_explain_of_an_unknown_operator() -> None:
    with pytest.raises(brt.KernelError, match=r"no operator brt::dispach; there are: .*dispatch"):
        ops.explain("dispach", torch.zeros(1))


def test_every_kernel_refuses() -> None:
    class Nothing:
        @hookimpl
        def brt_kernels(self) -> Iterator[KernelSpec]:
            yield KernelSpec(
                op="compact",
                device="meta",
                name="acme-never",
                forward=lambda *args: None,
                estimate=lambda *args: 0.0,
                refuses=lambda *args: "never does",
            )

    with plugins.using(Nothing()):
        found = ops.OPERATORS["compact"].explain(torch.zeros(1, dtype=torch.bool, device="meta"))
        assert [c.refusal for c in found.candidates if c.name == "acme-never"] == ["never does"]
        assert found.chosen == "reference"


def test_graphs_do_not_hold_the_kernel(kernels: Kernels, call: tuple) -> None:
    """An export made with kernels at hand runs without them, and the other way round."""

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
            return ops.dispatch(x, cell_R, row_NK)

    exported = torch.export.export(Module(), call)
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert "brt.dispatch.default" in targets
    exported.module()(*call)
    assert kernels.ran == ["acme-fast"]
    with plugins.using():
        exported.module()(*call)
    assert kernels.ran == ["acme-fast"]


def test_reference_is_offered_for_every_operator() -> None:
    names = {spec.op for spec in ops.REFERENCE_KERNELS}
    assert names == set(ops.OPERATORS)
    for device in ("cpu", "cuda"):
        for operator in ops.OPERATORS.values():
            assert "reference" in {spec.name for spec, _ in operator.kernels(device)}


def test_the_choice_costs_at_most_10_us(call: tuple) -> None:
    """With two kernels beside the reference, also where choices were measured; best of many."""
    operator = ops.OPERATORS["dispatch"]
    args = (*call, None)
    with plugins.using(Kernels()):

        def cost() -> float:
            return min(timeit.repeat(lambda: operator.choose(args), number=200, repeat=50)) / 200

        assert cost() <= 10e-6
        ops.remember("dispatch", (torch.zeros(9, 9), *args[1:]), "acme-slow")
        assert cost() <= 10e-6
        ops.remember("dispatch", args, "acme-slow")
        assert cost() <= 10e-6
        ops.forget()


class Seen(TorchDispatchMode):
    """Notes the operators that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_calls_go_straight_to_their_kernel(call: tuple) -> None:
    """Nobody watches, so nobody must be told: the overload is not called."""
    operator = ops.OPERATORS["dispatch"]
    overload, operator.overload = operator.overload, None
    try:
        straight = ops.dispatch(*call)
    finally:
        operator.overload = overload
    torch.testing.assert_close(straight, torch.ops.brt.dispatch(*call, None))


def test_who_watches_sees_the_operator(call: tuple) -> None:
    with Seen() as seen:
        ops.dispatch(*call)
    assert "brt.dispatch.default" in seen.names
    with torch.profiler.profile() as profiled:
        ops.dispatch(*call)
    assert "brt::dispatch" in {event.key for event in profiled.key_averages()}
    x_ND = call[0].clone().requires_grad_()
    ops.dispatch(x_ND, *call[1:]).sum().backward()
    assert x_ND.grad is not None
    with FakeTensorMode() as mode:
        assert isinstance(ops.dispatch(*map(mode.from_tensor, call)), FakeTensor)
