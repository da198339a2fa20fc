"""Shards written behind the model's back, and how far a recording has come."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import final

from visae.activations.format import StoreRecord
from visae.activations.planning import bytes_to_write
from visae.activations.shard_buffer import ShardBuffer
from visae.activations.summing import add_ready
from visae.distributed import Ranks
from visae.progress import Progress, ProgressCallback, size_text

__all__ = ["Meter", "ShardWriter"]


@final
class Meter:
    """Counts images and bytes over all ranks; the first rank tells of them."""

    def __init__(
        self, plan: StoreRecord, missing: Sequence[int], ranks: Ranks, progress: ProgressCallback
    ) -> None:
        self._total = plan.n_images_in_source
        self._n_before = self._total - sum(plan.n_listed(index) for index in missing)
        self._n_bytes_left = bytes_to_write(plan, list(missing))
        self._ranks, self._progress = ranks, progress

    def add_images(self, n_images: int) -> None:
        """Tell of more images that were run or skipped."""
        if not n_images:
            return
        done = self._n_before + self._ranks.count("images", n_images)
        written = self._ranks.count("bytes", 0)
        if self._ranks.is_first:
            note = f"{size_text(written)} of {size_text(self._n_bytes_left)} written"
            self._progress(
                Progress(stage="record", done=done, total=self._total, unit="images", note=note)
            )

    def add_bytes(self, n_bytes: int) -> None:
        """Count what was written."""
        self._ranks.count("bytes", n_bytes)


@final
class ShardWriter:
    """Writes shards in a thread of its own, one at a time, while the model goes on.

    However the block ends, the shard under way is written first. On the first rank it also adds
    up the statistics of the shards that are written.
    """

    def __init__(self, out: Path, plan: StoreRecord, meter: Meter, *, adds_up: bool) -> None:
        self._out, self._plan, self._meter, self._adds_up = out, plan, meter, adds_up
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[int] | None = None

    def write(self, shard: ShardBuffer) -> None:
        """Write a shard as soon as the one before it is written.

        Raises:
            VisaeError: what stopped the shard before it.
        """
        self._finish()
        self._writing = self._thread.submit(self._write, shard)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self._finish()

    def _write(self, shard: ShardBuffer) -> int:
        n_bytes = shard.write(self._out)
        if self._adds_up:
            add_ready(self._out, self._plan)
        return n_bytes

    def _finish(self) -> None:
        if self._writing is not None:
            self._meter.add_bytes(self._writing.result())
            self._writing = None
