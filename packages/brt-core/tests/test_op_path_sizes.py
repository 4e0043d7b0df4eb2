"""`brt.ops.path_sizes`: loads on the host, and as sizes in a graph."""

from __future__ import annotations

import pytest
import torch
from core_cases import NUM_PATHS, RouteCase
from torch import Tensor

from brt import ops


@pytest.mark.parametrize("num_paths", NUM_PATHS)
def test_sizes(num_paths: int, device: torch.device) -> None:
    for how in ("random", "one-path", "none", "few-paths"):
        for num_cells in (0, 1, 1025):
            case = RouteCase(num_cells, num_paths, 1, how)
            wanted = [0] * num_paths
            for path in case.choices().flatten().tolist():
                if path >= 0:
                    wanted[path] += 1
            offsets = case.route(device)[3]
            assert ops.path_sizes(offsets) == tuple(wanted), str(case)
            carriers = torch.ops.brt.path_sizes(offsets)
            assert [tuple(c.shape) for c in carriers] == [(size, 0) for size in wanted], str(case)


def test_opcheck(device: torch.device) -> None:
    for offsets in ([0, 3, 3, 7], [0, 0], [0]):
        torch.library.opcheck(torch.ops.brt.path_sizes, (torch.tensor(offsets, device=device),))


@pytest.mark.parametrize("num_paths", [1, 16])
def test_compiles_with_one_graph(num_paths: int, device: torch.device) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def run(x: Tensor, offsets: Tensor) -> list[Tensor]:
        sizes = ops.path_sizes(offsets)
        for size in sizes:
            torch._check(size >= 0)
        torch._check(sum(sizes) <= x.shape[0])
        return [part * p for p, part in enumerate(x.narrow(0, 0, sum(sizes)).split(list(sizes)))]

    x = torch.arange(20.0, device=device)
    for how in ("random", "one-path", "none", "few-paths"):
        offsets = RouteCase(20, num_paths, 1, how).route(device)[3]
        parts = x[: int(offsets[-1])].tensor_split(offsets[1:-1].cpu())
        for p, part in enumerate(run(x, offsets)):
            assert torch.equal(part, parts[p] * p), how
    assert len(graphs) == 1
