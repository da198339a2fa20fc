"""Discovery and confirmation: one division of the images, fixed by their content.

The side of an image follows from a hash of its content id (or of its group) and a salt, so that
it is the same on every machine, in every order, and when images are added. Source: RIGOR §5.
"""

from collections.abc import Sequence
from typing import Literal

from visae.errors import ConfigError
from visae.storage.hashing import hash_bytes

__all__ = ["Split", "split_of", "split_sides"]

Split = Literal["discovery", "confirmation"]


def split_of(key: str, *, confirmation_share: float = 0.5, salt: str = "visae") -> Split:
    """The side that an image's content id, or its group, belongs to."""
    if not 0.0 < confirmation_share < 1.0:
        raise ConfigError(
            f"confirmation_share is {confirmation_share}",
            fix="Give a share above 0 and below 1",
        )
    fraction = int(hash_bytes(f"{salt}:{key}".encode())[:16], 16) / 2**64
    return "confirmation" if fraction < confirmation_share else "discovery"


def split_sides(
    content_ids: Sequence[str],
    groups: Sequence[str | None],
    *,
    confirmation_share: float = 0.5,
    salt: str = "visae",
) -> list[Split]:
    """The side of each image: that of its group, or of its content where it has no group.

    Raises:
        ConfigError: when the share is not between 0 and 1, or when images of equal content belong
            to groups on different sides, so that one image would both choose and confirm.
    """
    sides = [
        split_of(
            image_id if group is None else f"group:{group}",
            confirmation_share=confirmation_share,
            salt=salt,
        )
        for image_id, group in zip(content_ids, groups, strict=True)
    ]
    side_of_content: dict[str, Split] = {}
    for image_id, group, side in zip(content_ids, groups, sides, strict=True):
        if side_of_content.setdefault(image_id, side) != side:
            raise ConfigError(
                "The same image occurs in two groups, one for discovery and one for confirmation",
                where=f"content {image_id}, group {group}",
                fix="Remove one of the copies, or give both the same group",
            )
    return sides
