"""Train one or many SAEs over one stream of activations: the verb ``train``.

Every SAE of the group sees the same batches in the same order. Interrupt it at any moment and run
it again: it goes on from the last resume point, with bit-equal SAEs on the CPU.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.loaders import LoaderState, ShuffledTokens
from visae.activations.store import ActivationStore
from visae.errors import ConfigError, StoreError
from visae.models.layout import TokenPolicy
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.checkpoint import Provenance, load_sae, read_sae_record, save_sae
from visae.saes.sae import SAE
from visae.storage.atomic import remove_leftovers
from visae.storage.locks import exclusive
from visae.storage.records import to_plain
from visae.training.config import RunConfig, TrainConfig
from visae.training.metrics import append_metrics, cut_metrics, read_metrics
from visae.training.resume import (
    ResumePoint,
    check_points,
    latest_common_step,
    read_point,
    remove_points,
    require_recipe,
    write_point,
)
from visae.training.trainee import StepFigures, Trainee

__all__ = ["train"]


class _Job(NamedTuple):
    """One SAE to be made: its settings, its folder, and every setting that shapes it."""

    run: RunConfig
    folder: Path
    recipe: dict[str, Any]


class _Group(NamedTuple):
    """The SAEs in training and what they share."""

    jobs: list[_Job]
    trainees: list[Trainee]
    loader: ShuffledTokens
    config: TrainConfig

    @property
    def members(self) -> list[tuple[_Job, Trainee]]:
        """Each job with its trainee."""
        return list(zip(self.jobs, self.trainees, strict=True))


def train(
    store: ActivationStore,
    site: str,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    progress: ProgressCallback = silent,
) -> list[SAE]:
    """Train the SAEs of ``runs`` on a site; each is written to ``out / run.name``.

    SAEs that are finished already are not trained again.

    Raises:
        ConfigError: when two runs share a name, or an SAE cannot have the shape asked for.
        StoreError: when the store is too small, holds NaN, or the folder is being written to.
        CheckpointError: when a folder holds a run with other settings (naming them).
    """
    _check_names(runs)
    jobs = [_Job(run, Path(out) / run.name, _recipe(store, site, run, config)) for run in runs]
    with contextlib.ExitStack() as locks:
        for job in jobs:
            locks.enter_context(exclusive(job.folder))
            remove_leftovers(job.folder)
        open_jobs = [job for job in jobs if not _is_finished(job)]
        if open_jobs:
            group = _prepare(store, site, open_jobs, config)
            step = _start_or_resume(group)
            _optimise(group, step, progress)
            _save(store, site, group)
    return [load_sae(job.folder, kinds=[type(job.run.sparsity)]) for job in jobs]


def _check_names(runs: Sequence[RunConfig]) -> None:
    names = [run.name for run in runs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            "The runs of a group need different names",
            where=", ".join(names) or "no runs",
            fix="Give at least one run, and each its own name",
        )


def _recipe(
    store: ActivationStore, site: str, run: RunConfig, config: TrainConfig
) -> dict[str, Any]:
    """Every setting that shapes the SAE, for its checkpoint and to recognise a resumed run."""
    loop: dict[str, Any] = to_plain(config)
    del loop["log_steps"], loop["checkpoint_seconds"]
    return {
        "store": store.digest,
        "site": site,
        "run": to_plain(run),
        "peak_learning_rate": run.peak_learning_rate(config.n_steps),
        "loop": loop,
    }


def _is_finished(job: _Job) -> bool:
    """Whether the SAE is there, whole; a kill may have left its resume points behind."""
    if not (job.folder / "sae.json").is_file():
        return False
    require_recipe(job.folder, read_sae_record(job.folder).provenance.recipe, job.recipe)
    remove_points(job.folder)
    return True


def _prepare(store: ActivationStore, site: str, jobs: list[_Job], config: TrainConfig) -> _Group:
    statistics = store.statistics(site, config.tokens)
    mean, scale = statistics.mean.float(), torch.tensor(statistics.scale)
    loader = ShuffledTokens(
        store,
        site,
        tokens=config.tokens,
        batch_size=config.batch_size,
        buffer_bytes=config.buffer_bytes,
        seed=config.data_seed,
    )
    trainees = []
    for job in jobs:
        sae = SAE(job.run.sae_config(store.site(site).d_model))
        sae.mean.copy_(mean)
        sae.scale.copy_(scale)
        trainees.append(Trainee(sae, job.run, config))
    return _Group(jobs, trainees, loader, config)


def _start_or_resume(group: _Group) -> int:
    """Bring the group to its last common resume point, or to its start; the steps done."""
    for job in group.jobs:
        check_points(job.folder, recipe=job.recipe)
    step = latest_common_step([job.folder for job in group.jobs])
    if step is None:
        _start(group)
        return 0
    for job, trainee in group.members:
        point, state = read_point(job.folder, step)
        trainee.restore(state)
        cut_metrics(job.folder, step)
        group.loader.state = point.loader
    return step


def _start(group: _Group) -> None:
    """Begin anew: initialise every SAE from as many tokens as it has features, or one batch."""
    sizes = [max(group.config.batch_size, job.run.n_features) for job in group.jobs]
    sample = _first_tokens(group.loader, max(sizes))
    for (job, trainee), size in zip(group.members, sizes, strict=True):
        remove_points(job.folder)
        trainee.start(sample[:size])
        cut_metrics(job.folder, -1)


def _first_tokens(loader: ShuffledTokens, n_tokens: int) -> Float[Tensor, "token d_model"]:
    """The loader's first tokens, fewer if a pass has fewer; the loader is left at its start."""
    batches: list[Tensor] = []
    for batch in loader:
        if loader.state.n_pass > 0:
            break
        batches.append(batch)
        if len(batches) * batch.shape[0] >= n_tokens:
            break
    loader.state = LoaderState()
    return torch.cat(batches)


def _optimise(group: _Group, step: int, progress: ProgressCallback) -> None:
    """The loop: batches in, steps, figures, resume points."""
    config = group.config
    learners = [(job, trainee) for job, trainee in group.members if job.run.learns]
    n_steps = config.n_steps if learners else 0
    batches = iter(group.loader)
    clock = _Clock(step)
    while step < n_steps:
        x = clock.wait(batches)
        figures = [trainee.step(x, step) for _, trainee in learners]
        step += 1
        if step % config.log_steps == 0 or step == n_steps:
            pace = clock.lap(step, config.batch_size)
            for (job, trainee), shown in zip(learners, figures, strict=True):
                _log(job, trainee, config, step, shown, pace)
            _tell(progress, config, step, figures[0])
        if clock.is_due(config.checkpoint_seconds) and step < n_steps:
            _write_points(group, step)


def _log(
    job: _Job,
    trainee: Trainee,
    config: TrainConfig,
    step: int,
    shown: StepFigures,
    pace: tuple[float, float],
) -> None:
    """One line of metrics for an SAE that learns."""
    peak = job.run.peak_learning_rate(config.n_steps)
    append_metrics(
        job.folder,
        {
            "step": step,
            "tokens": step * config.batch_size,
            "loss": shown.loss,
            "nmse": shown.nmse,
            "explained_variance": 1.0 - shown.nmse,
            "l0": shown.l0,
            "auxk": shown.auxk,
            "dead": int(trainee.dead.sum()),
            "learning_rate": peak * config.rate_factor(step - 1),
            "tokens_per_second": pace[0],
            "loader_wait_share": pace[1],
        },
    )


def _tell(progress: ProgressCallback, config: TrainConfig, step: int, shown: StepFigures) -> None:
    note = f"EV {1 - shown.nmse:.3f}, L0 {shown.l0:.1f}"
    done, total = step * config.batch_size, config.n_steps * config.batch_size
    progress(Progress(stage="train", done=done, total=total, unit="tokens", note=note))


def _write_points(group: _Group, step: int) -> None:
    for job, trainee in group.members:
        point = ResumePoint(step=step, loader=group.loader.state, recipe=job.recipe)
        write_point(job.folder, point, trainee.state())


def _save(store: ActivationStore, site: str, group: _Group) -> None:
    """Write every checkpoint, then drop its resume points."""
    reference = _reference_tokens(store, site, group.config.tokens)
    for job, trainee in group.members:
        learned = job.run.learns
        provenance = Provenance.of_store(
            store,
            site,
            tokens=group.config.tokens,
            n_tokens=group.config.n_steps * group.config.batch_size if learned else 0,
            seed=job.run.seed,
            control=job.run.control,
            recipe=job.recipe,
        )
        last = read_metrics(job.folder)[-1] if learned else {}
        metrics = {k: v for k, v in last.items() if k in ("nmse", "l0", "dead", "loss")}
        save_sae(
            trainee.sae, job.folder, provenance=provenance, reference=reference, metrics=metrics
        )
        remove_points(job.folder)


def _reference_tokens(
    store: ActivationStore, site: str, policy: TokenPolicy
) -> Float[Tensor, "token d_model"]:
    """Some tokens of the store's first images, for the checkpoint to prove itself on.

    Raises:
        StoreError: when the store holds no image.
    """
    for index in range(store.n_shards):
        n_images = min(8, store.n_images_in_shard(index))
        if n_images:
            tokens = store.rows(site, index, slice(n_images), policy).flatten(0, 1).float()
            return tokens[:: max(1, tokens.shape[0] // 64)]
    raise StoreError("The store holds no image", where=store.folder, fix="Record images first")


class _Clock:
    """Seconds spent waiting for the loader, rates between log lines, and when to save."""

    def __init__(self, step: int) -> None:
        now = time.monotonic()
        self._lap, self._saved, self._waited = now, now, 0.0
        self._lap_step = step

    def wait(self, batches: Iterator[Tensor]) -> Tensor:
        """The next batch, its waiting time counted."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def lap(self, step: int, batch_size: int) -> tuple[float, float]:
        """Tokens a second, and the share of time spent waiting, since the last lap."""
        now = time.monotonic()
        elapsed = max(1e-9, now - self._lap)
        figures = (step - self._lap_step) * batch_size / elapsed, self._waited / elapsed
        self._lap, self._lap_step, self._waited = now, step, 0.0
        return figures

    def is_due(self, seconds: float) -> bool:
        """Whether that long has passed since this last said so."""
        now = time.monotonic()
        if now - self._saved < seconds:
            return False
        self._saved = now
        return True
