"""Sdists and wheels: made, looked into, and installed into empty places."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import nox

from workspace import CONSTRAINTS, PACKAGES, ROOT, Package, sources_of, wheel_of

DIST = ROOT / "dist"


def build_distributions(session: nox.Session, python: str) -> None:
    """Make dist/ afresh: of each package an sdist, and the wheel that the sdist gives."""
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES.values():
        # A compiled wheel takes minutes and is there already; see that its sdist has the sources.
        kinds = ("--sdist",) if package.compiled else ()
        build = ("-m", "build", "--no-isolation", "--outdir", str(DIST), *kinds)
        session.run(python, *build, str(package.folder), silent=True)
        if package.compiled:
            shutil.copy(wheel_of(session, python, package), DIST)
            missing = missing_from_sdist(package)
            if missing:
                session.error(f"the sdist of brt-{package.short} lacks {', '.join(missing)}")


def missing_from_sdist(package: Package) -> list[str]:
    """Files that a compiled package is built from and that its sdist does not carry."""
    (sdist,) = DIST.glob(f"brt_{package.short}-*.tar.gz")
    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(package.folder)) for path in sources_of(package)}
    return sorted(sources - carried)


def make_place(session: nox.Session, name: str) -> Path:
    """A new environment of its own."""
    place = Path(session.create_tmp()).resolve() / name
    shutil.rmtree(place, ignore_errors=True)
    session.run("python", "-m", "venv", str(place), silent=True)
    return place


def copy_place(place: Path, name: str) -> Path:
    """A copy of an environment: its files are links, so it costs next to nothing."""
    copy = place.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy, symlinks=True, copy_function=os.link)
    return copy


def try_install(
    session: nox.Session, place: Path, commands: list[list[str]], *modules: str
) -> None:
    """Run pip's commands in an environment, then import what they brought, away from here."""
    env = {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(CONSTRAINTS),
        "PIP_NO_COMPILE": "1",
        # The README's line compiles the CPU half only, in a place of its own.
        "CMAKE_ARGS": "-DBRT_CUDA=OFF",
        "SKBUILD_BUILD_DIR": str(place / "build"),
    }
    python = str(place / "bin" / "python")
    session.log(f"pip {' && pip '.join(map(' '.join, commands))}; import {', '.join(modules)}")
    for command in commands:
        session.run(python, "-m", "pip", *command, env=env, external=True, silent=True)
    session.run(python, "-m", "pip", "check", external=True, silent=True)
    with session.chdir(place):
        session.run(python, "-c", f"import {', '.join(modules)}", external=True)


def readme_installs() -> list[list[list[str]]]:
    """The README's blocks of pip commands about our packages, each for an empty environment."""
    blocks = re.findall(r"```bash\n(pip .*?)```", (ROOT / "README.md").read_text(), re.S)
    return [[shlex.split(line, comments=True)[1:] for line in b.splitlines()] for b in blocks]


def audit(session: nox.Session, package: Package, library: Path) -> None:
    """Stop unless a library keeps to the stable ABI of the oldest torch that its package admits."""
    text = session.run("torch-abi-audit", "--json", str(library), silent=True)
    (found,) = json.loads(str(text))["bundled_libs"]
    needs, oldest = found["torch"]["min_torch_version"], package.oldest_torch
    if not found["torch"]["stable"] or release(needs) > release(oldest):
        session.error(f"{library.name} must be stable from torch {oldest}: {found['torch']}")
    session.log(f"{library.name}: stable ABI, torch {needs} or newer")


def release(version: str) -> tuple[int, ...]:
    """A version's numbers, as far as they matter to torch: major and minor."""
    return tuple(map(int, version.split(".")[:2]))
