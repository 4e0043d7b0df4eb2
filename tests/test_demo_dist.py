"""`brt demo dist`: a model of brt-models on the ranks of brt-dist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]  # five interpreters start


def test_demo(tmp_path: Path) -> None:
    env = {**os.environ, "BRT_PLUGINS": "models,dist"}
    command = [sys.executable, "-m", "brt", "demo", "dist", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "dist.json").read_text())
    blocks, nearer = figures["rows"]
    assert figures["ranks"] == 4
    assert 0 < nearer["moved"] < blocks["moved"]
    assert max(blocks["error"], nearer["error"]) < 1e-4
    assert f"{blocks['moved']} (" in done.stdout
