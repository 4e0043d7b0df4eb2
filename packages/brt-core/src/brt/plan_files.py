"""How an optimised model was made, as a file: passes, profile, and what was measured.

Weights are not in it: it belongs to a model, by the names and shapes of its state.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brt import plugins, tuning
from brt.errors import PassError, PluginWarning
from brt.ops import measured
from brt.optimize import optimize_as
from brt.optimized import Optimized
from brt.passes.base import Candidate, Pass
from brt.passes.remembered import Form, Remembered
from brt.profile.files import put_together, taken_apart
from brt.sealed_files import SealedFormat

_FORMAT = SealedFormat(
    name="brt-plan",
    schema=2,
    key="plan",
    error=PassError,
    written_by="brt.optimize(...).save(path)",
    otherwise="optimise the model again",
)
_SHOWN = 4  # differences that a message lists


def save_plan(fast: Optimized, path: Path) -> None:
    """See `Optimized.save`."""
    passes, profile = fast._made_by
    header, tensors = ("", {}) if profile is None else taken_apart(profile)
    plan = {
        "model": fast.report.model,
        "training": fast.training,
        "state": _state_of(fast),
        "passes": [_named(one) for one in passes],
        "decisions": {
            key: worth
            for region in fast.report.regions
            for record in region.records
            for key, worth in record.decisions.items()
        },
        "forms": {
            region.path: {"kept": list(kept), "all": [asdict(one) for one in region.candidates]}
            for region in fast.report.regions
            for kept in [one.passes for one in region.candidates if one.kept]
        },
        "measured_on": _machine(fast),
        "profile": header,
    }
    _FORMAT.save(path, json.dumps(plan), tensors)


def load(
    path: str | os.PathLike[str], model: nn.Module, *, sample: Any = None, verify: bool = True
) -> Optimized:
    """Make an optimised model again, as `Optimized.save` wrote it: the same passes and profile.

    What passes measured is taken from the file, so that nothing is timed. Where the file comes from
    another kind of device or another torch, that is measured again, on ``sample``, with a warning.

    Args:
        path: the file.
        model: the one that was optimised, with any weights, in the same mode (train or eval).
        sample, verify: as `brt.optimize` takes them.

    Raises `PassError` for a damaged file, another format or schema, or another model.
    """
    text, tensors = _FORMAT.load(Path(path))
    plan: dict[str, Any] = json.loads(text)
    _check_model(plan, model, Path(path))
    store = tuning.store()
    measured.load(store)
    memory = Remembered(store, plan["decisions"], _forms(plan["forms"]))
    machine = _machine(model)
    if machine != plan["measured_on"]:
        warnings.warn(
            f"load: {path} was measured on {_words(plan['measured_on'])}, this is "
            f"{_words(machine)}: measuring again",
            PluginWarning,
            stacklevel=2,
        )
        memory = Remembered(store)
    profile = put_together(json.loads(plan["profile"]), tensors) if plan["profile"] else None
    passes = [_made(one, Path(path)) for one in plan["passes"]]
    return optimize_as(
        model,
        profile,
        passes,
        sample=sample,
        verify=verify,
        warn_refusals=False,
        measure=bool(plan["forms"]),
        memory=memory,
    )


def _forms(saved: Mapping[str, Any]) -> dict[str, Form]:
    return {
        region: (
            tuple(form["kept"]),
            tuple(Candidate(tuple(c["passes"]), c["seconds"], c["kept"]) for c in form["all"]),
        )
        for region, form in saved.items()
    }


def _check_model(plan: dict[str, Any], model: nn.Module, path: Path) -> None:
    saved, here = plan["state"], _state_of(model)
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if names or plan["model"] != type(model).__name__:
        shown = "; ".join(
            f"{name}: {saved.get(name, 'none')} there, {here.get(name, 'none')} here"
            for name in names[:_SHOWN]
        )
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise PassError(
            f"load: {path} is of another model: a {plan['model']}, and this is a "
            f"{type(model).__name__}{': ' if shown else ''}{shown}{more}"
        )
    if plan["training"] != model.training:
        mode = "train" if plan["training"] else "eval"
        raise PassError(f"load: {path} is of a model in {mode} mode; call model.{mode}() first")


def _state_of(model: nn.Module) -> dict[str, str]:
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }


def _named(one: Pass) -> dict[str, Any]:
    options = asdict(one)  # type: ignore[call-overload]
    try:
        json.dumps(options)
        known = plugins.get("passes", one.name).factory is type(one)
    except (TypeError, ValueError):
        known = False
    if not known:
        raise PassError(
            f"save: pass {one!r} cannot be named in a file: it must come by the hook brt_passes, "
            "with options of plain values"
        )
    return {"name": one.name, "options": options}


def _made(saved: dict[str, Any], path: Path) -> Pass:
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved["options"].items()
    }
    try:
        made: Pass = plugins.get("passes", saved["name"]).factory(**options)
    except TypeError as error:
        raise PassError(
            f"load: {path} names options that {saved['name']} does not have here: {error}"
        ) from error
    return made


def _machine(model: nn.Module) -> dict[str, str]:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    kind = "cpu" if device is None else device.type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine()
    return {"device": f"{kind} ({name})", "torch": torch.__version__.partition("+")[0]}


def _words(machine: Mapping[str, str]) -> str:
    return f"{machine['device']}, torch {machine['torch']}"
