"""The files of a model: a folder on this machine, or a repository on the hub, one file at a time.

A repository's files are fetched into the hub client's own cache; the folder they lie in there is
named after the commit, which is how the revision of a model is known.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visae.errors import ModelError
from visae.storage.hub import first_lines, hub_access, hub_failures

__all__ = ["ModelFiles", "hub_files", "local_files", "read_json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where the files of one model are."""

    name: str
    """``owner/name`` on the hub, or the name of the folder."""
    folder: Path
    """Where the files are, as far as they are on this machine."""
    repository: str | None = None
    """The hub's repository, where there is one."""
    revision: str | None = None
    """Commit of that repository."""

    def find(self, *names: str) -> Path | None:
        """The first of some files that there is, fetched from the hub if need be.

        Raises:
            ModelError: when the hub has it but it could not be downloaded.
        """
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
            if self.repository is not None:
                fetched = _fetch(self.repository, name, self.revision)
                if fetched is not None:
                    return fetched
        return None

    def require(self, *names: str, fix: str) -> Path:
        """As ``find``, for files of which the model needs one.

        Raises:
            ModelError: when none is there, with what to do.
        """
        found = self.find(*names)
        if found is None:
            raise ModelError(f"{self.name} has no {' or '.join(names)}", where=self.folder, fix=fix)
        return found


def local_files(folder: Path) -> ModelFiles:
    """The files of a folder on this machine."""
    return ModelFiles(name=folder.resolve().name, folder=folder)


@contextlib.contextmanager
def hub_files(
    repository: str, *, revision: str | None, first: tuple[str, ...]
) -> Iterator[ModelFiles]:
    """The files of a hub's repository, found by one of some files that it must have.

    Inside the block the hub client waits for nothing if the hub does not answer.

    Raises:
        ModelError: when the hub cannot be reached and its cache lacks the file, when there is no
            such repository, revision or file, or when it may not be read.
    """
    with hub_access() as online:
        found = (_fetch(repository, name, revision) for name in first)
        path = next((path for path in found if path is not None), None)
        if path is None:
            what = (
                f"{repository} has no {' or '.join(first)}"
                if online
                else f"{repository} is not in the local cache and the model hub cannot be reached"
            )
            raise ModelError(
                what,
                where="--model",
                fix="Connect to the network, or give a local folder as the model"
                if not online
                else "Choose a repository made for this adapter",
            )
        folder = path.parent
        yield ModelFiles(
            name=repository, folder=folder, repository=repository, revision=folder.name
        )


def _fetch(repository: str, file: str, revision: str | None) -> Path | None:
    """A file of a repository; None where the repository, or without a hub the cache, lacks it."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except errors.EntryNotFoundError as failure:
        if constants.HF_HUB_OFFLINE or isinstance(failure, errors.RemoteEntryNotFoundError):
            return None
        raise _broken_off(repository, file, failure) from failure
    except errors.GatedRepoError as failure:
        raise ModelError(
            f"{repository} may be read by those only whom its owners let in",
            where="--model",
            fix="Ask for access on its page on the hub, then log in with: hf auth login",
        ) from failure
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as failure:
        raise ModelError(
            f"The model hub has no repository {repository}", where="--model", fix="Correct the name"
        ) from failure
    except errors.RevisionNotFoundError as failure:
        raise ModelError(
            f"{repository} has no revision {revision}",
            where="--revision",
            fix="Give a commit, tag or branch of the repository",
        ) from failure
    except hub_failures() as failure:
        raise _broken_off(repository, file, failure) from failure


def _broken_off(repository: str, file: str, failure: Exception) -> ModelError:
    return ModelError(
        f"{file} of {repository} could not be downloaded: {first_lines(failure)}",
        where="--model",
        fix="Try again, or give a local folder as the model",
    )


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file of a model holds.

    Raises:
        ModelError: when it is no JSON, or holds no table.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise ModelError(
            f"This file cannot be read: {failure}", where=path, fix="Restore the model's own file"
        ) from failure
    if not isinstance(found, dict):
        raise ModelError(
            "This file holds no table of keys", where=path, fix="Restore the model's own file"
        )
    return found
