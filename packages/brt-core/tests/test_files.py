"""Nobody sees half of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from brt.files import atomic_write


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    with atomic_write(path) as beside:
        beside.write_text("all of it")
        assert beside.suffix == ".json"
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_block_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")

    def write_half() -> None:
        with atomic_write(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "report.json"):
        pass
    assert not list(tmp_path.iterdir())
