"""Progress of long work, told through one injected callback; the command line draws it."""

import dataclasses
from collections.abc import Callable

__all__ = ["Progress", "ProgressCallback", "silent", "size_text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one stage of a long piece of work has come."""

    stage: str
    """What is being done: ``record``, ``train``, …"""
    done: int
    """Units finished so far, those of an earlier, interrupted run included."""
    total: int
    """Units in all."""
    unit: str
    """What is counted: ``images``, ``tokens``, ``draws``."""
    note: str = ""
    """Figures of the moment, ready to show."""


ProgressCallback = Callable[[Progress], None]
"""Called from the working thread; must return quickly and never raise."""


def silent(_progress: Progress) -> None:
    """Show nothing."""


def size_text(n_bytes: int) -> str:
    """So many bytes in the unit that suits them: ``2.46 GB``, ``310.4 MB``, ``0 kB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.4g} {unit}"
    return f"{n_bytes / 1e3:.4g} kB"
