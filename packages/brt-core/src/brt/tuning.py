"""The tuning store: what was measured on this machine, so that it is measured once.

One small SQLite file for all processes of a user. What is in it depends on the device, torch and
the packages of brt; nothing in it changes a result, only which of several forms gives it. It may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from brt.errors import BrtError, PluginWarning

SCHEMA = 1
VARIABLE = "BRT_TUNING"
"""Environment variable: another file, or "off" for none."""

_T = TypeVar("_T")
_WAIT_S = 10.0
_TABLE = """
CREATE TABLE IF NOT EXISTS choices (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, device TEXT NOT NULL, what TEXT NOT NULL,
    value TEXT NOT NULL, made REAL NOT NULL
)
"""


@dataclass(frozen=True)
class Choice:
    """One thing that was measured.

    Attributes:
        kind: "region", "decision" or "kernel".
        device: on which, in words.
        what: it is about, in words.
        value: what was found; plain values.
        made: when, in seconds since 1970.
    """

    kind: str
    device: str
    what: str
    value: Any
    made: float = 0.0


class _OtherSchemaError(Exception):
    """The file is of another version of brt."""


class Store:
    """Choices by key, in one file that several processes may read and write at a time.

    A file that is damaged, or of another schema, is set aside under another name, with a warning;
    where the file cannot be read or written, nothing is remembered, with a warning.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._warned = False

    def get(self, key: str) -> Choice | None:
        """What is kept under a key."""
        rows = self._read("SELECT kind, device, what, value, made FROM choices WHERE key = ?", key)
        return rows[0] if rows else None

    def put(self, key: str, choice: Choice) -> None:
        """Keep a choice; the latest of a key counts."""
        row = (key, choice.kind, choice.device, choice.what, json.dumps(choice.value), time.time())
        insert = "INSERT OR REPLACE INTO choices VALUES (?, ?, ?, ?, ?, ?)"
        self._do("written", lambda file: file.execute(insert, row))

    def choices(self, kind: str | None = None) -> list[Choice]:
        """All that is kept, or what is of one kind; oldest first."""
        select = "SELECT kind, device, what, value, made FROM choices"
        if kind is None:
            return self._read(f"{select} ORDER BY made")
        return self._read(f"{select} WHERE kind = ? ORDER BY made", kind)

    def clear(self) -> int:
        """Forget everything; returns how many choices that were."""
        if not self.path.exists():
            return 0
        return self._do("cleared", lambda file: file.execute("DELETE FROM choices").rowcount) or 0

    def _read(self, query: str, *values: str) -> list[Choice]:
        if not self.path.exists():
            return []

        def read(file: sqlite3.Connection) -> list[Choice]:
            rows = file.execute(query, values).fetchall()
            return [Choice(k, d, w, json.loads(v), m) for k, d, w, v, m in rows]

        return self._do("read", read) or []

    def _do(self, what: str, action: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """What an action on the open file returns; where it fails, a warning and None."""
        for again in (True, False):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as file:
                    self._prepare(file)
                    with file:
                        return action(file)
            except (OSError, sqlite3.OperationalError, ValueError) as error:  # locked, no place
                why: Exception = error
                break
            except (sqlite3.DatabaseError, _OtherSchemaError) as error:
                why = error
                if again:
                    self._set_aside(str(error))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the tuning store {self.path} cannot be {what} ({why}); what is measured is not "
                f"remembered. {VARIABLE}=off goes without it",
                PluginWarning,
                stacklevel=4,
            )
        return None

    def _prepare(self, file: sqlite3.Connection) -> None:
        """Make the table where the file is new."""
        # A power cut may cost the file, which is then set aside: better than to wait for the disk
        file.execute("PRAGMA synchronous = OFF")
        (version,) = file.execute("PRAGMA user_version").fetchone()
        if version == SCHEMA:
            return
        with file:
            # One process makes the table; another that waited for it finds it there
            file.execute("BEGIN IMMEDIATE")
            (version,) = file.execute("PRAGMA user_version").fetchone()
            (tables,) = file.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and tables == 0:
                file.execute(_TABLE)
                file.execute(f"PRAGMA user_version = {SCHEMA}")
                version = SCHEMA
        if version != SCHEMA:
            raise _OtherSchemaError(f"it has schema {version}, and this brt reads {SCHEMA}")

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.aside-{time.time_ns()}")
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.replace(self.path, aside)
            warnings.warn(
                f"the tuning store {self.path} cannot be used: {why}. It is now {aside.name}, and "
                "a new one is begun",
                PluginWarning,
                stacklevel=5,
            )


def location() -> Path | None:
    """Where the store is: `VARIABLE`'s file, or the user's folder for caches; None for none."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() == "off":
        return None
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "brt" / "tuning.sqlite3"


def store() -> Store | None:
    """The store of this user; None where there is to be none."""
    path = location()
    return None if path is None else Store(path)


def require_store() -> Store:
    """`store`, where one is needed."""
    found = store()
    if found is None:
        raise BrtError(f"{VARIABLE}=off, so there is no tuning store; unset it, or name a file")
    return found


def device_name(device: torch.device | str) -> str:
    """A device, in the words of reports and stores."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(kind)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> tuple[str, ...]:
    """What measurements depend on besides the device: torch, and the packages with kernels."""
    found = [str(torch.__version__)]
    for name in ("brt-core", "brt-kernels"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(metadata.version(name))
    return tuple(found)


def key_of(*parts: Any) -> str:
    """A key of plain values; what prints alike is alike."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def size_class(size: int) -> int:
    """The power of two that a number of rows is rounded up to; 0 stays 0."""
    return 0 if size <= 0 else 1 << (size - 1).bit_length()
