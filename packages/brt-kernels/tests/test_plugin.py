from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import arguments

import brt
import brt_kernels._plugin as plugin
from brt import plugins
from brt_kernels._packed import PackedWeights


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    with plugins.using(plugin):
        yield


@pytest.mark.parametrize("op", sorted(arguments(torch.device("cpu"))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_brt_runs_these_kernels(op: str, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments(device, dtype)[op]
    chosen = brt.ops.explain(op, *args).chosen
    # Of halves on CUDA torch and Triton have products too; which is the faster depends on sizes
    others = ("torch-grouped-mm", "brt-triton") if device.type == "cuda" else ()
    assert chosen in ("brt-kernels", *(others if dtype == torch.bfloat16 else ()))
    call = getattr(torch.ops.brt, op)
    got = call(*args)
    with brt.ops.use("reference"):
        expected = call(*args)
    loose = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}  # sums of rounded sums
    for a, b in zip(
        got if isinstance(got, tuple) else (got,),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize(
    "op", ["dispatch", "combine", "row_dot", "grouped_linear", "grouped_outer", "expert_mlp"]
)
def test_float64_is_left_to_others(op: str) -> None:
    weighted = arguments(torch.device("cpu"), torch.float64)[op]
    explained = brt.ops.explain(op, *weighted)
    assert explained.chosen != "brt-kernels"
    assert "float64" in str(explained)


def test_gradients_equal_the_reference(device: torch.device) -> None:
    def grads() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, up, down = (
            torch.randn(s, device=device, requires_grad=True)
            for s in ((30, 8), (4, 12, 8), (4, 8, 12))
        )
        scores = torch.randn(30, 4, device=device, requires_grad=True)
        weight_NK, choice = scores.softmax(-1).topk(2)
        cell_R, slot_R, row_NK, offsets = brt.ops.route(choice, 4)
        weight_R = weight_NK.flatten()[slot_R.clamp(min=0)]
        out = brt.ops.expert_mlp(x, cell_R, row_NK, offsets, weight_R, up, None, down, None, "gelu")
        out.square().sum().backward()
        return [t.grad for t in (x, up, down, scores)]

    ours = grads()
    with brt.ops.use("reference"):
        expected = grads()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums in another order


def test_packed_weights_are_kept_until_a_source_changes() -> None:
    cache, made = PackedWeights(max_entries=2), []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.zeros(1)

    sources = [torch.ones(3), torch.ones(2)]
    for _ in range(3):
        cache.get(sources, "a", make)
    assert len(made) == 1
    sources[0].add_(1)
    cache.get(sources, "a", make)
    assert len(made) == 2
    cache.get(sources, "b", make)
    sources[1] = torch.ones(2)
    cache.get(sources, "a", make)
    assert len(made) == 4
    assert len(cache._entries) == 1  # the others went with the source that was freed
    with torch.inference_mode():
        inference = [torch.ones(3)]
        cache.get(inference, "a", make)
        cache.get(inference, "a", make)
    assert len(made) == 6
    cache.get(sources, "b", make)
    cache.get(sources, "c", make)
    assert len(cache._entries) == 2


def test_every_spec_is_for_an_operator_of_the_library() -> None:
    for spec in plugin.brt_kernels():
        assert spec.name in (plugin.NAME, plugin.TRITON_NAME)
        assert hasattr(torch.ops.brt_kernels, spec.op)
