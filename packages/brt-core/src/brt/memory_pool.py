"""A bounded part of a device's memory, into which groups of weights are loaded in turn."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brt.errors import BrtError
from brt.memory_layout import Layout, open_past_cache, page_aligned
from brt.passes.derived import Slots

_StandIn = tuple[nn.Module, tuple[tuple[Any, str, int], ...]]
"""A module, and which weight goes where in it: (table, name, index)."""


class Group:
    """Weights that are used together, and modules like their own that are run with copies of them.

    Args:
        name: for reports.
        scope: the module that targets are names in.
        modules: names of the modules whose weights these are.
        share: of the cells that need these weights, as far as is known: what is needed least makes
            room first.
    """

    def __init__(
        self,
        name: str,
        scope: nn.Module,
        modules: Sequence[str],
        share: float = 0.0,
    ) -> None:
        self.name, self.share = name, share
        self._scope, self._targets = (scope,), tuple(modules)
        self._slots: Slots | None = None
        self._stand_in: _StandIn | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the scope: while a model is copied, it is not whole yet."""
        return {**self.__dict__, "_slots": None, "_stand_in": None}

    def sources(self) -> list[Tensor]:
        """The weights as they are now; the same order each time."""
        if self._slots is None:
            owned = [
                (module, name)
                for target in self._targets
                for module in self._scope[0].get_submodule(target).modules()
                for table in (module._parameters, module._buffers)
                for name, tensor in table.items()
                if tensor is not None and tensor.numel()
            ]
            self._slots = Slots.of(dict.fromkeys(owned))
        return self._slots.read()

    def stand_in(self, views: Sequence[Tensor]) -> nn.Module:
        """A module with the same names in it, which has these weights in the place of its own.

        There is one, which gets other weights each time.
        """
        if self._stand_in is None:
            self._stand_in = self._made()
        return _bound(self._stand_in, views)

    def blank(self, views: Sequence[Tensor]) -> nn.Module:
        """Another one."""
        return _bound(self._made(), views)

    def _made(self) -> _StandIn:
        index_of = {id(source): i for i, source in enumerate(self.sources())}
        root = nn.Module()
        for target in self._targets:
            module = self._scope[0].get_submodule(target)
            memo: dict[int, Any] = {}
            for m in module.modules():
                held = (*m._parameters.values(), *m._buffers.values(), *vars(m).values())
                memo.update({id(t): t for t in held if isinstance(t, Tensor)})
            # What has no weights needs no copy, and may be watched
            _put(root, target, copy.deepcopy(module, memo) if memo else module)
        places = tuple(
            (table, name, index_of[id(tensor)])
            for module in root.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if id(tensor) in index_of
        )
        return root, places


def _bound(made: _StandIn, views: Sequence[Tensor]) -> nn.Module:
    root, places = made
    for table, name, index in places:
        table[name] = views[index]
    return root


def _put(root: nn.Module, target: str, value: nn.Module) -> None:
    *path, name = target.split(".")
    for part in path:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        root = root._modules[part]  # type: ignore[assignment]
    root._modules[name] = value


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    group: Group | None = None
    state: Any = None
    """Of the sources when they were loaded."""
    stand_in: nn.Module | None = None
    loading: Any = None
    """CPU: the future of the read."""
    users: int = 0
    is_wanted: bool = False
    """It was announced, and not used since."""
    used_at: int = 0
    loaded: Any = None
    """CUDA: event behind the copy."""
    released: list[Any] = field(default_factory=list)
    """CUDA: events behind what read it."""


@dataclass(frozen=True)
class Traffic:
    """What a pool has done so far."""

    loads: int = 0
    bytes_loaded: int = 0


class _Reader:
    """A thread that fills slots of the CPU, one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "brt-weights")
        self._files: dict[Path, int] = {}

    def start(self, layout: Layout, buffer: Tensor, versions: tuple[int, ...]) -> Future[None]:
        return self._thread.submit(self._read, layout, buffer, versions)

    def _read(self, layout: Layout, buffer: Tensor, versions: tuple[int, ...]) -> None:
        file = layout.home.file
        if file is None or versions != layout.versions:  # written to: the file does not tell
            layout.fill(buffer)
            return
        if file not in self._files:
            self._files[file] = open_past_cache(file)
        layout.read(buffer, self._files[file])

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)


class Pool:
    """Room for some groups of weights, each in a slot of the size of the largest.

    On the CPU slots are read from the mapped file, past the system's cache where the file system
    can, by a thread of the pool; on CUDA they are copied from the host by a stream of its own.
    Several threads may use it.
    """

    def __init__(self, groups: Sequence[Group], budget_bytes: int, device: torch.device) -> None:
        self.device = device
        self._layouts = {group: Layout.of(group.sources()) for group in groups}
        self._addresses = {group: _state(group)[1] for group in groups}
        size = max(layout.num_bytes for layout in self._layouts.values())
        self.num_slots = min(budget_bytes // size, len(groups))
        if not self.num_slots:
            raise BrtError(
                f"memory: budget_bytes={budget_bytes} does not hold the largest group of weights, "
                f"{size} bytes"
            )
        self.num_bytes = self.num_slots * size
        """What it takes of the device's memory, at most the budget."""
        if device.type == "cpu":
            room = page_aligned(self.num_bytes)
            self._reader = _Reader()
        else:
            room = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._slots = [_Slot(part) for part in room.split(size)]
        self._slot_of: dict[Group, _Slot] = {}
        self._changed = threading.Condition()
        self._time = self._loads = self._bytes = 0

    def knows(self, group: Group) -> bool:
        """Whether a group's weights lie where they lay when this was made."""
        return _state(group)[1] == self._addresses[group]

    @property
    def traffic(self) -> Traffic:
        """What was loaded so far."""
        with self._changed:
            return Traffic(self._loads, self._bytes)

    def announce(self, now: Sequence[Group], soon: Sequence[Group]) -> tuple[bool, ...]:
        """Begin to load what is needed next, and then what may be.

        Returns which groups of ``now`` were there already, or on their way. ``soon`` takes no slot
        that ``now`` needs. What was announced before and has not begun to load is forgotten.
        """
        with self._changed:
            for slot in self._slots:
                slot.is_wanted = False
                idle = slot.loading is not None and not slot.users
                if idle and slot.group not in (*now, *soon) and slot.loading.cancel():
                    self._forget(slot)
            there = tuple(self._holds(group) for group in now)
            for group in (*now, *soon):
                is_there = self._holds(group)
                slot_for = self._slot_of[group] if is_there else self._room(wanted_too=False)
                if slot_for is None:
                    break
                if not is_there:
                    self._load(slot_for, group)
                slot_for.is_wanted = True
            return there

    def blank(self, group: Group) -> nn.Module:
        """A module as `lend` gives it, whose weights have any values."""
        layout = self._layouts[group]
        room = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self.device)
        return group.blank(layout.tensors(room))

    @contextmanager
    def lend(self, group: Group) -> Iterator[nn.Module]:
        """The weights of a group for the block: a module to run in the place of the original."""
        slot = self._taken(group)
        try:
            self._arrive(slot)
            assert slot.stand_in is not None
            yield slot.stand_in
        finally:
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                slot.released.append(stream.record_event())
            with self._changed:
                slot.users -= 1
                self._changed.notify_all()

    def _taken(self, group: Group) -> _Slot:
        with self._changed:
            self._time += 1
            while not self._holds(group):
                room = self._room(wanted_too=True)
                if room is not None:
                    self._load(room, group)
                else:  # another thread may load it meanwhile
                    self._changed.wait()
            slot = self._slot_of[group]
            slot.users += 1
            slot.is_wanted, slot.used_at = False, self._time
            return slot

    def _holds(self, group: Group) -> bool:
        """Whether a group is there, or on its way, with the values that it has now."""
        slot = self._slot_of.get(group)
        return slot is not None and (slot.state == _state(group) or slot.users > 0)

    def _room(self, wanted_too: bool) -> _Slot | None:
        """The slot that is needed least; None where all are in use."""
        free = [s for s in self._slots if not s.users and (wanted_too or not s.is_wanted)]
        return min(free, key=_worth, default=None)

    def _forget(self, slot: _Slot) -> None:
        if slot.group is not None and self._slot_of.get(slot.group) is slot:
            del self._slot_of[slot.group]
        slot.group = slot.loading = slot.stand_in = None

    def _load(self, slot: _Slot, group: Group) -> None:
        stale = self._slot_of.get(group)
        if stale is not None:
            self._forget(stale)
        if slot.loading is not None:
            slot.loading.cancel()
        self._forget(slot)
        layout, slot.state = self._layouts[group], _state(group)
        slot.group = group
        slot.stand_in = group.stand_in(layout.tensors(slot.buffer))
        self._slot_of[group] = slot
        self._loads += 1
        self._bytes += layout.num_bytes
        if self.device.type == "cpu":
            slot.loading = self._reader.start(layout, slot.buffer, slot.state[0])
            return
        with torch.cuda.stream(self._stream):
            for event in slot.released:
                self._stream.wait_event(event)
            slot.released.clear()
            layout.fill(slot.buffer, non_blocking=True)
            slot.loaded = self._stream.record_event()

    def _arrive(self, slot: _Slot) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(slot.loaded)
            return
        assert slot.loading is not None
        try:
            slot.loading.result()
        except BaseException:
            with self._changed:
                self._forget(slot)
            raise

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()


def _state(group: Group) -> Any:
    sources = group.sources()
    return tuple(t._version for t in sources), tuple(t.data_ptr() for t in sources)


def _worth(slot: _Slot) -> tuple[Any, ...]:
    group = slot.group
    return (slot.is_wanted, -1.0 if group is None else group.share, slot.used_at)
