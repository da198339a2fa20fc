"""Tensors on disk: safetensors files, written atomically, never a pickle."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visae.errors import StoreError, VisaeError
from visae.storage.atomic import atomic_path
from visae.storage.hashing import hash_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FileRef", "file_ref", "read_tensors", "verify_file", "write_tensors"]

_DTYPE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRef:
    """A file of a folder, with what proves it whole."""

    name: str
    """Path relative to the folder, with forward slashes."""
    n_bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the file's bytes."""


def file_ref(folder: Path, name: str) -> FileRef:
    """What proves a file of a folder whole, as it is now."""
    path = folder / name
    return FileRef(name=name, n_bytes=path.stat().st_size, sha256=hash_file(path))


def write_tensors(folder: Path, name: str, tensors: "Mapping[str, Tensor]") -> FileRef:
    """Write named tensors to ``folder/name`` and return what proves the file whole.

    The bytes go from the tensors' own memory to the file: no second copy is made of tensors that
    are contiguous and on the CPU.
    """
    own = _in_file_order(tensors)
    parts: list[bytes | memoryview] = [_header(own), *map(_bytes, own.values())]
    digest, n_bytes = hashlib.sha256(), 0
    with atomic_path(folder / name) as temporary, temporary.open("wb") as file:
        for data in parts:
            digest.update(data)
            n_bytes += file.write(data)
    return FileRef(name=name, n_bytes=n_bytes, sha256=digest.hexdigest())


def _header(tensors: "Mapping[str, Tensor]") -> bytes:
    """What a safetensors file begins with: the length of its JSON, then that, padded with blanks.

    https://github.com/huggingface/safetensors#format
    """
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: "Tensor") -> memoryview:
    """The tensor's own memory."""
    import torch

    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _in_file_order(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors on the CPU, contiguous: the widest numbers first, so that all are aligned."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {n: plain[n] for n in sorted(plain, key=lambda n: (-plain[n].element_size(), n))}


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
