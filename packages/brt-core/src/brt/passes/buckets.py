"""Calls of other numbers of rows by one graph: which sizes there are, padding, and cutting back.

Legend: N rows of a call, B rows of the graph that it replays.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from brt.cellflow.analysis import _arguments
from brt.cellflow.whole import RowsTogetherError, rows_apart
from brt.graph import as_call, trace
from brt.passes.base import Context
from brt.passes.match import scatters

if TYPE_CHECKING:
    from brt.profile import Profile

MOST_NODES = 1500
"""Larger regions keep exact shapes: following rows takes some 10 ms a node."""
Shapes = tuple[tuple[int, ...] | None, ...]
_MOST_CHOSEN = 6
_MOST_SEEN = 128


@dataclass(frozen=True)
class Apart:
    """A proof that rows are kept apart.

    Attributes:
        cells_per_row: how many cells a row is, by the key in a profile of each scatter that takes
            all rows.
        shapes: of the rows of each input, for which it holds; None for what has no rows.
    """

    cells_per_row: Mapping[str, int]
    shapes: Shapes


@dataclass(frozen=True)
class Padding:
    """The numbers of rows that calls are padded to, and the shapes of rows for which it is right.

    Without shapes it is right for none.
    """

    sizes: tuple[int, ...] = ()
    shapes: Shapes | None = None

    def is_right(self, inputs: Sequence[Any]) -> bool:
        """Whether rows of these inputs may have company."""
        return self.shapes is not None and row_shapes(inputs) == self.shapes

    def size_for(self, inputs: Sequence[Any]) -> int | None:
        """The number of rows that a call is padded to; None where it is not."""
        if not self.sizes or not self.is_right(inputs):
            return None
        return next_size(rows_of(inputs), self.sizes)


def choose(seen: Iterable[int], most: int = _MOST_CHOSEN) -> tuple[int, ...]:
    """Sizes to pad calls of the sizes ``seen`` to: () where none has rows.

    At most ``most`` of them are seen ones, with the fewest rows added in all; between and below
    these lie halves, so that no call is padded to twice its rows.
    """
    counts = Counter(size for size in seen if size > 0)
    if len(counts) > _MOST_SEEN:
        step = -(-max(counts) // _MOST_SEEN)
        counts = Counter(-(-size // step) * step for size in counts.elements())
    return _with_halves(_fewest_added(counts, most)) if counts else ()


def _fewest_added(counts: Counter[int], most: int) -> list[int]:
    """Which sizes to keep, each standing for those below it down to the next one kept."""
    sizes = sorted(counts)
    calls = [0, *itertools.accumulate(counts[size] for size in sizes)]
    # best[j]: rows of all calls of the first j sizes, padded, and the sizes kept among these
    best: list[tuple[float, list[int]]] = [(0, [])] + [(float("inf"), [])] * len(sizes)
    for _ in range(min(most, len(sizes))):
        best = [best[0]] + [
            min(
                (rows + sizes[j - 1] * (calls[j] - calls[i]), [*kept, sizes[j - 1]])
                for i, (rows, kept) in enumerate(best[:j])
            )
            for j in range(1, len(sizes) + 1)
        ]
    return best[-1][1]


def _with_halves(sizes: Sequence[int]) -> tuple[int, ...]:
    found = set(sizes)
    for low, high in itertools.pairwise([0, *sorted(sizes)]):
        while high > max(2 * low, 1):
            high = -(-high // 2)
            found.add(high)
    return tuple(sorted(found))


def may_pad(wanted: str | tuple[int, ...] | None, ctx: Context) -> bool:
    """Whether there are sizes to pad calls to, if nothing speaks against it."""
    if wanted == "profile" and ctx.profile is None:
        ctx.leave("other numbers of rows", "no profile says which there are")
        return False
    return wanted is not None


def sizes_for(wanted: str | tuple[int, ...] | None, apart: Apart, ctx: Context) -> tuple[int, ...]:
    """The sizes that calls are padded to; () where each shape has a graph of its own."""
    if not may_pad(wanted, ctx) or wanted is None:
        return ()
    if not isinstance(wanted, str):
        sizes = tuple(sorted(set(wanted)))
    else:
        assert ctx.profile is not None
        sizes = choose(_seen(ctx.profile, apart.cells_per_row))
    if sizes:
        ctx.note(
            "each row is computed by itself: calls are padded to the next of "
            f"{', '.join(map(str, sizes))} rows"
        )
    return sizes


def require_rows_apart(region: fx.GraphModule, ctx: Context) -> Apart:
    """Prove it for rows as in the sample.

    Raises `RowsTogetherError` or `TraceError` where that cannot be done. Passes leave the result as
    it was, so that the region's own code tells.
    """
    batch = ctx.sample[0].batch_for(ctx.scope) if ctx.sample else None
    if batch is None:
        raise RowsTogetherError("shapes are needed to tell: brt.optimize(..., sample=batch)")
    graph = trace(ctx.scope, batch)
    if len(graph.graph.nodes) > MOST_NODES:
        raise RowsTogetherError(f"more than {MOST_NODES} nodes would have to be followed")
    cells_per_row = rows_apart(graph, batch)
    by_key = {
        f"{found.target}#{found.call}": cells_per_row[found.node]
        for found in scatters(graph.graph, ctx.scope)
        if found.node in cells_per_row
    }
    inputs = _arguments(region, as_call(batch))
    return Apart(by_key, row_shapes(list(inputs.values())))


def _seen(profile: Profile, cells_per_row: Mapping[str, int]) -> list[int]:
    """How many rows each call had in the profile."""
    for key, each in cells_per_row.items():
        router = profile.routers.get(key)
        if router is not None:
            return [cells // each for cells in router.cells_F.tolist() if cells % each == 0]
    return []


def rows_of(inputs: Sequence[Any]) -> int | None:
    """The number of rows that all tensors of a call have; None where there is no such number."""
    sizes = {x.shape[0] for x in inputs if isinstance(x, Tensor) and x.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def row_shapes(inputs: Sequence[Any]) -> Shapes:
    """The shape of a row of each input; None for what has no rows."""
    return tuple(tuple(x.shape[1:]) if isinstance(x, Tensor) and x.ndim else None for x in inputs)


def next_size(num_rows: int | None, sizes: Sequence[int]) -> int | None:
    """The smallest size that so many rows fit in; None where there is none."""
    if num_rows is None:
        return None
    return next((size for size in sizes if size >= num_rows), None)


def signature(inputs: Sequence[Any], size: int | None) -> tuple[Any, ...]:
    """What a graph is for: everything about the inputs but their values.

    With a ``size`` also but their number of rows, and how far these lie apart.
    """
    parts: list[Any] = [size]
    for x in inputs:
        if not isinstance(x, Tensor):
            parts.append((type(x), x))
        elif size is None or not x.ndim:
            parts.append((tuple(x.shape), x.stride(), x.dtype, x.device))
        else:
            parts.append((tuple(x.shape[1:]), _layout(x), x.dtype, x.device))
    return tuple(parts)


def room_for(inputs: Sequence[Any], size: int | None) -> list[Any]:
    """Copies of the inputs; with a ``size``, of so many rows, to be filled by `fill`."""
    if size is None:
        return [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    rooms = []
    for x in inputs:
        if isinstance(x, Tensor) and x.ndim:
            shape = (size, *x.shape[1:])
            x = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
        elif isinstance(x, Tensor):
            x = x.clone()
        rooms.append(x)
    return rooms


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last and not x.is_contiguous() else torch.contiguous_format


def fill(rooms: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Copy the inputs to where the graph reads them; rows beyond theirs repeat the last one.

    A copy of a row is as safe as the row: zeros might divide by zero.
    """
    for room, given in zip(rooms, inputs, strict=True):
        if not isinstance(room, Tensor):
            continue
        if room.shape == given.shape:
            room.copy_(given)
        else:
            num_rows = given.shape[0]
            room[:num_rows].copy_(given)
            room[num_rows:].copy_(given[-1:])


def cut(output: Any, num_rows: int | None) -> Any:
    """A copy of what a graph gave; with ``num_rows`` of its first rows."""

    def copied(out: Tensor) -> Tensor:
        return out.clone() if num_rows is None else out[:num_rows].clone()

    return pytree.tree_map_only(Tensor, copied, output)
