"""Plugins: each hook, what is refused and in which words, and when things are loaded."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest

import brt
from brt import hookspecs, plugins, specs
from brt.errors import PluginError, PluginWarning


def nothing(*args: Any, **options: Any) -> None:
    """A factory."""


def plugin(name: str = "acme", **hooks: Callable[..., Any]) -> ModuleType:
    """A plugin module with these functions, marked."""
    module = ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, brt.hookimpl(function))
    return module


def offers(*found: specs.AnySpec) -> Callable[[], list[specs.AnySpec]]:
    return lambda: list(found)


def pass_spec(name: str) -> brt.PassSpec:
    return brt.PassSpec(name=name, summary="a pass", factory=nothing)


def kernel_spec(**fields: Any) -> brt.KernelSpec:
    given = {"op": "dispatch", "device": "cpu", "name": "acme"}
    return brt.KernelSpec(**(given | {"forward": nothing, "estimate": nothing} | fields))


SPECS = {
    "protocols": brt.ProtocolSpec(name="acme-one", summary="one", factory=nothing),
    "routers": brt.RouterSpec(name="acme-one", summary="one", factory=nothing),
    "passes": pass_spec("acme-one"),
    "kernels": kernel_spec(),
    "models": brt.ModelSpec(name="acme-one", summary="one", factory=nothing, sample=nothing),
    "adapters": brt.AdapterSpec(name="acme-one", summary="one", matches=nothing, adapt=nothing),
    "workloads": brt.WorkloadSpec(name="acme-one", summary="one", factory=nothing),
    "demos": brt.DemoSpec(name="acme-one", summary="one", run=nothing),
    "solvers": brt.SolverSpec(name="acme-one", summary="one", factory=nothing),
}


@pytest.mark.parametrize("kind", SPECS)
def test_hook_of_each_kind(kind: str) -> None:
    spec = SPECS[kind]
    manager = plugins.manager(plugin(**{spec.hook: offers(spec)}), entry_points=False)
    assert manager.collect(kind)[spec.key] == (spec, "acme")
    assert manager.get(kind, spec.key) is spec


def test_every_hook_has_a_kind_and_a_docstring() -> None:
    assert {spec.hook for spec in specs.SPECS.values()} | {"brt_pass_ran"} == set(plugins.HOOKS)
    assert set(SPECS) == set(specs.SPECS)
    for hook in plugins.HOOKS:
        doc = getattr(hookspecs, hook).__doc__
        assert "Called" in doc, hook
        assert "@brt.hookimpl" in doc, hook


def test_hook_brt_pass_ran() -> None:
    seen: list[Any] = []

    class Observer:
        @brt.hookimpl
        def brt_pass_ran(self, record: Any) -> None:
            seen.append(record)

    class Broken:
        @brt.hookimpl
        def brt_pass_ran(self) -> None:
            raise RuntimeError("boom")

    manager = plugins.manager(Broken(), Observer(), Broken(), entry_points=False)
    with pytest.warns(PluginWarning, match=r"brt_pass_ran of Broken failed: RuntimeError: boom"):
        manager.pass_ran("a record", None)  # type: ignore[arg-type]
    assert seen == ["a record"]


def test_builtins_come_by_the_same_door() -> None:
    manager = plugins.manager(entry_points=False)
    assert manager.plugins[0].name == "builtins"
    spec, owner = manager.collect("protocols")["top-k"]
    assert spec.factory is brt.protocols.TopK
    assert owner.startswith("brt-core")
    for kind in ("routers", "passes", "kernels", "workloads"):
        assert manager.collect(kind), kind


def test_misspelt_hook() -> None:
    with pytest.raises(PluginError, match=r"unknown hook 'brt_pases'.*did you mean 'brt_passes'"):
        plugins.manager(plugin(brt_pases=offers()), entry_points=False)


def test_unmarked_hook() -> None:
    module = plugin(brt_routers=offers())
    module.brt_passes = offers(pass_spec("acme-lost"))  # type: ignore[attr-defined]
    with pytest.warns(PluginWarning, match=r"brt_passes of acme is not called.*@brt.hookimpl"):
        plugins.manager(module, entry_points=False)


def test_argument_that_a_hook_does_not_have() -> None:
    module = plugin(brt_passes=lambda graph: [])
    with pytest.raises(PluginError, match=r"Argument\(s\) {'graph'} are declared in the hookimpl"):
        plugins.manager(module, entry_points=False)


def test_same_plugin_twice() -> None:
    module = plugin(brt_passes=offers(pass_spec("acme-one")))
    with pytest.raises(PluginError, match="it is registered already, as 'acme of acme'"):
        plugins.manager(module, module, entry_points=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pass_spec("Bad_Name"), "PassSpec name 'Bad_Name' is not kebab-case"),
        (lambda: pass_spec(None), "PassSpec name None is not kebab-case"),  # type: ignore[arg-type]
        (
            lambda: brt.PassSpec(name="acme", summary="a\nb", factory=nothing),
            "PassSpec 'acme': the summary must be one line of text",
        ),
        (
            lambda: brt.PassSpec(name="acme", summary="", factory=nothing),
            "the summary must be one line of text, got ''",
        ),
        (
            lambda: brt.PassSpec(name="acme", summary="a", factory="Half"),  # type: ignore[arg-type]
            "PassSpec 'acme': factory must be callable, got str",
        ),
        (
            lambda: kernel_spec(forward=None),
            "KernelSpec 'dispatch/cpu/acme': forward must be callable, got NoneType",
        ),
        (lambda: kernel_spec(refuses=3), "refuses must be callable, got int"),
        (
            lambda: brt.ModelSpec(name="acme", summary="a", factory=nothing, sample=None),  # type: ignore[arg-type]
            "ModelSpec 'acme': sample must be callable, got NoneType",
        ),
    ],
)
def test_bad_specs_say_why(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PluginError) as caught:
        make()
    assert message in str(caught.value)


def test_spec_of_a_class() -> None:
    class Half:
        """Run half of the experts.

        More words.
        """

        name = "acme-half"
        paper = "nobody, 2026"

        def __init__(self, fraction: float = 0.5) -> None:
            self.fraction = fraction

    spec = brt.ProtocolSpec.of(Half)
    assert (spec.name, spec.summary, spec.paper) == (
        "acme-half",
        "Run half of the experts.",
        "nobody, 2026",
    )
    assert list(spec.options) == ["fraction"]
    assert spec.factory(fraction=0.25).fraction == 0.25
    assert brt.RouterSpec.of(Half, name="acme-other").name == "acme-other"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([object], "brt_passes must yield PassSpec, got type"),
        ([SPECS["routers"]], "brt_passes must yield PassSpec, got RouterSpec"),
        (None, "brt_passes must return an iterable of PassSpec, got None"),
    ],
)
def test_wrong_type(result: Any, message: str) -> None:
    manager = plugins.manager(plugin(brt_passes=lambda: result), entry_points=False)
    with pytest.raises(PluginError, match=message):
        manager.collect("passes")


def test_a_clash_names_both_owners_and_picks_none() -> None:
    first = plugin("acme", brt_passes=offers(pass_spec("halve")))
    second = plugin("bolt", brt_passes=offers(pass_spec("halve")))
    for order in ((first, second), (second, first)):
        manager = plugins.manager(*order, entry_points=False)
        for _ in range(2):
            with pytest.raises(PluginError, match=r"'halve' comes from both \w+ and \w+") as caught:
                manager.get("passes", "halve")
            assert "acme" in str(caught.value)
            assert "bolt" in str(caught.value)


def test_a_clash_with_a_builtin() -> None:
    taken = brt.ProtocolSpec(name="top-k", summary="mine", factory=nothing)
    manager = plugins.manager(plugin(brt_protocols=offers(taken)), entry_points=False)
    with pytest.raises(PluginError, match=r"brt_protocols: 'top-k' comes from both .*brt-core"):
        manager.collect("protocols")


def test_unknown_names_list_the_nearest() -> None:
    module = plugin(brt_models=offers(SPECS["models"]))
    manager = plugins.manager(module, entry_points=False)
    with pytest.raises(PluginError) as caught:
        manager.get("models", "acme-on")
    assert str(caught.value) == (
        "no 'acme-on' among brt_models; there are: acme-one; did you mean 'acme-one'?"
    )
    with pytest.raises(PluginError, match=r"pip install packages/brt-core packages/brt-models"):
        plugins.manager(entry_points=False).get("models", "switch")
    with pytest.raises(PluginError, match=r"plugins offer no 'pass'; did you mean 'passes'"):
        manager.collect("pass")


def test_offers_are_sorted_and_asked_for_once() -> None:
    calls = []

    def brt_passes() -> Iterator[brt.PassSpec]:
        calls.append(1)
        yield pass_spec("zebra")
        yield pass_spec("aardvark")

    manager = plugins.manager(plugin(brt_passes=brt_passes), entry_points=False)
    assert not calls, "a hook is called at the first look-up, not before"
    names = list(manager.collect("passes"))
    assert names == sorted(names)
    manager.get("passes", "zebra")
    assert len(calls) == 1


def test_kernels_of_an_operator_and_a_device() -> None:
    fast = kernel_spec(name="acme")
    manager = plugins.manager(
        plugin(brt_kernels=offers(fast, kernel_spec(device="cuda", name="acme-cuda"))),
        entry_points=False,
    )
    assert [spec.name for spec, _ in manager.kernels("dispatch", "cpu")] == ["acme", "reference"]
    assert manager.kernels("dispatch", "cpu")[0] == (fast, "acme")
    assert [spec.name for spec, _ in manager.kernels("dispatch", "cuda")] == [
        "acme-cuda",
        "reference",
    ]
    assert [spec.name for spec, _ in manager.kernels("dispatch", "xpu")] == ["reference"]
    assert manager.kernels("no_such_op", "cpu") == []


def test_threads_ask_a_hook_once() -> None:
    calls = []
    barrier = threading.Barrier(8)
    results: list[object] = []

    def brt_passes() -> list[brt.PassSpec]:
        calls.append(1)
        return [pass_spec("acme-one")]

    manager = plugins.manager(plugin(brt_passes=brt_passes), entry_points=False)

    def ask() -> None:
        barrier.wait()
        results.append(manager.get("passes", "acme-one"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 8


def test_using_is_seen_and_undone() -> None:
    before = plugins.generation()
    with plugins.using(plugin(brt_passes=offers(pass_spec("acme-one")))) as manager:
        assert plugins.current() is manager
        assert plugins.get("passes", "acme-one").name == "acme-one"
        assert plugins.generation() != before
        inside = plugins.generation()
    assert plugins.generation() not in (before, inside)
    with pytest.raises(PluginError, match="no 'acme-one' among brt_passes"):
        plugins.get("passes", "acme-one")


class Installed:
    """Entry points, as if distributions were installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **loads: Any) -> None:
        points = [self.Point(name, value) for name, value in loads.items()]
        monkeypatch.setattr(metadata, "entry_points", lambda group: points)
        monkeypatch.delenv("BRT_PLUGINS", raising=False)

    class Point:
        def __init__(self, name: str, value: Any) -> None:
            self.name, self.loads, self.value = name, value, name
            self.dist = type("Dist", (), {"name": f"brt-{name}", "version": "0.3.1"})

        def load(self) -> Any:
            if isinstance(self.loads, Exception):
                raise self.loads
            return self.loads


def test_a_plugin_that_raises_on_import_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good = plugin(brt_passes=offers(pass_spec("acme-one")))
    Installed(monkeypatch, bad=ImportError("no module named libfoo"), good=good)
    said = r"plugin 'bad' \(brt-bad 0.3.1\) did not load: ImportError: no module named libfoo"
    with pytest.warns(PluginWarning, match=said):
        manager = plugins.manager()
    assert manager.collect("passes")["acme-one"][1] == "brt-good 0.3.1"
    with pytest.raises(PluginError, match=said) as caught:
        manager.get("passes", "acme-two")
    assert str(caught.value).count("libfoo") == 1
    (bad,) = [p for p in manager.plugins if p.name == "bad"]
    assert bad.skipped == "did not load: ImportError: no module named libfoo"


def test_an_installed_plugin_with_a_misspelt_hook_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Installed(monkeypatch, bad=plugin(brt_pases=offers()))
    with pytest.warns(PluginWarning, match=r"plugin 'bad' \(brt-bad 0.3.1\).*'brt_pases'"):
        manager = plugins.manager()
    assert "brt_pases" not in {hook for p in manager.plugins for hook in p.hooks}
    assert manager.collect("protocols"), "the others work on"


def test_an_installed_plugin_that_breaks_in_a_hook_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def brt_passes() -> Iterator[brt.PassSpec]:
        yield pass_spec("acme-one")
        raise RuntimeError("boom")

    Installed(monkeypatch, bad=plugin(brt_passes=brt_passes))
    manager = plugins.manager()
    with pytest.warns(PluginWarning, match=r"brt_passes of brt-bad 0.3.1 is left out.*boom"):
        assert "acme-one" not in manager.collect("passes")
    with pytest.raises(PluginError, match="boom"):
        manager.get("passes", "acme-one")


@pytest.mark.parametrize(
    ("value", "loaded"), [("", set()), ("one", {"one"}), (" two , one", {"one", "two"})]
)
def test_brt_plugins_chooses(monkeypatch: pytest.MonkeyPatch, value: str, loaded: set[str]) -> None:
    Installed(monkeypatch, one=plugin("one"), two=plugin("two"))
    monkeypatch.setenv("BRT_PLUGINS", value)
    found = plugins.manager().plugins
    assert {p.name for p in found if p.installed and p.skipped is None} == loaded
    assert all("BRT_PLUGINS" in p.skipped for p in found if p.skipped is not None)


def test_brt_plugins_names_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    Installed(monkeypatch, kernels=plugin())
    monkeypatch.setenv("BRT_PLUGINS", "kernel")
    with pytest.warns(PluginWarning, match=r"'kernel', which is not installed.*'kernels'"):
        plugins.manager()


def test_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BRT_TRACE_PLUGINS", "1")
    plugins.manager(plugin(brt_passes=offers()), entry_points=False).collect("passes")
    assert "brt plugins: brt_passes of acme took" in capsys.readouterr().err


def test_importing_brt_loads_no_plugin() -> None:
    code = "import brt, brt.plugins, sys; assert brt.plugins._current is None"
    subprocess.run([sys.executable, "-c", code], check=True)
