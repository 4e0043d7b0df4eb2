"""The tuning store: what it keeps, several processes at a time, and files that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import sys
from pathlib import Path

import pytest

from brt import tuning
from brt.errors import BrtError, PluginWarning
from brt.tuning import Choice, Store

ONE = Choice("region", "cpu (x86_64, 1 threads)", "Layer: fuse-horizontal", {"kept": ["a"]})


def write(path: Path, name: str) -> None:
    store = Store(path)
    for i in range(20):
        store.put(f"{name}-{i}", Choice("decision", "cpu", "shared", i))
        store.put("shared", Choice("decision", "cpu", "shared", i))
        assert store.get("shared") is not None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "folder" / "tuning.sqlite3")


def test_tests_have_no_store() -> None:
    assert tuning.store() is None
    with pytest.raises(BrtError, match="BRT_TUNING=off"):
        tuning.require_store()


def test_put_get_list_clear(store: Store) -> None:
    assert store.get("key") is None
    assert store.clear() == 0
    assert not store.path.exists()  # nobody wrote
    store.put("key", ONE)
    found = Store(store.path).get("key")
    assert found is not None
    assert (found.kind, found.device, found.what, found.value) == (
        *(ONE.kind, ONE.device, ONE.what),
        ONE.value,
    )
    assert found.made > 0
    store.put("key", Choice("kernel", "cpu", "later", 1))
    store.put("other", ONE)
    assert [choice.what for choice in store.choices()] == ["later", ONE.what]
    assert [choice.what for choice in store.choices("kernel")] == ["later"]
    assert store.clear() == 2
    assert store.choices() == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_several_processes_write_at_a_time(store: Store) -> None:
    context = multiprocessing.get_context("fork")  # another start imports torch each time
    writers = [context.Process(target=write, args=(store.path, str(i))) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 3
    assert len(store.choices()) == 3 * 20 + 1


def test_a_damaged_file_is_set_aside(store: Store) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(b"not a database" * 100)
    with pytest.warns(PluginWarning, match="cannot be used.*not a database"):
        assert store.get("key") is None
    (aside,) = store.path.parent.glob("*.aside-*")
    assert aside.read_bytes().startswith(b"not a database")
    store.put("key", ONE)
    assert store.get("key") is not None


def test_damage_inside_is_set_aside(store: Store) -> None:
    for i in range(60):
        store.put(str(i), ONE)
    whole = bytearray(store.path.read_bytes())
    whole[4096:] = os.urandom(len(whole) - 4096)  # the header of the file is right
    store.path.write_bytes(bytes(whole))
    with pytest.warns(PluginWarning, match="cannot be used"):
        assert store.choices() == []
    assert store.choices() == []


def test_a_file_of_another_version_is_set_aside(store: Store) -> None:
    store.put("key", ONE)
    with sqlite3.connect(store.path) as file:
        file.execute("PRAGMA user_version = 99")
    file.close()
    with pytest.warns(PluginWarning, match="it has schema 99, and this brt reads 1"):
        assert store.get("key") is None
    assert len(list(store.path.parent.glob("*.aside-*"))) == 1


def test_a_place_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "tuning.sqlite3")
    with pytest.warns(PluginWarning, match="is not remembered. BRT_TUNING=off goes without it"):
        store.put("key", ONE)
    store.put("key", ONE)  # no second one


def test_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRT_TUNING", str(tmp_path / "mine"))
    assert tuning.location() == tmp_path / "mine"
    monkeypatch.setenv("BRT_TUNING", "OFF")
    assert tuning.location() is None
    monkeypatch.delenv("BRT_TUNING")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.location() == tmp_path / "brt" / "tuning.sqlite3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.location() == Path.home() / ".cache" / "brt" / "tuning.sqlite3"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuning.location() == Path.home() / "Library" / "Caches" / "brt" / "tuning.sqlite3"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert tuning.location() == tmp_path / "brt" / "tuning.sqlite3"


def test_size_classes() -> None:
    assert [tuning.size_class(n) for n in (0, 1, 2, 3, 4, 5, 128, 129)] == [
        *(0, 1, 2, 4, 4, 8),
        *(128, 256),
    ]
