"""One writer a folder: a lock file that a killed process releases by dying."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from visae.errors import StoreError
from visae.storage.atomic import disk_errors

__all__ = ["exclusive", "is_locked"]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the block.

    Raises:
        StoreError: when another process writes this folder now.
    """
    import filelock

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout as failure:
            raise StoreError(
                "Another process is writing this folder",
                where=folder,
                fix="Wait for it to end, or choose another --out",
            ) from failure
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process writes this folder at this moment; a folder that is read-only is not.

    The lock is held for an instant to find out.
    """
    import filelock

    lock = filelock.FileLock(folder / ".lock", blocking=False)
    if not Path(lock.lock_file).exists() or not os.access(lock.lock_file, os.W_OK):
        return False
    try:
        lock.acquire()
    except filelock.Timeout:
        return True
    lock.release()
    return False
