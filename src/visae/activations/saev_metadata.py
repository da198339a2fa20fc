"""The two JSON files of a saev shard folder, checked: what was recorded, and in which files."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visae.errors import StoreError
from visae.storage.records import read_json

__all__ = ["SaevMetadata", "read_saev_metadata"]

_PROTOCOL = "2.1"
_TYPES: dict[str, type] = {
    "family": str,
    "ckpt": str,
    "layers": list,
    "content_tokens_per_example": int,
    "cls_token": bool,
    "d_model": int,
    "n_examples": int,
    "dtype": str,
}
_SHARD_NAME = re.compile(r"acts\d{6}\.bin")
_ALTERED = "It was altered or cut short: copy or record it again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaevMetadata:
    """What a shard folder of saev says about itself."""

    family: str
    """Kind of model: ``clip``, ``dinov2``, …"""
    ckpt: str
    """Name of its checkpoint."""
    layers: tuple[int, ...]
    """The recorded layers, ascending, in the order in which the files have them."""
    content_tokens_per_example: int
    """Patches of an image."""
    cls_token: bool
    """Whether a class token comes before the patches."""
    d_model: int
    """Width of the activations."""
    n_examples: int
    """Images."""
    shards: tuple[tuple[str, int], ...]
    """Name and number of images of each file, in order."""

    @property
    def tokens_per_example(self) -> int:
        """Tokens of an image, the class token included."""
        return self.content_tokens_per_example + self.cls_token

    @property
    def image_bytes(self) -> int:
        """Bytes of an image at one layer."""
        return self.tokens_per_example * self.d_model * 4


def read_saev_metadata(folder: Path) -> SaevMetadata:
    """Read ``metadata.json`` and ``shards.json``; the pickle in the former stays text.

    Raises:
        StoreError: when one is missing, damaged or of another protocol; when images are missing;
            when the layers are listed out of order.
    """
    path = folder / "metadata.json"
    found = read_json(path, error=StoreError)
    if not isinstance(found, dict):
        raise StoreError("This is not saev's description of shards", where=path, fix=_ALTERED)
    _check_protocol(found, path)
    for name, kind in _TYPES.items():
        if type(found.get(name)) is not kind:
            what = f"{name} is {found.get(name)!r}, which saev does not write"
            raise StoreError(what, where=path, fix=_ALTERED)
    if found["dtype"] != "float32":
        what = f"The number format is {found['dtype']}; saev's protocol has float32 only"
        raise StoreError(what, where=path, fix="Record it again")
    metadata = SaevMetadata(
        family=found["family"],
        ckpt=found["ckpt"],
        layers=_layers(found["layers"], path),
        content_tokens_per_example=found["content_tokens_per_example"],
        cls_token=found["cls_token"],
        d_model=found["d_model"],
        n_examples=found["n_examples"],
        shards=_shards(folder / "shards.json"),
    )
    _check_sizes(metadata, path)
    return metadata


def _check_protocol(found: Mapping[str, Any], path: Path) -> None:
    protocol = found.get("protocol")
    if protocol != _PROTOCOL:
        raise StoreError(
            f"This folder is of protocol {protocol}; only saev's protocol {_PROTOCOL} is read",
            where=path,
            fix="Record it again, with a newer saev or with visae record",
        )


def _layers(layers: list[Any], path: Path) -> tuple[int, ...]:
    """The layers, which must ascend.

    saev's recorder stores layers in the order in which the network runs them, whatever the order
    they are listed in: of an unsorted list the labels are wrong.
    """
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise StoreError(f"The layers are {layers}", where=path, fix=_ALTERED)
    if any(a >= b for a, b in itertools.pairwise(layers)):
        raise StoreError(
            f"The layers are listed out of order ({layers}): saev stores them in the network's "
            "order under these labels, so that which is which is unknown",
            where=path,
            fix="If saev recorded this folder, sort the list in metadata.json; else record again",
        )
    return tuple(layers)


def _shards(path: Path) -> tuple[tuple[str, int], ...]:
    found = read_json(path, error=StoreError)
    shards = []
    for index, entry in enumerate(found if isinstance(found, list) else [None]):
        name = entry.get("name") if isinstance(entry, dict) else None
        n_images = entry.get("n_examples") if isinstance(entry, dict) else None
        is_name = isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None
        if not is_name or type(n_images) is not int or n_images < 0:
            raise StoreError(f"Entry {index} is {entry!r}", where=path, fix=_ALTERED)
        shards.append((str(name), n_images))
    return tuple(shards)


def _check_sizes(metadata: SaevMetadata, path: Path) -> None:
    sizes = metadata.content_tokens_per_example, metadata.d_model, metadata.n_examples
    if min(sizes) < 1:
        what = f"Patches, width and images are {sizes}"
        raise StoreError(what, where=path, fix=_ALTERED)
    listed = sum(n_images for _, n_images in metadata.shards)
    if listed != metadata.n_examples:
        raise StoreError(
            f"The shards hold {listed} of {metadata.n_examples} images",
            where=path.parent / "shards.json",
            fix="The recording was interrupted: record it again with saev, which starts anew",
        )
