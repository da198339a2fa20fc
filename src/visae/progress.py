"""Progress of long work, told through one injected callback; the command line draws it."""

import dataclasses
from collections.abc import Callable

__all__ = ["Progress", "ProgressCallback", "silent"]


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
