"""Rows that come one after another, asked for by number.

Threads that read ahead ask for rows a little out of order: the rows just passed are kept for them.
Going far back starts the stream again.
"""

import collections
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, final

from visae.errors import ImageError, VisaeError

__all__ = ["RowStream"]

_N_KEPT = 64
_N_READ_OVER = 1000


@final
class RowStream:
    """Rows of a ``datasets.IterableDataset`` by their number, one process and any of its threads.

    In order, or up to 64 rows out of order, each row is read once. A row further back costs reading
    from the start; one far ahead costs reading what lies between. A copy sent to another process
    starts a stream of its own.

    Args:
        rows: What is iterated, with ``skip``.
        where: Name of the dataset in errors.
    """

    def __init__(self, rows: Any, *, where: str) -> None:
        self._rows, self._where = rows, where
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[int, Mapping[str, Any]] = collections.OrderedDict()
        self._iterator: Iterator[Mapping[str, Any]] | None = None
        self._next = 0
        self._end: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """The rows and their name; no place in them."""
        return functools.partial(RowStream, where=self._where), (self._rows,)

    def row(self, number: int) -> Mapping[str, Any]:
        """One row.

        Raises:
            ImageError: when the stream ends before this row.
            VisaeError: when the stream breaks off. This is not the fault of one image, so that a
                run stops here and goes on later, rather than skipping all that follow.
        """
        with self._lock:
            if number in self._kept:
                return self._kept[number]
            if self._end is not None and number >= self._end:
                raise self._no_row(number)
            if not 0 <= number - self._next < _N_READ_OVER:
                self._iterator = None
                self._next = number
            while self._next <= number:
                self._keep(self._read(number))
            return self._kept[number]

    def _keep(self, row: Mapping[str, Any]) -> None:
        self._kept[self._next] = row
        self._next += 1
        if len(self._kept) > _N_KEPT:
            self._kept.popitem(last=False)

    def _read(self, wanted: int) -> Mapping[str, Any]:
        """The next row of the stream, which is opened where it is not."""
        try:
            if self._iterator is None:
                self._iterator = iter(self._rows.skip(self._next))
            return next(self._iterator)
        except StopIteration as failure:
            self._iterator = None
            self._end = self._next
            raise self._no_row(wanted) from failure
        except (OSError, RuntimeError, ValueError) as failure:
            self._iterator = None
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            raise VisaeError(
                f"The stream broke off at row {self._next}: {lines[0].rstrip('.')[:200]}",
                where=self._where,
                fix="Run the same command again: it goes on from what was finished",
            ) from failure

    def _no_row(self, number: int) -> ImageError:
        what = f"The stream ends before row {number}"
        return ImageError(what, where=self._where, fix="Give the number of its rows with ?n=")
