"""Weights outside of the memory that they are used in: `pin`, `load`, `unload`.

A model may have more weights than there is memory to run it in. `pin` gives weights a home: a
safetensors file that is mapped into memory, of which the system keeps what it has room for, or
page-locked memory of the host, from which a GPU copies at full speed. `load` brings weights from
there, in one copy a module, and `unload` lets them go again. The pass ``preload-weights`` does both
while a model runs.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brt.errors import BrtError
from brt.files import atomic_write
from brt.memory_layout import (
    Home,
    Layout,
    Place,
    home_of,
    is_at_home,
    pages_in_memory,
    set_home,
)

_ALIGNED_BYTES = 64
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps a tensor."""

    name: str
    module: nn.Module
    key: str
    is_parameter: bool

    @property
    def tensor(self) -> Tensor:
        table: Any = self.module._parameters if self.is_parameter else self.module._buffers
        return table[self.key]

    def put(self, value: Tensor) -> None:
        """Let the tensor that is there have this memory; a meta tensor is replaced."""
        tensor = self.tensor
        if not tensor.is_meta:
            tensor.data = value
        elif self.is_parameter:
            made = nn.Parameter(value, tensor.requires_grad and value.is_floating_point())
            self.module._parameters[self.key] = made
        else:
            self.module._buffers[self.key] = value


def pin(module: nn.Module, path: str | os.PathLike[str] | None = None) -> None:
    """Move the weights and buffers of a module out of the memory that it runs in.

    With a ``path`` they lie in a safetensors file, mapped into memory: a file that is there already
    is taken as it is, values and all, so that a model made on the meta device gets weights that
    never were in memory at once; otherwise it is written. Names in it are those of the module's
    own parameters and buffers. The file must not change while the module is in use.

    Without one they lie in page-locked memory of the host, for use on a GPU.

    Parameters stay what they are, under their names. Writing to one changes memory, never the file.
    Raises `BrtError` where the file does not fit the module, or no GPU is there to pin memory for.
    """
    slots = list(_slots(module))
    if not slots:
        raise BrtError(f"memory.pin: {type(module).__name__} has no parameters and no buffers")
    for slot in slots:
        if slot.tensor.is_inference():
            raise BrtError(
                f"memory.pin: {slot.name} was made in inference mode, and does not tell whether it "
                "is written to; make the model outside of torch.inference_mode()"
            )
    if path is None:
        _pin_in_memory(slots)
    else:
        _pin_in_file(slots, Path(path))


def load(module: nn.Module, device: torch.device | str | None = None) -> None:
    """Bring weights that are at home to a device (the CPU by default), in one copy.

    Weights that are not at home stay as they are.
    """
    slots = [slot for slot in _slots(module) if is_at_home(slot.tensor)]
    for home in {id(h): h for slot in slots if (h := home_of(slot.tensor)) is not None}.values():
        mine = [slot for slot in slots if home_of(slot.tensor) is home]
        layout = Layout.of([slot.tensor for slot in mine])
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device or "cpu")
        layout.fill(buffer)
        for slot, made in zip(mine, layout.tensors(buffer), strict=True):
            place: Place = slot.tensor._brt_place  # type: ignore[attr-defined]
            slot.tensor.data = made
            set_home(slot.tensor, replace(place, loaded=(slot.tensor._version, made.data_ptr())))


def unload(module: nn.Module) -> None:
    """Let go of what `load` brought: weights are at home again, with their values.

    Those that were written to since are copied there; a mapped file itself never changes. Tensors
    that were put in since, as ``to`` does with buffers, have no home and stay. Raises `BrtError`
    where nothing has one.
    """
    slots = [slot for slot in _slots(module) if home_of(slot.tensor) is not None]
    if not slots:
        raise BrtError(
            f"memory.unload: {type(module).__name__} has no home; brt.memory.pin(module) first"
        )
    for slot in slots:
        tensor = slot.tensor
        place: Place = tensor._brt_place  # type: ignore[attr-defined]
        if is_at_home(tensor):
            continue
        there = place.view(tensor)
        if there is None:
            raise BrtError(
                f"memory.unload: {slot.name} is {tensor.dtype} now, and too large for its home; "
                "brt.memory.pin(module) again"
            )
        written = place.loaded != (tensor._version, tensor.data_ptr())
        if written:
            there.copy_(tensor.detach())
        tensor.data = there
        # Once something was written, the file no longer tells
        version = -1 if written or place.version < 0 else tensor._version
        set_home(tensor, replace(place, version=version, loaded=None))


def resident_bytes(module: nn.Module) -> int:
    """How many bytes of a module's weights are in memory now; of a mapped file, those pages."""
    total, pages = 0, set()
    for slot in _slots(module):
        tensor, home = slot.tensor, home_of(slot.tensor)
        if home is None or home.file is None or not is_at_home(tensor):
            total += tensor.nbytes
            continue
        first = tensor.data_ptr() // mmap.PAGESIZE
        found = pages_in_memory(tensor.data_ptr(), tensor.nbytes)
        pages |= {first + i for i, there in enumerate(found) if there}
    return total + len(pages) * mmap.PAGESIZE


def drop_pages(module: nn.Module) -> None:
    """Ask the system to forget the pages of mapped files that nobody wrote to."""
    homes = {id(h): h for slot in _slots(module) if (h := home_of(slot.tensor)) is not None}
    for home in homes.values():
        home.drop_pages()


def _slots(module: nn.Module) -> Iterator[_Slot]:
    """Every tensor once, also where modules share it."""
    seen: set[int] = set()
    for prefix, inner in module.named_modules():
        for is_parameter, table in ((True, inner._parameters), (False, inner._buffers)):
            for key, tensor in table.items():
                if tensor is None or id(tensor) in seen or not tensor.numel():
                    continue
                seen.add(id(tensor))
                yield _Slot(f"{prefix}.{key}" if prefix else key, inner, key, is_parameter)


def _pin_in_memory(slots: list[_Slot]) -> None:
    if not torch.cuda.is_available():
        raise BrtError(
            "memory.pin: without a GPU there is no use for page-locked memory; give the path of a "
            "file to map: pin(module, path)"
        )
    offsets, size = [], 0
    for slot in slots:
        offsets.append(size)
        size += -(-slot.tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
    home = Home(torch.empty(size, dtype=torch.uint8, pin_memory=True))
    for slot, offset in zip(slots, offsets, strict=True):
        value = slot.tensor.detach()
        made = home.view(offset, value.dtype, value.shape)
        made.copy_(value)
        slot.put(made)
        set_home(slot.tensor, Place(home, offset, slot.tensor.nbytes, slot.tensor._version))


def _pin_in_file(slots: list[_Slot], path: Path) -> None:
    if not path.exists():
        tensors = {slot.name: slot.tensor.detach().cpu().contiguous() for slot in slots}
        with atomic_write(path) as beside:
            save_file(tensors, beside)
    entries, begin, home = _mapped(path)
    for slot in slots:
        entry, tensor = entries.get(slot.name), slot.tensor
        came = "nothing" if entry is None else f"{entry['dtype']}{entry['shape']}"
        fits = entry is not None and _DTYPES.get(entry["dtype"]) == tensor.dtype
        if entry is None or not fits or entry["shape"] != list(tensor.shape):
            raise BrtError(
                f"memory.pin: {path} is not of this module: {slot.name} is "
                f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}, there is {came}"
            )
    for slot in slots:
        offset = begin + entries[slot.name]["data_offsets"][0]
        slot.put(home.view(offset, slot.tensor.dtype, slot.tensor.shape))
        set_home(slot.tensor, Place(home, offset, slot.tensor.nbytes, slot.tensor._version))


def _mapped(path: Path) -> tuple[dict[str, Any], int, Home]:
    """What is in a safetensors file, where its data begins, and the whole file in memory."""
    try:
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            entries = json.loads(header)
            pages = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
    except (OSError, ValueError) as error:
        raise BrtError(f"memory.pin: {path} cannot be read: {error}") from error
    ends = [one["data_offsets"][1] for name, one in entries.items() if name != "__metadata__"]
    if 8 + len(header) + max(ends, default=0) > len(pages):
        raise BrtError(f"memory.pin: {path} is cut off; write it again")
    return entries, 8 + len(header), Home(torch.frombuffer(pages, dtype=torch.uint8), path)
