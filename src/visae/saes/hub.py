"""SAEs of the model hub: ``hf://owner/repository[/folder][@revision]`` wherever an SAE is named.

``find_sae`` turns what a user named into a folder on this machine; everything that reads an SAE
asks it first.
"""

from pathlib import Path
from typing import NamedTuple

from visae.errors import CheckpointError
from visae.storage.hub_path import HubPath, is_hub_path
from visae.storage.hub_transfer import fetch_files
from visae.storage.portable import portable

__all__ = ["CHECKPOINT_FILES", "COMPANION_FILES", "FoundSAE", "find_sae"]

CHECKPOINT_FILES = ("sae.json", "sae.safetensors")
"""The files of an SAE."""

COMPANION_FILES = ("report_card.json", "README.md")
"""What may lie beside them."""


class FoundSAE(NamedTuple):
    """An SAE on this machine."""

    folder: Path
    """Folder of its files; not to be written to if it comes from the hub."""
    name: str
    """What to call it: the last step of its path."""
    place: HubPath | None
    """Where on the hub it comes from, at its very commit; None for a folder of one's own."""

    def portable(self, folder: Path) -> str:
        """How files in ``folder`` write where it is."""
        return portable(self.folder, folder) if self.place is None else str(self.place)


def find_sae(location: str | Path) -> FoundSAE:
    """The SAE at a location, fetched from the model hub if it is ``hf://…``.

    Of the hub, only what was not fetched before is downloaded; without a network, the copy that was
    fetched before is used. A folder is not looked into.

    Raises:
        CheckpointError: when the location is no place on the hub, or there is no SAE there, or it
            cannot be fetched and was not fetched before.
    """
    if not is_hub_path(location):
        folder = Path(location)
        return FoundSAE(folder, folder.resolve().name, None)
    asked = HubPath.parse(location, error=CheckpointError)
    fetched = fetch_files(
        asked, required=CHECKPOINT_FILES, optional=COMPANION_FILES, error=CheckpointError
    )
    return FoundSAE(fetched.folder, asked.name, fetched.place)
