"""Recording: what routers tell while a model runs, and the statistics made of it afterwards.

Legend: N cells, P paths, R routed rows, Z cells of the root, A modules around a router.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from brt.errors import ProfileError
from brt.graph import as_call
from brt.profile.data import MARGIN_EDGES, Profile, RouterProfile, signature
from brt.route import Route
from brt.routers import LoopRouter, Router, ScatterRouter

_BAR_AFTER_SECONDS = 2.0


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    window: int | None = 8,
    training: bool = False,
    progress: bool | None = None,
) -> Profile:
    """Run a model on batches, and count who goes where.

    A batch is a tensor, a tuple or list of positional arguments, or a dict of keywords. The model
    runs in eval mode without gradients, and gets its mode back; compiled parts run eagerly.

    Args:
        model: a module with routers.
        batches: what it is called with; each batch is one forward.
        window: `Profile.joint` counts each decision with so many decisions about the same root
            before it; None counts all pairs, 0 none.
        training: leave the mode, and whether gradients are recorded, as they are.
        progress: show a bar after two seconds; by default where stdout is a terminal.
    """
    if not isinstance(model, nn.Module):
        raise ProfileError(f"profile: takes an nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ProfileError(
            f"profile: batches must be an iterable of batches, got {type(batches).__name__}; for "
            "a single batch pass [batch]"
        )
    with Recorder(model, window) as recorder, as_profiled(model, training):
        for batch in _with_bar(batches, sys.stdout.isatty() if progress is None else progress):
            args, kwargs = as_call(batch)
            model(*args, **kwargs)
            recorder.end_forward()
    return recorder.result()


@dataclass
class _Series:
    """What happened at one call of one router, an entry a forward."""

    module: str
    call: int
    num_paths: int
    forwards: list[int] = field(default_factory=list)
    scopes: list[tuple[int, ...]] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    rows_P: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    margins_B: list[Tensor] = field(default_factory=list)

    def frozen(self) -> RouterProfile:
        counts_F2 = torch.stack(self.counts).cpu()
        num_around = self.module.count(".")
        return RouterProfile(
            self.module,
            self.call,
            self.num_paths,
            forward_F=torch.tensor(self.forwards),
            scope_FA=torch.tensor(self.scopes).reshape(len(self.forwards), num_around),
            cells_F=torch.tensor(self.cells),
            rows_FP=torch.stack(self.rows_P).cpu(),
            unrouted_F=counts_F2[:, 0],
            dropped_F=counts_F2[:, 1],
            margins_FB=torch.stack(self.margins_B).cpu(),
        )


@dataclass(frozen=True, eq=False)
class _Event:
    """One decision, as the observer was told it: references only."""

    router: Router
    route: Route
    scores: Tensor
    version: int
    scope: tuple[int, ...]


class Recorder:
    """Observes the routers of a model between ``with`` and its end.

    While the model runs, decisions are only kept, by reference: no device work, no host read.
    Call `end_forward` after each forward of the model; it makes statistics on the device of the
    routes, and reads nothing either. `result` reads them.
    """

    def __init__(self, model: nn.Module, window: int | None = 8) -> None:
        self.model = type(model).__name__
        self.window = window
        self.seconds_inside = 0.0
        """Time spent in observers and hooks, inside the forwards."""
        self._signature = signature(model)
        if not self._signature:
            raise ProfileError(
                f"profile: {self.model} has no router that decides (brt.ScatterRouter, "
                "brt.LoopRouter)"
            )
        self._module = model
        self._path: dict[nn.Module, str] = {}
        self._around: dict[nn.Module, tuple[str, ...]] = {}
        self._num_calls: dict[str, int] = {}
        self._events: list[_Event] = []
        self._series: dict[str, _Series] = {}
        self._joint: dict[tuple[str, str], Tensor] = {}
        self._num_forwards = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for path, module in self._module.named_modules():
            if isinstance(module, Router):
                parts = path.split(".")
                self._path[module] = path
                self._around[module] = tuple(".".join(parts[:i]) for i in range(1, len(parts)))
                self._handles.append(module.register_observer(self._observe))
        self._num_calls = {path: -1 for around in self._around.values() for path in around}
        for path in self._num_calls:
            module = self._module.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._counter(path)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _counter(self, path: str) -> Any:
        num_calls = self._num_calls

        def count(module: nn.Module, args: Any) -> None:
            num_calls[path] += 1

        return count

    def _observe(self, router: Router, route: Route, scores: Tensor) -> None:
        start = time.perf_counter()
        scope = tuple([self._num_calls[path] for path in self._around[router]])
        version = -1 if scores.is_inference() else scores._version
        self._events.append(_Event(router, route, scores.detach(), version, scope))
        self.seconds_inside += time.perf_counter() - start

    def end_forward(self) -> None:
        """Make statistics of the decisions since the last call, which were one forward."""
        events, self._events = self._events, []
        for path in self._num_calls:
            self._num_calls[path] = -1
        num_calls: Counter[Router] = Counter()
        of_root = Counter(event.route.cells.root for event in events)
        earlier: dict[Any, deque[tuple[str, Tensor]]] = defaultdict(
            lambda: deque(maxlen=self.window)
        )
        with torch.no_grad():
            for event in events:
                call = num_calls[event.router]
                num_calls[event.router] += 1
                key = f"{self._path[event.router]}#{call}"
                mask_NP = _taken(event.route)
                self._add(key, call, event, mask_NP)
                root = event.route.cells.root
                if of_root[root] > 1 and self.window != 0:
                    mask_ZP = _of_root(event.route, mask_NP)
                    for before, mask_ZQ in earlier[root]:
                        self._add_joint((before, key), mask_ZQ, mask_ZP)
                    earlier[root].append((key, mask_ZP))
        self._num_forwards += 1

    def _add(self, key: str, call: int, event: _Event, mask_NP: Tensor) -> None:
        route = event.route
        series = self._series.get(key)
        if series is None:
            series = _Series(self._path[event.router], call, route.num_paths)
            self._series[key] = series
        elif series.num_paths != route.num_paths:
            raise ProfileError(
                f"profile: {key} had {series.num_paths} paths, and now has {route.num_paths}"
            )
        rows_P = mask_NP.sum(0)
        unrouted = (~mask_NP.any(1)).sum()
        scores = event.scores
        as_decided = event.version == (-1 if scores.is_inference() else scores._version)
        dropped = torch.zeros_like(unrouted)
        if as_decided:
            wanted = _num_wanted(event)
            if wanted is not None:
                dropped = wanted - rows_P.sum()
        series.forwards.append(self._num_forwards)
        series.scopes.append(event.scope)
        series.cells.append(route.num_cells)
        series.rows_P.append(rows_P)
        series.counts.append(torch.stack([unrouted, dropped]))
        series.margins_B.append(_margins(scores if as_decided else None, mask_NP))

    def _add_joint(self, pair: tuple[str, str], first_ZP: Tensor, second_ZQ: Tensor) -> None:
        counts_PQ = (first_ZP.float().t() @ second_ZQ.float()).long()
        if pair in self._joint:
            self._joint[pair] += counts_PQ
        else:
            self._joint[pair] = counts_PQ

    def result(self) -> Profile:
        """The profile of all forwards; waits for the device."""
        if self._num_forwards == 0:
            raise ProfileError("profile: no batches; pass at least one")
        if not self._series:
            raise ProfileError(
                f"profile: {self._num_forwards} forwards of {self.model}, but no router decided "
                f"anything; it has {', '.join(self._signature)}"
            )
        return Profile(
            self.model,
            self._signature,
            self._num_forwards,
            self.window,
            {key: series.frozen() for key, series in self._series.items()},
            {pair: counts.cpu() for pair, counts in self._joint.items()},
        )


def _taken(route: Route) -> Tensor:
    """Which cell took which path: bool ``[N, P]``."""
    num_cells, num_paths = route.num_cells, route.num_paths
    path_R = route.path_R()
    real_R = (route.cell_R >= 0) & (path_R < num_paths)
    # What is no row goes to a spare last entry
    place_R = torch.where(real_R, route.cell_R * num_paths + path_R, num_cells * num_paths)
    mask = torch.zeros(num_cells * num_paths + 1, dtype=torch.bool, device=place_R.device)
    return mask.scatter_(0, place_R, True)[:-1].view(num_cells, num_paths)


def _of_root(route: Route, mask_NP: Tensor) -> Tensor:
    """Which cell of the root took which path: bool ``[Z, P]``."""
    if route.cells.cell_R is None:
        return mask_NP
    mask_ZP = mask_NP.new_zeros(route.cells.root.num_cells, route.num_paths, dtype=torch.int32)
    return mask_ZP.index_add_(0, route.cells.cell_R, mask_NP.int()) > 0


def _num_wanted(event: _Event) -> Tensor | None:
    """How many rows the decision asked for before capacity; None where nothing limits them."""
    router = event.router
    if not isinstance(router, (ScatterRouter, LoopRouter)):
        return None
    protocol = router.protocol.without_noise()
    if protocol.stochastic:  # asking again would draw again
        return None
    decision = protocol(event.scores, event.route.num_paths)
    if decision.capacity is None:
        return None
    if decision.mask_NP is not None:
        return decision.mask_NP.sum()
    chosen = decision.choice_NK if decision.choice_NK is not None else decision.cell_PC
    assert chosen is not None
    return (chosen >= 0).sum()


def _margins(scores: Tensor | None, mask_NP: Tensor) -> Tensor:
    """Histogram of margins, int64 ``[B]``."""
    counts = torch.zeros(len(MARGIN_EDGES) + 2, dtype=torch.int64, device=mask_NP.device)
    if scores is None or not scores.is_floating_point() or scores.numel() != mask_NP.numel():
        return counts[:-1]
    scores_NP = scores.reshape(mask_NP.shape).float()
    taken_N = scores_NP.masked_fill(~mask_NP, torch.inf).amin(1)
    other_N = scores_NP.masked_fill(mask_NP, -torch.inf).amax(1)
    margin_N = taken_N - other_N
    edges = torch.tensor(MARGIN_EDGES).to(margin_N.device, non_blocking=True)
    bin_N = torch.bucketize(margin_N, edges, right=True)
    # Cells without a margin go to a spare last bin
    bin_N = torch.where(margin_N.isfinite(), bin_N, len(counts) - 1)
    return counts.scatter_add_(0, bin_N, torch.ones_like(bin_N))[:-1]


@contextlib.contextmanager
def as_profiled(model: nn.Module, training: bool) -> Iterator[None]:
    """Eager, and unless ``training`` in eval mode without gradients; restored at the end."""
    with contextlib.ExitStack() as stack:
        if any(
            hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
            for m in model.modules()
        ):
            # Observers see eager calls only
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if training:
            yield
            return
        modes = {m: m.training for m in model.modules()}
        stack.enter_context(torch.no_grad())
        try:
            model.eval()
            yield
        finally:
            for m, was in modes.items():
                m.training = was


def _with_bar(batches: Iterable[Any], wanted: bool) -> Iterator[Any]:
    """The batches, with a progress bar once they have taken two seconds."""
    if not wanted:
        yield from batches
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("profile"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(batches) if isinstance(batches, Sized) else None
    start = time.monotonic()
    bar = Progress(*columns, transient=True)
    task = bar.add_task("profile", total=total)
    try:
        for done, batch in enumerate(batches):
            bar.update(task, completed=done)
            if not bar.live.is_started and time.monotonic() - start > _BAR_AFTER_SECONDS:
                bar.start()
            yield batch
    finally:
        if bar.live.is_started:
            bar.stop()
