"""The demo without its model says what to install; with it, see the root's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import brt
import brt_dist._plugin
from brt import plugins
from brt_dist import demo, nearest

pytestmark = pytest.mark.dist


def test_demo_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --standalone"):
        demo.main()


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    with plugins.using(brt_dist._plugin):
        with pytest.raises(SystemExit, match="pip install packages/brt-core packages/brt-models"):
            demo.main()
        spec: brt.DemoSpec = plugins.get("demos", "dist")
        with pytest.raises(brt.BrtError, match="which brt-models brings"):
            spec.run(None, tmp_path, compiled=False, console=Console())


def test_nearer_puts_experts_where_their_rows_are() -> None:
    counts_WP = np.array([[9, 0, 9, 0, 3], [0, 9, 0, 9, 2]])
    placement = nearest(counts_WP)
    assert placement == [0, 1, 0, 1, 0]
    assert demo.moving_rows(counts_WP, tuple(placement)) == 2
