"""What the doctor says of one thing."""

import dataclasses

__all__ = ["Finding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    what: str
    """The thing."""
    is_fine: bool
    """Whether it is as it should be."""
    detail: str
    """What it is, or what is wrong and what to do."""
