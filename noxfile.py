"""The work on this repository, as commands: `nox -l` lists them.

Packages are found in packages/*, with the siblings that their pyproject.toml names: adding one
needs no change here. torch is installed first and packages are built against it, so that neither
pip nor a build ever fetches another one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / ".ci"))

from budgets import timed
from distributions import (
    DIST,
    audit,
    build_distributions,
    copy_place,
    make_place,
    readme_installs,
    try_install,
)
from workspace import (
    BASE,
    COMPILE,
    CONSTRAINTS,
    PACKAGES,
    ROOT,
    everything,
    install,
    own_python,
    pip_install,
    siblings_in,
    test_cases,
    wheel_of,
    with_siblings,
)

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

# What each kind of work needs beside the packages themselves; versions stand in constraints.txt.
TEST = ("pytest", "pytest-timeout", "hypothesis")
LINT = ("ruff",)
IMPORTS = ("import-linter",)
TYPES = ("mypy",)
DOCS = ("sphinx", "myst-parser", "furo")
BUILD = ("build",)
AUDIT = ("torch-abi-audit",)
ALL_TOOLS = ("nox", *BASE, *COMPILE, *TEST, *LINT, *IMPORTS, *TYPES, *DOCS, *BUILD, *AUDIT)
MOST_CARRIED_MIB = 64
# What our packages and their tests import that a machine with torch may not have of itself.
CARRIED = {
    *("annotated-doc", "iniconfig", "markdown-it-py", "mdurl", "packaging", "pluggy", "pydantic"),
    *("pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "pygments"),
    *("pytest", "pytest-timeout", "hypothesis", "sortedcontainers"),
    *("rich", "safetensors", "scipy", "shellingham", "typer"),
}


@nox.session
@nox.parametrize("case", [nox.param(case, id=case) for case in test_cases()])
@timed
def tests(session: nox.Session, case: str) -> None:
    """Test a package with the siblings it declares and no others; `all`: what concerns several."""
    python = own_python(session)
    install(session, python, TEST, test_cases()[case])
    folder = "tests" if case == "all" else f"packages/brt-{case.removesuffix('-alone')}"
    session.run(python, "-m", "pytest", folder, "-m", "not slow", *session.posargs)


@nox.session(tags=["checks"])
@timed
def lint(session: nox.Session) -> None:
    """Ruff: rules and formatting."""
    pip_install(session, own_python(session), *LINT)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(tags=["checks"])
@timed
def imports(session: nox.Session) -> None:
    """Import contracts of .importlinter."""
    pip_install(session, own_python(session), *IMPORTS)
    paths = [str(package.folder / "src") for package in PACKAGES.values()]
    # A contract may name a package that is still to come: an empty one stands in for it.
    stand_ins = Path(session.create_tmp())
    text = (ROOT / ".importlinter").read_text().partition("root_packages =")[2]
    for module in re.findall(r"^ +(\w+)$", text.partition("\n[")[0], re.M):
        if module not in {package.module for package in PACKAGES.values()}:
            (stand_ins / module).mkdir(exist_ok=True)
            (stand_ins / module / "__init__.py").touch()
    path = os.pathsep.join([*paths, str(stand_ins)])
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": path})


@nox.session(venv_backend="none", tags=["checks"])
@timed
def types(session: nox.Session) -> None:
    """Mypy, strict, on every package."""
    python = everything(session, *TYPES, compiled=False)
    sources = [str(package.folder / "src") for package in PACKAGES.values()]
    session.run(python, "-m", "mypy", *sources, *session.posargs)


@nox.session(venv_backend="none", tags=["checks"])
@timed
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    python = everything(session, *DOCS, compiled=False)
    session.run(python, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "docs/_build/html")


@nox.session(tags=["checks"])
@timed
def wheels(session: nox.Session) -> None:
    """Build sdists and wheels; install each beside torch only, the README's lines into nothing."""
    python = own_python(session)
    install(session, python, (*BUILD, *COMPILE), [])
    build_distributions(session, python)
    with_torch = make_place(session, "with-torch")
    pip_install(session, str(with_torch / "bin" / "python"), "torch", "numpy")
    for short, package in PACKAGES.items():
        files = [next(DIST.glob(f"brt_{name}-*.whl")) for name in with_siblings(short)]
        place = copy_place(with_torch, "wheel")
        try_install(session, place, [["install", *map(str, files)]], package.module)
    for commands in readme_installs():
        words = [word for command in commands for word in command]
        named = siblings_in(Path(word).name for word in words)
        place = make_place(session, "empty")
        try_install(session, place, commands, *(PACKAGES[short].module for short in named))


@nox.session(venv_backend="none", tags=["checks"])
@timed
def demo(session: nox.Session) -> None:
    """The main job: profile, optimise and upscale a photo (options are those of `brt demo`)."""
    python = everything(session)
    session.run(str(Path(python).parent / "brt"), "demo", *session.posargs)


@nox.session(venv_backend="none", default=False)
@timed
def bench(session: nox.Session) -> None:
    """Benchmarks: `nox -s bench -- WORKLOAD --json FILE`, as `brt bench`."""
    python = everything(session)
    session.run(str(Path(python).parent / "brt"), "bench", *(session.posargs or ["routing"]))


@nox.session(venv_backend="none", default=False)
@timed
def thorough(session: nox.Session) -> None:
    """Every test, the slow ones too, with many random cases; then `sanitizers` and `faults`."""
    python = everything(session, *TEST)
    folders = [str(package.folder) for package in PACKAGES.values()]
    env = {"BRT_THOROUGH": "1"}
    session.notify("sanitizers")
    session.notify("faults", posargs=[])
    session.run(python, "-m", "pytest", *folders, "tests", *session.posargs, env=env)


@nox.session(venv_backend="none", default=False)
@timed
def sanitizers(session: nox.Session) -> None:
    """Build the C++ operators with AddressSanitizer and UBSan, and run their tests on them."""
    python = everything(session, *TEST)
    bin_folder = str(Path(python).parent)
    env = {"PYTHON": python, "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]])}
    script = PACKAGES["kernels"].folder / "scripts" / "sanitize.sh"
    session.run("sh", str(script), *session.posargs, env=env, external=True)


@nox.session(venv_backend="none", default=False)
@timed
def faults(session: nox.Session) -> None:
    """Ranks on hosts of their own, killed at 200 random points (`-- 20`: so many). As root."""
    python = everything(session, *TEST)
    env = {"BRT_FAULTS": session.posargs[0] if session.posargs else "200"}
    path = PACKAGES["dist"].folder / "tests" / "test_faults_hosts.py"
    session.run(python, "-m", "pytest", "-v", str(path), env=env)


@nox.session(default=False)
@timed
def build(session: nox.Session) -> None:
    """Build the compiled packages and audit them: stable ABI, for the oldest torch they name."""
    python = own_python(session)
    install(session, python, (*AUDIT, *COMPILE), [])
    for package in PACKAGES.values():
        if package.compiled:
            wheel = wheel_of(session, python, package)
            session.log(f"built {wheel.name}")
            unpacked = Path(session.create_tmp()) / package.short
            shutil.unpack_archive(wheel, unpacked, "zip")
            for library in unpacked.rglob("*.so"):
                audit(session, package, library)


@nox.session(default=False)
@timed
def gpu(session: nox.Session) -> None:
    """Make dist/ ready to carry to a GPU machine (`-- 3.12`: its Python), and say what to run."""
    python = own_python(session)
    install(session, python, (*BUILD, *COMPILE), [])
    build_distributions(session, python)
    version = session.posargs[0] if session.posargs else "3.12"
    # A GPU machine brings torch and numpy and may have no network: carry the rest.
    pins = CONSTRAINTS.read_text().splitlines()
    carried = [pin for pin in pins if pin.partition("==")[0].lower() in CARRIED]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64"]
    target = ["--only-binary=:all:", "--no-deps", "--python-version", version]
    target += [word for name in platforms for word in ("--platform", name)]
    pip = ("-m", "pip", "--disable-pip-version-check", "download", "--quiet", "-d")
    session.run(python, *pip, str(DIST / "needs"), *target, *carried, silent=True)
    size = sum(path.stat().st_size for path in DIST.rglob("*.*")) >> 20
    if size >= MOST_CARRIED_MIB:
        session.error(f"dist/ has {size} MiB; below {MOST_CARRIED_MIB} are carried")
    session.log("carry this folder, dist/ included, to the GPU machine and run: bash .ci/gpu")


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Write constraints.txt anew: the newest versions of all that the sessions install."""
    python = own_python(session)
    session.run(python, "-m", "pip", "install", "--quiet", "--upgrade", *ALL_TOOLS, silent=True)
    pure = [package.requirement for package in PACKAGES.values() if not package.compiled]
    session.run(python, "-m", "pip", "install", "--quiet", "--no-build-isolation", *pure)
    frozen = str(session.run(python, "-m", "pip", "freeze", "--all", silent=True)).splitlines()
    ours = re.compile(r"(brt-|pip==|brt_)")
    pins = [line.partition("+")[0] for line in frozen if not ours.match(line)]
    header = "# Every version that a session installs; `nox -s lock` writes it. Users are free."
    CONSTRAINTS.write_text("\n".join([header, *pins]) + "\n")
