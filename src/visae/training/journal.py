"""What a group's steps have shown, written down: ``metrics.jsonl``, trackers, progress, rates."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from visae.activations.filling import TokenBatch
from visae.progress import Progress, ProgressCallback
from visae.saes.losses import BatchLoss
from visae.training.jobs import Group
from visae.training.metrics import append_metrics
from visae.training.tracking import Tracker, open_tracker
from visae.training.trainee import StepFigures, Trainee

__all__ = ["Journal"]


class Journal:
    """Keeps the time of a group's steps, and writes their figures every few steps.

    Used as a context, at whose end its trackers are closed.

    Raises:
        ConfigError: when the tracker asked for is not installed.
    """

    def __init__(self, group: Group, step: int, progress: ProgressCallback) -> None:
        now = time.monotonic()
        self._group, self._progress = group, progress
        self._lap, self._lap_step, self._waited, self._saved = now, step, 0.0, now
        self._open = contextlib.ExitStack()
        self._trackers = self._start_trackers(step)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def wait(self, batches: Iterator[TokenBatch]) -> TokenBatch:
        """The next batch, its waiting time counted."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def write(self, step: int, tokens: Mapping[str, Tensor], losses: Sequence[BatchLoss]) -> None:
        """Write what a step has shown of every SAE that learns, if it is one of those to write."""
        config = self._group.config
        if step % config.log_steps and step != config.n_steps:
            return
        pace = self._pace(step)
        shown = []
        for (job, trainee), loss in zip(self._group.learners, losses, strict=True):
            figures = trainee.figures(loss, tokens[job.wanted_site])
            line = _figures(trainee, figures, step) | pace
            place = {"step": step, "tokens": step * config.batch_size}
            if self._group.share.ranks.is_first:
                append_metrics(job.folder, {**place, **line, "engine": trainee.engine})
            if job.folder in self._trackers:
                self._trackers[job.folder].log(line, step)
            shown.append(figures)
        self._tell(step, shown)

    def is_due(self, step: int) -> bool:
        """Whether it is time for a resume point, by the clock or by the tokens seen."""
        config, now = self._group.config, time.monotonic()
        due = now - self._saved >= config.checkpoint_seconds
        if config.checkpoint_tokens is not None:
            before, after = (n * config.batch_size for n in (step - 1, step))
            due |= before // config.checkpoint_tokens < after // config.checkpoint_tokens
        if due:
            self._saved = now
        return due and step < config.n_steps

    def _pace(self, step: int) -> dict[str, float]:
        """Tokens a second, and the share of time spent waiting, since the last line."""
        now = time.monotonic()
        elapsed = max(1e-9, now - self._lap)
        n_tokens = (step - self._lap_step) * self._group.config.batch_size
        figures = {
            "tokens_per_second": n_tokens / elapsed,
            "loader_wait_share": self._waited / elapsed,
        }
        self._lap, self._lap_step, self._waited = now, step, 0.0
        return figures

    def _start_trackers(self, step: int) -> dict[Path, Tracker]:
        """One for each SAE that learns; none where none is asked for."""
        name, trackers = self._group.config.track, {}
        if name is not None and self._group.share.ranks.is_first:
            for job, _ in self._group.learners:
                tracker = open_tracker(name, job.folder, recipe=job.recipe, step=step)
                self._open.callback(tracker.close)
                trackers[job.folder] = tracker
        return trackers

    def _tell(self, step: int, shown: Sequence[StepFigures]) -> None:
        config = self._group.config
        done, total = step * config.batch_size, config.n_steps * config.batch_size
        note = _note(shown)
        self._progress(Progress(stage="train", done=done, total=total, unit="tokens", note=note))


def _figures(trainee: Trainee, shown: StepFigures, step: int) -> dict[str, float]:
    """The figures of a step of an SAE that learns, but for the pace."""
    return {
        "loss": shown.loss,
        "nmse": shown.nmse,
        "explained_variance": 1.0 - shown.nmse,
        "l0": shown.l0,
        "auxk": shown.auxk,
        "dead": shown.dead,
        "dense_share": shown.dense_share,
        "learning_rate": trainee.rate(step - 1),
    }


def _note(shown: Sequence[StepFigures]) -> str:
    """The figures of the moment; of several SAEs, the least and the largest."""
    texts = {
        "EV": [f"{1 - figures.nmse:.3f}" for figures in shown],
        "L0": [f"{figures.l0:.1f}" for figures in shown],
        "dead": [f"{figures.dead:,}" for figures in shown],
    }
    return ", ".join(f"{name} {_range(found)}" for name, found in texts.items())


def _range(texts: Sequence[str]) -> str:
    ordered = sorted(texts, key=lambda text: float(text.replace(",", "")))
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
