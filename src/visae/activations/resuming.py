"""The command line that completes, or repeats, a recording: reconstructed from ``store.json``."""

import shlex
from pathlib import Path

from visae.activations.format import StoreRecord
from visae.images.location import replace_path
from visae.storage.portable import resolve_portable

__all__ = ["images_per_shard", "record_command", "recorded_location"]

_MIB = 2**20
_DEFAULT_SHARD_MB = 64


def images_per_shard(shard_bytes: int, bytes_per_image: int) -> int:
    """Images of a shard whose file is to have about so many bytes: 16 to 1024."""
    return max(16, min(1024, shard_bytes // bytes_per_image))


def recorded_location(record: StoreRecord, folder: Path) -> str:
    """Where the recorded images were, a path relative to the store made absolute."""
    return replace_path(record.images, lambda path: str(resolve_portable(path, folder)))


def record_command(record: StoreRecord, folder: Path) -> str:
    """The ``visae record`` line that resumes this recording, with paths made absolute."""
    options: dict[str, object] = {
        "images": recorded_location(record, folder),
        "model": record.model,
        "weights": None if record.weights is None else resolve_portable(record.weights, folder),
        "revision": record.revision,
        "image-size": record.image_size,
        "title": record.identity.title,
    }
    words = ["visae", "record"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    words += ["--site", *(site.name for site in record.sites), "--tokens", record.tokens]
    words += ["--dtype", record.dtype]
    if record.precision != "float32":
        words += ["--precision", record.precision]
    if (shard_mb := _shard_mb(record)) != _DEFAULT_SHARD_MB:
        words += ["--shard-mb", str(shard_mb)]
    return shlex.join([*words, "--out", str(folder.resolve())])


def _shard_mb(record: StoreRecord) -> int:
    """A ``--shard-mb`` that gives shards of as many images; the default where that does."""
    sizes = [site.bytes_per_image(record.tokens, record.dtype) for site in record.sites]
    per_image = sum(sizes) // len(sizes)
    if images_per_shard(_DEFAULT_SHARD_MB * _MIB, per_image) == record.images_per_shard:
        return _DEFAULT_SHARD_MB
    return max(1, -(-record.images_per_shard * per_image // _MIB))
