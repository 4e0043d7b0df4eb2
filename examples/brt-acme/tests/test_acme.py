"""What a plugin author tests: the contract checks of `brt.testing`, and the package's own rules."""

import pytest
import torch
from brt_acme.drop_identities import DropIdentities
from brt_acme.shared_scatter import SharedScatter
from brt_acme.top_p import TopP
from torch import nn

import brt
import brt.testing


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Dropout()) for _ in range(2)
        )
        self.gather = brt.GatherRouter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        paths, route = self.scatter(x, self.gate(x))
        return self.gather([e(p) for e, p in zip(self.experts, paths, strict=True)], route)


def test_contracts() -> None:
    brt.testing.check_protocol(TopP(0.6))
    router = SharedScatter(TopP(0.6), 4)
    brt.testing.check_router(router, lambda n: (torch.randn(n, 8), torch.randn(n, 3)))
    brt.testing.check_pass(DropIdentities(), Sparse().eval(), (torch.randn(16, 8),))


@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
def test_takes_the_fewest_paths_that_reach_p(p: float) -> None:
    scores_NP = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    decision = TopP(p)(scores_NP, 5)
    for scores, mask in zip(scores_NP, decision.mask_NP, strict=True):
        ranked = scores.softmax(-1).sort(descending=True).values
        wanted = 1 + int((ranked.cumsum(0)[:-1] < p - 1e-6).sum())
        assert int(mask.sum()) == wanted


def test_p_is_checked() -> None:
    with pytest.raises(brt.ProtocolError, match="acme-top-p"):
        TopP(0.0)
