"""``open_store``: a folder of activations, whichever toolkit wrote it."""

from pathlib import Path

from visae.activations.saev_shards import SaevShards
from visae.activations.store import ActivationStore

__all__ = ["open_store"]


def open_store(folder: Path) -> ActivationStore | SaevShards:
    """The activation store in a folder, or a shard folder of saev (read-only).

    Raises:
        StoreError: when there is neither, or it is incomplete or altered.
    """
    folder = Path(folder)
    is_saev = (folder / "metadata.json").is_file() and not (folder / "store.json").exists()
    return SaevShards(folder) if is_saev else ActivationStore(folder)
