"""Safetensors files with a format, a schema and a digest in their header: whole, or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brt.errors import BrtError
from brt.files import atomic_write


@dataclass(frozen=True)
class SealedFormat:
    """One kind of file.

    Attributes:
        name: that stands in the file.
        schema: raised whenever files of before can no longer be read as they are.
        key: of the header's text.
        error: what reading raises.
        written_by: in words, for who gives another file.
        otherwise: what to do with a file of another schema.
    """

    name: str
    schema: int
    key: str
    error: type[BrtError]
    written_by: str
    otherwise: str

    def save(self, path: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a text and tensors, at once or not at all."""
        metadata = {
            "format": self.name,
            "schema": str(self.schema),
            "digest": digest(text, tensors),
            self.key: text,
        }
        with atomic_write(path) as beside:
            save_file(dict(tensors), beside, metadata)

    def load(self, path: Path) -> tuple[str, dict[str, Tensor]]:
        """The text and the tensors that `save` wrote."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise self.error(f"load: {path} cannot be read: {error}") from error
        if metadata.get("format") != self.name:
            raise self.error(f"load: {path} is no {self.key}; {self.written_by} writes them")
        if metadata.get("schema") != str(self.schema):
            raise self.error(
                f"load: {path} has schema {metadata.get('schema')}, this brt reads {self.schema}; "
                f"{self.otherwise}"
            )
        text = metadata.get(self.key, "")
        if metadata.get("digest") != digest(text, tensors):
            raise self.error(f"load: {path} is damaged: its digest is not that of its content")
        return text, tensors


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and named tensors."""
    made = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.numpy().tobytes())
    return made.hexdigest()
