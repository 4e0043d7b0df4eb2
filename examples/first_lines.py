"""The README's first lines as a program: a sparse layer, profiled and optimised."""

import torch
from torch import nn

import brt


class SparseMLP(nn.Module):
    """Experts, of which every token uses the best ``top_k``."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(top_k), num_paths=num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(num_experts)
        )
        self.gather = brt.GatherRouter()

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))  # a token is a cell
        paths, route = self.scatter(cells_ND, self.gate(cells_ND).softmax(-1))
        out_ND = self.gather([e(path) for e, path in zip(self.experts, paths, strict=True)], route)
        return grid.restore(out_ND)


def main() -> None:
    torch.manual_seed(0)
    model = SparseMLP(256, num_experts=16, top_k=2).eval()
    batches = [torch.randn(2, 32, 256) for _ in range(4)]
    profile = brt.profile(model, batches)  # who goes where; frozen, saveable, plottable
    fast = brt.optimize(model, profile, sample=batches[0])
    print(fast.report)  # what each pass did; .to_html() draws it
    x_BSD = torch.randn(2, 32, 256)
    torch.testing.assert_close(fast(x_BSD), model(x_BSD))


if __name__ == "__main__":
    main()
