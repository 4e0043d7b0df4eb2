"""The workload of a model larger than its memory; and such a model where more memory is denied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from brt.errors import BrtError
from brt_models.workloads.preload import Chain, chain

CPU = torch.device("cpu")
GROUPS = Path("/sys/fs/cgroup/memory")

# Weights of 256 MiB that never are in memory at once, with 64 MiB and a tenth for them and all else
LIMITED = """
import os, sys
import torch
import brt
from brt.passes import PreloadWeights
from brt_models.workloads.preload import Chain

file, group, mode = sys.argv[1:]
torch.set_num_threads(1)
with torch.device("meta"):
    model = Chain(8, 4, 512, 2048).eval()
small = Chain(8, 4, 8, 8).eval()
path_BNL = [(torch.arange(8) + b).remainder(4)[None] for b in range(12)]
profile = brt.profile(small, [(torch.zeros(1, 1, 8), path_NL) for path_NL in path_BNL])
x = torch.ones(1, 8, 512)
with open(group + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
brt.memory.pin(model, file)
fast = brt.optimize(model, profile, passes=[PreloadWeights(64 << 20, mode)])
with torch.no_grad():
    sums = [float(fast(x, path_NL).double().abs().sum()) for path_NL in path_BNL]
print(*sums)
"""


def test_variants_agree() -> None:
    made = chain(CPU, torch.float32, layers=3, dim=16, hidden=64, tokens=3, batch=2, oversize=2.0)
    wanted = made.reference(*made.sets[0])  # type: ignore[misc]
    with torch.inference_mode():
        for variant in made.variants:
            found = variant.make()(*made.sets[0])
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
            if variant.kind == "brt":
                assert "loads a first call" in variant.detail()  # type: ignore[operator]
    with pytest.raises(BrtError, match="predictable from 0 to 1"):
        chain(CPU, torch.float32, predictable=2.0)


@pytest.mark.slow
@pytest.mark.skipif(not os.access(GROUPS / "cgroup.procs", os.W_OK), reason="no memory cgroups")
@pytest.mark.parametrize("mode", ["on-demand", "predicted"])
def test_runs_where_no_more_memory_is_given(tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    model = Chain(8, 4, 512, 2048).eval()
    save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    group = GROUPS / f"brt-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str((64 << 20) * 11 // 10))
        command = [sys.executable, "-c", LIMITED, tmp_path / "weights.safetensors", group, mode]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 0, found.stderr
        used = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    assert (48 << 20) < used < (64 << 20) * 11 // 10
    x = torch.ones(1, 8, 512)
    with torch.no_grad():
        wanted = [
            float(model(x, (torch.arange(8) + b).remainder(4)[None]).double().abs().sum())
            for b in range(12)
        ]
    assert [float(word) for word in found.stdout.split()] == pytest.approx(wanted, rel=1e-5)
