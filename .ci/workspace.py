"""The packages of this repository, and the environments that sessions work in."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CACHE = ROOT / ".cache"
# Where the sessions that need every package work; `tests(all)` owns it.
EVERYTHING = ROOT / ".nox" / "tests-all"

# What every environment with packages gets first; versions stand in constraints.txt.
BASE = ("torch", "numpy", "setuptools", "wheel")
COMPILE = ("scikit-build-core", "cmake", "ninja")


@dataclass(frozen=True)
class Package:
    """One folder of packages/, as its pyproject.toml describes it."""

    short: str
    folder: Path
    siblings: tuple[str, ...]
    extras: tuple[str, ...]
    oldest_torch: str
    compiled: bool
    # It has an entry point of group brt: brt-core tests its plugin, whether or not it needs brt.
    plugin: bool

    @classmethod
    def read(cls, config: Path) -> Package:
        """The package of a pyproject.toml."""
        table = tomllib.loads(config.read_text())
        project = table["project"]
        extras = project.get("optional-dependencies", {})
        return cls(
            short=config.parent.name.removeprefix("brt-"),
            folder=config.parent,
            siblings=tuple(siblings_in(project["dependencies"])),
            extras=tuple(name for name, needs in extras.items() if not siblings_in(needs)),
            oldest_torch=next(n for n in project["dependencies"] if n.startswith("torch"))[7:],
            compiled=table["build-system"]["build-backend"].startswith("scikit_build_core"),
            plugin="brt" in project.get("entry-points", {}),
        )

    @property
    def module(self) -> str:
        """What it imports as."""
        return "brt" if self.short == "core" else f"brt_{self.short}"

    @property
    def requirement(self) -> str:
        """What pip is told: the folder, with every extra that brings no sibling."""
        return str(self.folder) + (f"[{','.join(self.extras)}]" if self.extras else "")


def siblings_in(needs: Iterable[str]) -> list[str]:
    """Short names of the packages of this repository among some requirements."""
    return [match[1] for need in needs if (match := re.match(r"brt-(\w+)", need))]


PACKAGES = {
    package.short: package
    for package in map(Package.read, sorted(ROOT.glob("packages/*/pyproject.toml")))
}


def with_siblings(*shorts: str) -> list[str]:
    """These packages and all that they declare, siblings first."""
    found: list[str] = []
    for short in shorts:
        for name in (*with_siblings(*PACKAGES[short].siblings), short):
            if name not in found:
                found.append(name)
    return found


def test_cases() -> dict[str, list[str]]:
    """Name of a case of `tests` -> packages that are installed for it."""
    cases = {}
    for short, package in PACKAGES.items():
        alone = with_siblings(short)
        if package.plugin and "core" not in alone:
            cases[f"{short}-alone"] = alone
            alone = [*alone, "core"]
        cases[short] = alone
    return cases | {"all": list(PACKAGES)}


def pip_install(session: nox.Session, python: str, *args: str) -> None:
    """Install by the pins; --no-compile halves the time that torch takes."""
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
    session.run(python, *pip, "-c", str(CONSTRAINTS), *args, external=True, silent=True)


def install(session: nox.Session, python: str, tools: Iterable[str], shorts: list[str]) -> None:
    """Install tools, then packages against the torch that is there; once per set of inputs."""
    packages = [PACKAGES[short] for short in shorts]
    compiled = [package for package in packages if package.compiled]
    tools = (*BASE, *tools, *(COMPILE if compiled else ()))
    inputs = digest([CONSTRAINTS], *tools, *map(key, packages))
    done = Path(python).parents[1] / f".installed-{inputs}"
    if done.exists():
        return
    pip_install(session, python, *tools)
    for package in compiled:
        wheel = wheel_of(session, python, package)
        # pip would keep an installed wheel of the same version.
        pip_install(session, python, "--force-reinstall", "--no-deps", str(wheel))
    # One call, so that siblings resolve to each other and to nobody else's.
    editable = [word for p in packages if not p.compiled for word in ("-e", p.requirement)]
    if editable:
        pip_install(session, python, "--no-build-isolation", *editable)
    done.touch()


def everything(session: nox.Session, *tools: str, compiled: bool = True) -> str:
    """The Python that has every package (or all that need no compiler), and these tools."""
    python = EVERYTHING / "bin" / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(EVERYTHING), external=True, silent=True)
    shorts = [short for short, package in PACKAGES.items() if compiled or not package.compiled]
    install(session, str(python), tools, shorts)
    return str(python)


def own_python(session: nox.Session) -> str:
    """The Python of the session's own environment."""
    return str(Path(session.bin) / "python")


def wheel_of(session: nox.Session, python: str, package: Package) -> Path:
    """The wheel of a compiled package, built only where its sources are new."""
    folder = CACHE / "wheels" / f"{package.short}-{key(package)}"
    if not list(folder.glob("*.whl")):
        for older in folder.parent.glob(f"{package.short}-*"):
            shutil.rmtree(older)
        pip = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder))
        # Kept, so that an edit of one file compiles one file; apart from a developer's own build.
        env = {"SKBUILD_BUILD_DIR": str(CACHE / "build" / package.short)}
        session.run(python, *pip, str(package.folder), env=env, external=True, silent=True)
    return next(folder.glob("*.whl"))


def key(package: Package) -> str:
    """What an installed package changes with: its pyproject.toml, or all sources if compiled."""
    if not package.compiled:
        return digest([package.folder / "pyproject.toml"])
    return digest(sources_of(package), os.environ.get("CMAKE_ARGS", ""))


def sources_of(package: Package) -> list[Path]:
    """What a compiled package is built from."""
    others = {"build", "dist", "scripts", "tests", "__pycache__"}
    return [
        path
        for path in sorted(package.folder.rglob("*"))
        if path.is_file() and not others.intersection(path.relative_to(package.folder).parts)
    ]


def digest(files: Iterable[Path], *texts: str) -> str:
    """A short hash of files' names and contents, and of texts."""
    found = hashlib.sha256(repr(texts).encode())
    for path in files:
        found.update(str(path.relative_to(ROOT)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
