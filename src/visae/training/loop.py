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
from visae.storage.locks import exclusive
from visae.storage.records import to_plain
from visae.training.config import RunConfig, TrainConfig
from visae.training.metrics import append_metrics, cut_metrics, read_metrics
from visae.training.resume import (
    ResumePoint,
    latest_common_step,
    read_point,
    remove_points,
    write_point,
)
from visae.training.trainee import StepFigures, Trainee

__all__ = ["train"]


class _Group(NamedTuple):
    """The SAEs in training and what they share."""

    trainees: list[Trainee]
    folders: list[Path]
    recipes: list[dict[str, Any]]
    loader: ShuffledTokens
    config: TrainConfig


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
    folders = [Path(out) / run.name for run in runs]
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(exclusive(folder))
        recipes = [_recipe(store, site, run, config) for run in runs]
        if not all(_is_finished(f, r) for f, r in zip(folders, recipes, strict=True)):
            group = _prepare(store, site, runs, folders, recipes, config)
            step = _start_or_resume(group)
            _optimise(group, step, progress)
            _save(store, site, group)
    return [
        load_sae(folder, kinds=[type(run.sparsity)])
        for folder, run in zip(folders, runs, strict=True)
    ]


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
    return {
        "store": store.digest,
        "site": site,
        "run": to_plain(run),
        "peak_learning_rate": run.peak_learning_rate(config.n_steps),
        "loop": to_plain(config),
    }


def _is_finished(folder: Path, recipe: dict[str, Any]) -> bool:
    if not (folder / "sae.json").is_file():
        return False
    found = read_sae_record(folder).provenance.recipe
    changed = sorted(k for k in recipe if found.get(k) != recipe[k])
    if changed:
        raise ConfigError(
            f"This folder holds an SAE trained with another {', '.join(changed)}",
            where=folder,
            fix="Choose another --out, or delete the folder",
        )
    return True


def _prepare(
    store: ActivationStore,
    site: str,
    runs: Sequence[RunConfig],
    folders: list[Path],
    recipes: list[dict[str, Any]],
    config: TrainConfig,
) -> _Group:
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
    for run in runs:
        sae = SAE(run.sae_config(store.site(site).d_model))
        sae.mean.copy_(mean)
        sae.scale.copy_(scale)
        trainees.append(Trainee(sae, run, config))
    return _Group(trainees, folders, recipes, loader, config)


def _start_or_resume(group: _Group) -> int:
    """Bring the group to its last common resume point, or to its start; the steps done."""
    step = latest_common_step(group.folders)
    if step is None:
        sample = next(iter(group.loader))
        group.loader.state = LoaderState()
        for trainee, folder in zip(group.trainees, group.folders, strict=True):
            trainee.start(sample)
            cut_metrics(folder, -1)
        return 0
    for trainee, folder, recipe in zip(group.trainees, group.folders, group.recipes, strict=True):
        point, state = read_point(folder, step, recipe=recipe)
        trainee.restore(state)
        cut_metrics(folder, step)
        group.loader.state = point.loader
    return step


def _optimise(group: _Group, step: int, progress: ProgressCallback) -> None:
    """The loop: batches in, steps, figures, resume points."""
    config = group.config
    learners = [trainee for trainee in group.trainees if trainee.run.control == "none"]
    n_steps = config.n_steps if learners else 0
    batches = iter(group.loader)
    clock = _Clock(step)
    while step < n_steps:
        x = clock.wait(batches)
        figures = [trainee.step(x, config.rate_factor(step)) for trainee in learners]
        step += 1
        if step % config.log_steps == 0 or step == n_steps:
            rate, wait_share = clock.lap(step, config.batch_size)
            _log(group, step, figures, rate, wait_share)
            _tell(progress, config, step, figures[0])
        if clock.is_due(config.checkpoint_seconds) and step < n_steps:
            _write_points(group, step)


def _log(
    group: _Group, step: int, figures: Sequence[StepFigures], rate: float, wait_share: float
) -> None:
    """One line of metrics for each SAE that learns."""
    learned = iter(figures)
    for trainee, folder in zip(group.trainees, group.folders, strict=True):
        if trainee.run.control != "none":
            continue
        shown = next(learned)
        append_metrics(
            folder,
            {
                "step": step,
                "tokens": step * group.config.batch_size,
                "loss": shown.loss,
                "nmse": shown.nmse,
                "explained_variance": 1.0 - shown.nmse,
                "l0": shown.l0,
                "auxk": shown.auxk,
                "dead": int(trainee.dead.sum()),
                "learning_rate": trainee.run.peak_learning_rate(group.config.n_steps)
                * group.config.rate_factor(step - 1),
                "tokens_per_second": rate,
                "loader_wait_share": wait_share,
            },
        )


def _tell(progress: ProgressCallback, config: TrainConfig, step: int, shown: StepFigures) -> None:
    note = f"EV {1 - shown.nmse:.3f}, L0 {shown.l0:.1f}"
    done, total = step * config.batch_size, config.n_steps * config.batch_size
    progress(Progress(stage="train", done=done, total=total, unit="tokens", note=note))


def _write_points(group: _Group, step: int) -> None:
    state = group.loader.state
    for trainee, folder, recipe in zip(group.trainees, group.folders, group.recipes, strict=True):
        point = ResumePoint(step=step, loader=state, recipe=recipe)
        write_point(folder, point, trainee.state())


def _save(store: ActivationStore, site: str, group: _Group) -> None:
    """Write every checkpoint, then drop the resume points."""
    reference = _reference_tokens(store, site, group.config.tokens)
    for trainee, folder, recipe in zip(group.trainees, group.folders, group.recipes, strict=True):
        learned = trainee.run.control == "none"
        provenance = Provenance.of_store(
            store,
            site,
            tokens=group.config.tokens,
            n_tokens=group.config.n_steps * group.config.batch_size if learned else 0,
            seed=trainee.run.seed,
            control=trainee.run.control,
            recipe=recipe,
        )
        last = read_metrics(folder)[-1] if learned else {}
        metrics = {k: v for k, v in last.items() if k in ("nmse", "l0", "dead", "loss")}
        save_sae(trainee.sae, folder, provenance=provenance, reference=reference, metrics=metrics)
    for folder in group.folders:
        remove_points(folder)


def _reference_tokens(
    store: ActivationStore, site: str, policy: TokenPolicy
) -> Float[Tensor, "token d_model"]:
    """Some tokens of the store's first images, for the checkpoint to prove itself on.

    Raises:
        StoreError: when the store's first shard holds no image.
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
