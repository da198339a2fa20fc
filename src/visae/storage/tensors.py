"""Tensors on disk: safetensors files, written atomically, never a pickle."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visae.errors import StoreError, VisaeError
from visae.storage.atomic import write_bytes
from visae.storage.hashing import hash_bytes, hash_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FileRef", "read_tensors", "verify_file", "write_tensors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRef:
    """A file of a folder, with what proves it whole."""

    name: str
    """Path relative to the folder, with forward slashes."""
    n_bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the file's bytes."""


def write_tensors(folder: Path, name: str, tensors: "Mapping[str, Tensor]") -> FileRef:
    """Write named tensors to ``folder/name`` and return what proves the file whole."""
    from safetensors.torch import save

    data = save(_own_storages(tensors))
    write_bytes(folder / name, data)
    return FileRef(name=name, n_bytes=len(data), sha256=hash_bytes(data))


def _own_storages(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors on the CPU, contiguous, and copied where two share memory."""
    own: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        own[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return own


def read_tensors(path: Path, *, error: type[VisaeError] = StoreError) -> "dict[str, Tensor]":
    """Read every tensor of a safetensors file.

    Raises:
        VisaeError: of type ``error``, when the file is missing, cut short or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as failure:
        raise error("A file is missing", where=path, fix="Make it again or restore it") from failure
    except (SafetensorError, OSError) as failure:
        raise error(
            f"This is not a whole safetensors file: {failure}",
            where=path,
            fix="It was altered or cut short: make it again or restore it",
        ) from failure


def verify_file(folder: Path, ref: FileRef, *, error: type[VisaeError] = StoreError) -> None:
    """Raise ``error`` unless the file has the recorded size and checksum."""
    path = folder / ref.name
    if not path.is_file():
        raise error("A file is missing", where=path, fix="Make it again or restore it")
    n_bytes = path.stat().st_size
    if n_bytes != ref.n_bytes:
        what = f"This file has {n_bytes} bytes instead of {ref.n_bytes}"
        raise error(what, where=path, fix="It was cut short: make it again or restore it")
    if hash_file(path) != ref.sha256:
        what = "This file's checksum differs from the recorded one"
        raise error(what, where=path, fix="It was altered: make it again or restore it")
