"""The `brt` command: what it lists, its exit codes, and what it says to a user who erred."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import brt
from brt import cli, plugins
from brt.cli.samples import sample_calls
from brt.ops import OPERATORS

LISTS = ("plugins", "protocols", "routers", "passes", "ops", "models")


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process."""

    def command(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["brt", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return command


class Two(nn.Module):
    """A model with one scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(1), num_paths=2)


@pytest.fixture
def zoo() -> Any:
    module = ModuleType("acme")

    @brt.hookimpl
    def brt_models() -> list[brt.ModelSpec]:
        spec = brt.ModelSpec(
            name="acme-two",
            summary="two [experts]",
            factory=Two,
            sample=lambda seed=0: (),
            cells="a token",
            checkpoints=("safetensors",),
        )
        return [spec]

    module.brt_models = brt_models  # type: ignore[attr-defined]
    with plugins.using(module):
        yield


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.usefixtures("zoo")
def test_lists_as_table_and_json(run: Run, name: str) -> None:
    table, found = run(name), run(name, "--json")
    assert (table.code, found.code) == (0, 0)
    assert found.data, "each list has something here"
    first = next(iter(found.data[0].values()))
    assert first in table.out


def test_protocols_say_options_and_paper(run: Run) -> None:
    (top_k,) = [row for row in run("protocols", "--json").data if row["name"] == "top-k"]
    assert top_k["options"][0] == "k"
    assert top_k["paper"]
    assert "``" not in top_k["what"]


def test_passes_say_their_order(run: Run) -> None:
    found = {row["name"]: row for row in run("passes", "--json").data}
    assert "drop-dead-paths" in found
    assert any(row["by default"] for row in found.values())


@pytest.mark.usefixtures("zoo")
def test_models_are_counted_without_being_filled(run: Run) -> None:
    (row,) = run("models", "--json").data
    assert (row["name"], row["parameters"], row["routers"]) == ("acme-two", 10, 1)
    assert row["checkpoints"] == ["safetensors"]


@pytest.mark.usefixtures("zoo")
def test_models_show_draws_routers(run: Run) -> None:
    drawn = run("models", "show", "acme-two")
    assert "two [experts]" in drawn.out
    assert "ScatterRouter" in drawn.out
    assert "TopK" in drawn.out
    (router,) = run("models", "show", "acme-two", "--json").data["routers"]
    assert (router["place"], router["router"]) == ("scatter", "ScatterRouter")


def test_no_models_says_what_to_install(run: Run) -> None:
    with plugins.using():
        said = run("models")
    assert said.code == 0
    assert "packages/brt-models" in said.out
    assert run("models", "--json").data == []


def test_every_operator_has_a_call_to_explain() -> None:
    calls = sample_calls(64, 4, 2, 8, 16, "float32", "cpu")
    assert set(calls) == set(OPERATORS)
    for name, args in calls.items():
        OPERATORS[name].overload(*args)


def test_ops_explain(run: Run) -> None:
    sizes = ("--cells", "64", "--paths", "4", "--dim", "8", "--hidden", "16")
    said = run("ops", "expert_mlp", "--explain", *sizes)
    assert "brt::expert_mlp(" in said.out
    assert "reference" in said.out
    (explained,) = run("ops", "dispatch", "--explain", "--json", *sizes).data
    assert [row["name"] for row in explained["candidates"] if row["chosen"]] == ["reference"]


@pytest.mark.parametrize("empty", [("--cells", "0"), ("--dim", "0")])
def test_ops_explain_of_nothing(run: Run, empty: tuple[str, str]) -> None:
    assert run("ops", "--explain", "--paths", "2", *empty).code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("ops", "disptach"), "did you mean 'dispatch'?"),
        (("ops", "--explain", "--k", "3", "--paths", "2"), "--k must be between 1 and --paths 2"),
        (("ops", "--explain", "--dtype", "int8"), "--dtype must be a float type of torch"),
        (("ops", "--explain", "--device", "gpu"), "--device gpu cannot be used here"),
        (("models", "show", "swich"), "no 'swich' among brt_models"),
    ],
)
def test_user_errors_are_said_without_a_traceback(
    run: Run, args: tuple[str, ...], message: str
) -> None:
    said = run(*args)
    assert said.code == 2
    assert said.err.startswith("brt: error: ")
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.parametrize("args", [("modles",), ("ops", "--cells", "-1"), ("plugins", "--jsn")])
def test_usage_errors(run: Run, args: tuple[str, ...]) -> None:
    assert run(*args).code == 2


def test_a_path_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise FileNotFoundError(2, "No such file or directory", "profile.json")

    monkeypatch.setattr(plugins, "current", lost)
    said = run("plugins")
    assert (said.code, said.err) == (2, "brt: error: No such file or directory: profile.json\n")


def test_control_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "current", interrupted)
    assert run("plugins").code == 130


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(plugins, "current", broken)
    monkeypatch.setattr(sys, "argv", ["brt", "plugins"])
    with pytest.raises(RuntimeError, match="boom"):
        cli.main()


def test_version(run: Run) -> None:
    assert run("--version").out == f"brt {brt.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_teaches_with_examples(run: Run, name: str) -> None:
    said = run(name, "--help")
    assert said.code == 0
    assert "Examples" in said.out
    assert f"brt {name}" in said.out.partition("Examples")[2]


def test_the_module_and_its_warnings() -> None:
    env = {**os.environ, "BRT_PLUGINS": "no-such-plugin"}
    command = [sys.executable, "-m", "brt", "plugins", "--json"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert ran.stderr.startswith("brt: warning: BRT_PLUGINS names 'no-such-plugin'")
    assert json.loads(ran.stdout)[0]["name"] == "builtins"


LIGHT = {"brt.cli", "brt.errors", "brt.files", "brt.specs"}


@pytest.mark.parametrize("name", ["show", *cli.COMMANDS])
def test_commands_import_torch_inside_functions(name: str) -> None:
    (folder,) = cli.__path__
    tree = ast.parse((Path(folder) / f"{name}.py").read_text())
    for node in tree.body:
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        for module in found:
            heavy = module.split(".")[0] in ("brt", "torch", "numpy", "matplotlib")
            assert not heavy or module in LIGHT, f"brt {name} imports {module} at its top"
