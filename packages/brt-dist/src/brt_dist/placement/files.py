"""Plans as files: JSON, with a digest of the placement and what it is for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from brt.files import atomic_write
from brt_dist.placement.errors import PlacementError
from brt_dist.placement.plan import Figures, Plan

SCHEMA = 1
_FORMAT = "brt-plan"
_FIGURES = ("default", "packed", "planned", "bound")
_PLAIN = ("model", "num_experts", "num_ranks", "objective", "admits", "how", "seconds")


def as_json(plan: Plan) -> dict[str, Any]:
    """See `Plan.to_json`."""
    found: dict[str, Any] = {"format": _FORMAT, "schema": SCHEMA}
    found |= {name: getattr(plan, name) for name in _PLAIN}
    found |= {name: asdict(getattr(plan, name)) for name in _FIGURES}
    return found | {"layers": list(plan.layers), "experts": plan.expert_LWS.tolist()}


def save_plan(plan: Plan, path: Path) -> None:
    """See `Plan.save`."""
    found = as_json(plan)
    found["digest"] = _digest(found)
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(found) + "\n", encoding="utf-8")


def load_plan(path: Path) -> Plan:
    """See `Plan.load`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlacementError(f"load: {path} is no plan: {error}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise PlacementError(f"load: {path} is no plan; brt_dist.plan(...).save(path) writes them")
    if found.get("schema") != SCHEMA:
        raise PlacementError(
            f"load: {path} has schema {found.get('schema')}, this brt reads {SCHEMA}; plan again"
        )
    if found.pop("digest", None) != _digest(found):
        raise PlacementError(f"load: {path} is damaged: its digest is not that of its content")
    fields: dict[str, Any] = {name: found[name] for name in _PLAIN}
    fields |= {name: Figures(**found[name]) for name in _FIGURES}
    expert_LWS = np.array(found["experts"], np.int64)
    return Plan(**fields, layers=tuple(found["layers"]), expert_LWS=expert_LWS)


def _digest(found: dict[str, Any]) -> str:
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
