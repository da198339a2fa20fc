"""Files to and from the model hub: a folder of a repository down, one commit up.

Both ask first whether the hub answers at all (``visae.storage.hub``), so that nothing waits for a
network that is not there. What is fetched lies in the hub client's own cache, one folder a commit.

Main names: ``fetch_files``, ``commit_files``.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from visae.errors import VisaeError
from visae.storage.hub import first_lines, hub_access, hub_failures
from visae.storage.hub_path import HubPath

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["CommitPlan", "Committed", "Fetched", "commit_files", "fetch_files"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOG_IN = "Log in with: hf auth login, or set HF_TOKEN to a token that may do it"


class Fetched(NamedTuple):
    """A folder of the hub on this machine."""

    folder: Path
    """Where its files are; not to be changed."""
    place: HubPath
    """Where they come from, at their very commit."""


class Committed(NamedTuple):
    """One commit on the hub."""

    place: HubPath
    """The folder, at the commit."""
    url: str
    """The commit's page."""


def fetch_files(
    place: HubPath,
    *,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    error: type[VisaeError],
) -> Fetched:
    """Fetch some files of a folder into the hub client's cache.

    A hub that does not answer within seconds is left alone, and the files are taken from the cache;
    so they are for a revision that is a commit, which never changes.

    Raises:
        VisaeError: of type ``error``, when there is no such repository, revision or required file,
            when it may not be read, or when the hub cannot be reached and the cache lacks it.
    """
    if _COMMIT.fullmatch(place.revision or ""):
        cached = _fetch(place, (*required, *optional), only_cached=True)
        if cached is not None and not _missing(cached, required):
            return cached
    with _hub_errors(place, error) as online:
        fetched = _fetch(place, (*required, *optional), only_cached=not online)
    missing = list(required) if fetched is None else _missing(fetched, required)
    if fetched is not None and not missing:
        return fetched
    if not online:
        raise _unreachable(place, "there is no copy on this machine", error)
    what = f"There is no {' and no '.join(missing)} here"
    fix = "Check the name and the folder: hf://owner/repository/folder@revision"
    raise error(what, where=place, fix=fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommitPlan:
    """What one commit puts where."""

    place: HubPath
    """The folder; the commit builds on the newest state, whatever revision this says."""
    files: Mapping[str, bytes | Path]
    """Content by path in the repository."""
    unless_there: Mapping[str, bytes]
    """The same, for files that are left alone if they are there."""
    stale: tuple[str, ...] = ()
    """Paths that the commit deletes if they are there."""
    private: bool = False
    """Only those whom the owner lets in may read the repository."""
    message: str
    """The commit's first line."""


def commit_files(plan: CommitPlan, *, error: type[VisaeError]) -> Committed:
    """Make one commit, in a new repository if there is none.

    Raises:
        VisaeError: of type ``error``, when nobody is logged in or the hub refuses, when the hub
            cannot be reached, when the repository is public and was to be private, or when someone
            else commits meanwhile. No file is changed then.
    """
    with _hub_errors(plan.place, error) as online:
        made = _commit(plan, error) if online else None
    if made is None:
        raise _unreachable(plan.place, "nothing was published", error)
    return made


def _commit(plan: CommitPlan, error: type[VisaeError]) -> Committed:
    from huggingface_hub import HfApi, constants, get_token

    if get_token() is None:
        raise error("Nobody is logged in to the model hub", where=plan.place, fix=_LOG_IN)
    api = HfApi(endpoint=constants.ENDPOINT, library_name="visae")
    parent = _ready_repository(api, plan, error)
    made = api.create_commit(
        plan.place.repository,
        _operations(api, plan, parent),
        commit_message=plan.message,
        parent_commit=parent,
    )
    return Committed(plan.place.at(made.oid), made.commit_url)


def _fetch(place: HubPath, names: tuple[str, ...], *, only_cached: bool) -> Fetched | None:
    """What there is of some files; None where the cache was asked and knows nothing."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        snapshot = snapshot_download(
            place.repository,
            revision=place.revision,
            allow_patterns=[place.file(name) for name in names],
            cache_dir=constants.HF_HUB_CACHE,
            endpoint=constants.ENDPOINT,
            local_files_only=only_cached,
            library_name="visae",
        )
    except errors.LocalEntryNotFoundError:
        if not only_cached:
            raise
        return None
    return Fetched(Path(snapshot) / place.folder, place.at(Path(snapshot).name))


def _missing(fetched: Fetched, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not (fetched.folder / name).is_file()]


def _ready_repository(api: "HfApi", plan: CommitPlan, error: type[VisaeError]) -> str | None:
    """The commit to build on, in a repository that is made if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name = plan.place.repository
    try:
        found = api.repo_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=plan.private)
        found = api.repo_info(name)
    if plan.private and not found.private:
        raise error(
            "This repository is public, and was to be private",
            where=plan.place,
            fix="Choose another repository, make it private on its page, or leave --private out",
        )
    return found.sha


def _operations(
    api: "HfApi", plan: CommitPlan, parent: str | None
) -> "list[CommitOperationAdd | CommitOperationDelete]":
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    asked = [*plan.unless_there, *(path for path in plan.stale if path not in plan.files)]
    there = api.get_paths_info(plan.place.repository, asked, revision=parent) if asked else []
    known = {entry.path for entry in there}
    files = {**{p: c for p, c in plan.unless_there.items() if p not in known}, **plan.files}
    return [
        *(CommitOperationAdd(p, c if isinstance(c, bytes) else str(c)) for p, c in files.items()),
        *(CommitOperationDelete(path) for path in plan.stale if path in known),
    ]


@contextlib.contextmanager
def _hub_errors(place: HubPath, error: type[VisaeError]) -> Iterator[bool]:
    """Whether the hub answers; what it refuses inside the block is said in our words."""
    from huggingface_hub import errors

    try:
        with hub_access() as online:
            yield online
    except errors.GatedRepoError as failure:
        what = "This repository may be read by those only whom its owners let in"
        fix = "Ask for access on its page on the hub, then log in with: hf auth login"
        raise error(what, where=place, fix=fix) from failure
    except errors.RepositoryNotFoundError as failure:
        what = "The model hub has no such repository, or shows it to those only whom it knows"
        fix = "Correct the name; for a private one log in with: hf auth login"
        raise error(what, where=place, fix=fix) from failure
    except errors.RevisionNotFoundError as failure:
        what = f"{place.repository} has no revision {place.revision or 'main'}"
        fix = "Give a commit, tag or branch of the repository"
        raise error(what, where=place, fix=fix) from failure
    except errors.HfHubHTTPError as failure:
        raise _refused(place, failure, error) from failure
    except hub_failures() as failure:
        what = f"The model hub broke off: {first_lines(failure)}"
        raise error(what, where=place, fix="Try again") from failure
    except (RuntimeError, ValueError) as failure:  # a failed upload, a card of another form
        what = f"The model hub did not take it: {first_lines(failure)}"
        raise error(what, where=place, fix="Mend what it names, or try again") from failure


def _refused(place: HubPath, failure: "HfHubHTTPError", error: type[VisaeError]) -> VisaeError:
    status = failure.response.status_code
    if status in (401, 403):
        what = "The model hub does not let this token do that"
        return error(what, where=place, fix=_LOG_IN)
    if status in (409, 412):
        what = "Someone else changed the repository at the same moment"
        return error(what, where=place, fix="Try again")
    what = f"The model hub refused with status {status}: {first_lines(failure)}"
    return error(what, where=place, fix="Do what it says, or try again later")


def _unreachable(place: HubPath, so: str, error: type[VisaeError]) -> VisaeError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what, fix = f"HF_HUB_OFFLINE is set, and {so}", "Unset HF_HUB_OFFLINE"
    else:
        what = f"The model hub at {constants.ENDPOINT} cannot be reached, and {so}"
        fix = "Check the network, or HF_ENDPOINT where you use a mirror"
    return error(what, where=place, fix=fix)
