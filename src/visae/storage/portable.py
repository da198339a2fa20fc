"""Paths inside files: relative within a workspace, so that a workspace can be moved."""

import os
from pathlib import Path

__all__ = ["portable", "resolve_portable"]


def portable(path: Path, folder: Path) -> str:
    """How ``folder``'s files should write ``path``: relative if both share a workspace.

    The workspace of ``workspace/activations/name`` is two folders up (never the root of the file
    system). Paths outside it are written absolute: moving the workspace does not move them.
    """
    target, base = path.resolve(), folder.resolve()
    workspace = next((up for up in (*base.parents[1::-1], base) if up != up.parent), base)
    if target.is_relative_to(workspace):
        return Path(os.path.relpath(target, base)).as_posix()
    return target.as_posix()


def resolve_portable(text: str, folder: Path) -> Path:
    """The absolute path that a file in ``folder`` means by ``text``."""
    return Path(os.path.normpath(folder.resolve() / text))
