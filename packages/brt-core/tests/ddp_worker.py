"""One of the processes of test_training's data parallel test: rank, world size, store, results."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import brt


class Model(nn.Module):
    """Four experts; a loop and an exit behind them, so that every router takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.gather = brt.GatherRouter()
        self.exit = brt.EarlyExit(
            [nn.Linear(4, 4), nn.Linear(4, 4)],
            [nn.Linear(4, 3), nn.Linear(4, 3)],
            brt.protocols.BinaryThreshold(0.4),
        )

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        return self.exit(self.gather(rows, route))


def batch(rank: int, step: int) -> Tensor:
    """What a rank sees: with rank 0 and 1 on opposite sides, their experts differ."""
    made = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(6, 4, generator=made) + (3 if rank else -3)


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = []
    for step in range(3):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    torch.save((grads, model.module.state_dict()), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
