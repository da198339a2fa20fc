"""Copy an SAE of the model hub into a folder of one's own."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visae.errors import CheckpointError
from visae.saes.checkpoint import load_sae
from visae.saes.hub import CHECKPOINT_FILES, COMPANION_FILES, FoundSAE, find_sae
from visae.storage.atomic import atomic_folder

__all__ = ["pull_sae"]


def pull_sae(location: str, out: Path, *, kinds: Sequence[type[Any]] = ()) -> FoundSAE:
    """Copy the SAE at ``hf://…``, with its report card if it has one, into the new folder ``out``.

    The copy appears whole, after it has reproduced its reference codes, or not at all. ``kinds``
    are your own sparsity kinds, besides the built-in ones.

    Raises:
        CheckpointError: when there is something in ``out``, or the SAE cannot be fetched, does not
            reproduce its own codes or is of an unknown kind.
        StoreError: when ``out`` cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "There is something here already", where=out, fix="Give the name of a new folder"
        )
    found = find_sae(location)
    load_sae(found.folder, kinds=kinds)
    with atomic_folder(out) as copy:
        for name in (*CHECKPOINT_FILES, *COMPANION_FILES):
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, copy / name)
    return found
