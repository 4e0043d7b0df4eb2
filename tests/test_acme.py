"""The example plugin package: installed by pip into a folder of its own, and used from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ACME = ROOT / "examples" / "brt-acme"

API = """
import torch, brt, brt.testing
from torch import nn

protocol = brt.plugins.get("protocols", "acme-top-p").factory(p=0.6)
scatter = brt.plugins.get("routers", "acme-shared-scatter").factory(protocol, 4)
drop = brt.plugins.get("passes", "acme-drop-identities").factory()
brt.testing.check_protocol(protocol)
brt.testing.check_router(scatter, lambda n: (torch.randn(n, 8), torch.randn(n, 3)))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.scatter = scatter
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Dropout(0.5)) for _ in range(4)
        )
        self.gather = brt.GatherRouter()
    def forward(self, x):
        paths, route = self.scatter(x, self.gate(x))
        return self.gather([e(p) for e, p in zip(self.experts, paths)], route)

torch.manual_seed(0)
model, x = Model().eval(), torch.randn(16, 8)
brt.testing.check_pass(drop, model, (x,))
fast = brt.optimize(model, brt.profile(model, [x]), passes=["acme-drop-identities"], sample=x)
torch.testing.assert_close(fast(x), model(x))
assert "acme-drop-identities" in str(fast.report)
paths, route = scatter(x, model.gate(x))
assert route.sizes[-1] == 16  # the shared expert takes every cell
print("used")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(site), str(ACME)]
    subprocess.run(command, check=True, timeout=120)
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "BRT_PLUGINS": "acme",
    }


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_command_line_lists_what_it_offers(environment: dict[str, str]) -> None:
    plugins = json.loads(run(environment, "-m", "brt", "plugins", "--json"))
    assert any("brt-acme 0.1.0" in str(plugin) for plugin in plugins)
    assert "acme-drop-identities" in run(environment, "-m", "brt", "passes", "--json")
    assert "acme-top-p" in run(environment, "-m", "brt", "protocols", "--json")


def test_api_uses_what_it_offers(environment: dict[str, str]) -> None:
    assert run(environment, "-c", API).splitlines()[-1] == "used"


def test_not_named_is_not_loaded(environment: dict[str, str]) -> None:
    without = {**environment, "BRT_PLUGINS": ""}
    assert "acme-top-p" not in run(without, "-m", "brt", "protocols", "--json")
