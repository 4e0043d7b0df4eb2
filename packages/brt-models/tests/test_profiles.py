"""Profiles of the trained models: real loads, uneven, with every path taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import brt
from brt.errors import BrtError
from brt_models import photos, profiles


def test_digits_leave_at_every_exit() -> None:
    profile = profiles.of("digits")
    assert list(profile.routers) == ["exits.0#0", "exits.1#0", "exits.2#0"]
    first, second, third = profile.routers.values()
    assert first.cells == 300
    # Path 0 leaves; what stays is what the next exit decides about
    for router, after in ((first, second), (second, third)):
        left, stayed = router.rows_FP.sum(0).tolist()
        assert left > 0
        assert stayed == after.cells
    assert third.rows_FP.sum(0).min() > 0


def test_bytes_take_every_expert_and_not_evenly(tmp_path: Path) -> None:
    profile = profiles.of("text")
    assert list(profile.routers) == ["blocks.1.mlp.scatter#0", "blocks.3.mlp.scatter#0"]
    for router in profile.routers.values():
        assert router.cells == 64 * profiles.WINDOW
        share_P = router.rows_FP.sum(0) / router.cells
        assert share_P.sum() == 1
        assert 0.01 < share_P.min() < 1 / 8 < share_P.max() < 0.6
    profile.save(tmp_path / "text.json")
    again = brt.Profile.load(tmp_path / "text.json")
    assert torch.equal(
        again.routers["blocks.1.mlp.scatter#0"].rows_FP,
        profile.routers["blocks.1.mlp.scatter#0"].rows_FP,
    )


def test_patches_of_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    load, split = photos.load, photos.split
    monkeypatch.setattr(photos, "load", lambda photo: load(photo)[:, :96, :96])
    monkeypatch.setattr(photos, "split", lambda which: split(which)[:1])
    profile = profiles.of("patch-sr")
    (router,) = profile.routers.values()
    assert profile.num_forwards == 2
    assert router.rows_FP.sum() == router.cells > 0


def test_unknown_name() -> None:
    with pytest.raises(BrtError, match="there are patch-sr, digits, text; got 'msdnet'"):
        profiles.of("msdnet")
