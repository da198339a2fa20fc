"""Places on the model hub: ``hf://owner/repository[/folder][@revision]``."""

import dataclasses
import re
from pathlib import Path, PurePosixPath

from visae.errors import ConfigError, VisaeError

__all__ = ["HubPath", "is_hub_path"]

_FORM = "Write hf://owner/repository, hf://owner/repository/folder or either with @revision"
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_STEP = re.compile(r"(?!\.+$)[\w.+=-]+", re.ASCII)
_REVISION = re.compile(r"(?!/)(?!.*(//|\.\.))[\w./+-]+(?<!/)", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubPath:
    """A folder of a repository of the model hub."""

    repository: str
    """``owner/name``."""
    folder: str = ""
    """Folder in the repository, with forward slashes; empty: the repository itself."""
    revision: str | None = None
    """Commit, tag or branch; unset: the newest state."""

    @classmethod
    def parse(cls, text: str | Path, *, error: type[VisaeError] = ConfigError) -> "HubPath":
        """The place that a text stands for; of a ``Path``, which folds the slashes, too.

        Raises:
            VisaeError: of type ``error``, when the text has another form.
        """
        place, at, revision = re.sub("^hf://?", "", str(text)).partition("@")
        steps = place.split("/")
        repository, folder = "/".join(steps[:2]), "/".join(steps[2:])
        well_formed = is_hub_path(text) and _is_repository(repository)
        well_formed &= all(_STEP.fullmatch(step) for step in steps[2:])
        well_formed &= not at or _REVISION.fullmatch(revision) is not None
        if not well_formed:
            raise error("This is no place on the model hub", where=text, fix=_FORM)
        return cls(repository=repository, folder=folder, revision=revision or None)

    @property
    def name(self) -> str:
        """The last step: what to call the thing that is there."""
        return PurePosixPath(self.repository, self.folder).name

    def file(self, name: str) -> str:
        """The path of one of the folder's files in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def at(self, revision: str) -> "HubPath":
        """The same place at another revision."""
        return dataclasses.replace(self, revision=revision)

    def __str__(self) -> str:
        """The text that parses to this place."""
        folder = f"/{self.folder}" if self.folder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{folder}{revision}"


def is_hub_path(location: str | Path) -> bool:
    """Whether a location is meant for the model hub; a ``Path`` folds ``hf://`` into ``hf:/``."""
    return str(location).startswith(("hf://", "hf:/"))


def _is_repository(text: str) -> bool:
    return (
        _REPOSITORY.fullmatch(text) is not None
        and len(text) <= 96
        and not text.endswith((".git", ".", "-"))
    )
