"""The Python code of the README and the docs runs, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(page.read_text())]


def test_there_is_code_to_run() -> None:
    assert {page.name for page in pages_with_code()} >= {"README.md", "start.md", "concepts.md"}


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda p: str(p.relative_to(ROOT)))
def test_code_of_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names: dict[str, object] = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        first_line = text.count("\n", 0, block.start(1))
        code = "\n" * first_line + block.group(1)  # so that a traceback names the page's line
        exec(compile(code, str(page), "exec"), names)
