"""Versions, ranges and pins agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECTS: dict[str, dict[str, Any]] = {
    path.parent.name: tomllib.loads(path.read_text())
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def requirements(name: str) -> list[Requirement]:
    """All that a package may pull in, extras included."""
    project = PROJECTS[name]["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(need) for needs in (project["dependencies"], *extras) for need in needs]


def test_the_packages_share_one_version() -> None:
    assert len({project["project"]["version"] for project in PROJECTS.values()}) == 1


def test_the_changelog_opens_with_this_version() -> None:
    (version,) = {project["project"]["version"] for project in PROJECTS.values()}
    first = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == version


@pytest.mark.parametrize("name", PROJECTS)
def test_ranges_admit_the_siblings(name: str) -> None:
    for need in requirements(name):
        if need.name in PROJECTS:
            version = PROJECTS[need.name]["project"]["version"]
            assert need.specifier.contains(version), f"{name} wants {need}, which is {version}"
            assert not need.specifier.contains("99"), f"{name} wants {need}: give it an end"
            assert need.url is None


@pytest.mark.parametrize("name", PROJECTS)
def test_torch_has_a_floor_and_no_ceiling(name: str) -> None:
    (torch,) = (need for need in requirements(name) if need.name == "torch")
    assert str(torch.specifier) == ">=2.11"
    build = PROJECTS[name]["build-system"]["requires"]
    assert "torch" not in {Requirement(need).name for need in build}


@pytest.mark.parametrize(
    "name", [name for name in PROJECTS if (ROOT / "packages" / name / "CMakeLists.txt").exists()]
)
def test_the_stable_abi_is_that_of_the_oldest_torch(name: str) -> None:
    (torch,) = (need for need in requirements(name) if need.name == "torch")
    (floor,) = torch.specifier
    oldest = Version(floor.version)
    cmake = (ROOT / "packages" / name / "CMakeLists.txt").read_text()
    target = re.search(r"BRT_TORCH_TARGET 0x([0-9a-f]{16})", cmake)
    assert target is not None
    major, minor = int(target[1][:2], 16), int(target[1][2:4], 16)
    assert (major, minor) == (oldest.major, oldest.minor)


def test_pins_are_exact_and_bring_no_cuda() -> None:
    for pin in PINS:
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), pin
        assert pin.specifier.contains(str(pin.specifier).removeprefix("==")), pin
        assert not re.match(r"nvidia|cuda|triton", pin.name), pin
        assert "+" not in str(pin), f"{pin}: no local version, so that any build of it will do"


@pytest.mark.parametrize("name", PROJECTS)
def test_every_requirement_is_pinned_and_admits_its_pin(name: str) -> None:
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
    for need in requirements(name):
        if need.name not in PROJECTS:
            pin = pins.get(canonicalize_name(need.name))
            assert pin is not None, f"{name} needs {need}: nox -s lock"
            assert need.specifier.contains(pin), f"{name} needs {need}, the pin is {pin}"
