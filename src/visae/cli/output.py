"""What the command line draws: lines, tables, and progress with rate and time left."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from visae.progress import Progress

__all__ = ["Screen"]

_SECONDS_BETWEEN_LINES = 10.0
_LOG = logging.getLogger("visae")


class Screen:
    """Standard output for results, standard error for progress and complaints."""

    def __init__(self) -> None:
        self._out = Console(soft_wrap=True, highlight=False)
        self._err = Console(stderr=True, soft_wrap=True, highlight=False)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            disable=not self._err.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._last_line = 0.0
        self._log_lines = _LogLines(self._err)

    def __enter__(self) -> "Screen":
        self._bars.start()
        _LOG.addHandler(self._log_lines)
        _LOG.setLevel(logging.INFO)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _LOG.removeHandler(self._log_lines)
        self._bars.stop()

    def say(self, text: Any = "") -> None:
        """Print a line or a table."""
        self._out.print(text, markup=False)

    def complain(self, text: str) -> None:
        """Print an error, as one paragraph."""
        self._err.print(f"visae: {text}", markup=False, style="bold" if sys.stderr.isatty() else "")

    def progress(self, now: Progress) -> None:
        """Draw progress: a bar on a terminal, else a line every ten seconds."""
        key = f"{now.stage} {now.unit}"
        moment = time.monotonic()
        if key not in self._begun or now.done < self._begun[key][1]:
            self._begun[key] = (moment, now.done)
        since, first = self._begun[key]
        rate = (now.done - first) / max(1e-6, moment - since)
        figures = f"{now.done:,}/{now.total:,} {now.unit}"
        if rate > 0:
            figures += f", {rate:,.0f}/s" if rate >= 10 else f", {rate:.1f}/s"
        if now.note:
            figures += f", {now.note}"
        if self._err.is_terminal:
            self._draw(key, now, figures)
        elif moment - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = moment
            left = f", {(now.total - now.done) / rate:.0f} s left" if rate > 0 else ""
            self._err.print(f"{now.stage}: {figures}{left}", markup=False)

    def _draw(self, key: str, now: Progress, figures: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(now.stage, total=now.total, figures=figures)
        self._bars.update(
            self._tasks[key],
            completed=now.done,
            total=now.total,
            figures=figures,
            visible=now.done < now.total,
        )


class _LogLines(logging.Handler):
    """Shows what the library logs, each line once."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console, self._shown = console, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if text not in self._shown:
            self._shown.add(text)
            self._console.print(text, markup=False)
