"""The rules of the house that a test can hold us to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import brt_dist._plugin
from brt import plugins
from brt.ops import OPERATORS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
CORE = ROOT / "packages" / "brt-core"

# Written so that this file does not match itself.
PRIVATE = "|".join(
    (
        r"/(?:wor[k]|far[m]|roo[t])/",
        r"/hom[e]/\w",
        r"pypi[.]org",
        r"python[h]osted",
        r"download[.]pytorch[.]org",
        r"registry[.]npmjs",
        r"deb[.]debian",
    )
)


def tracked(*patterns: str) -> Iterator[Path]:
    """Files under version control."""
    command = ["git", "ls-files", "-z", "--", *patterns]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, found.split("\0")):
        if (ROOT / name).is_file():
            yield ROOT / name


def passes() -> Iterator[tuple[str, Path]]:
    """Each pass that our packages offer, and the package."""
    core = set(plugins.manager(entry_points=False).collect("passes"))
    for name in plugins.manager(brt_dist._plugin, entry_points=False).collect("passes"):
        yield name, CORE if name in core else ROOT / "packages" / "brt-dist"


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("hook", plugins.HOOKS)
def test_hook_has_a_heading_with_its_arguments(hook: str) -> None:
    arguments = {"brt_pass_ran": "record, graph"}.get(hook, "")
    assert f"`{hook}({arguments})`" in headings(DOCS / "plugins.md")


def test_protocols_have_headings() -> None:
    offered = {f"`{name}`" for name in plugins.manager(entry_points=False).collect("protocols")}
    assert offered <= set(headings(DOCS / "protocols.md"))


def test_passes_have_pages_files_and_tests() -> None:
    for name, package in passes():
        module = name.replace("-", "_")
        assert (DOCS / "passes" / f"{name}.md").exists(), name
        assert len(list((package / "src").glob(f"*/passes/{module}.py"))) == 1, name
        assert (package / "tests" / f"test_passes_{module}.py").exists(), name


def test_passes_pages_are_about_passes() -> None:
    pages = {page.stem for page in DOCS.glob("passes/*.md")}
    assert pages - {"index"} <= {name for name, _ in passes()}


def test_operators_have_pages() -> None:
    found = {title for page in DOCS.glob("operators/*.md") for title in headings(page)}
    assert {f"`{name}`" for name in OPERATORS} <= found


def test_operators_have_tests() -> None:
    for name in OPERATORS:
        forward = name.removesuffix("_backward")
        assert (CORE / "tests" / f"test_op_{forward}.py").exists(), name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_packages_carry_what_a_wheel_must(package: Path) -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert (package / "LICENSE").read_text() == licence
    assert (package / "README.md").exists()
    assert len(list(package.glob("src/*/py.typed"))) == 1


def test_ci_runs_the_commands_of_the_readme() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    demo, tests = blocks[:2]
    assert demo.strip().endswith("nox -s demo")
    run = (ROOT / ".ci" / "run").read_text()
    assert tests.strip() in run
    assert "-m venv .venv" in run
    assert "-c constraints.txt nox" in run
    assert "-c constraints.txt nox" in demo


def test_no_machine_paths_or_registries() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in re.finditer(PRIVATE, text)]
    assert not found


def test_sources_are_ascii() -> None:
    for path in tracked("*.py", "*.cpp", "*.cu", "*.h", "*.cuh", "*.cmake", "*.toml"):
        assert path.read_text().isascii(), path


def test_modules_are_small_enough_to_read() -> None:
    sources = [path for path in tracked("packages/*/src/*.py") if path.name != "table.py"]
    sizes = {path: path.read_text().count("\n") for path in sources}
    assert not {path: size for path, size in sizes.items() if size > 500}
