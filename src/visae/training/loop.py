"""Train one or many SAEs over one stream of activations: the verb ``train``.

``train`` takes its tokens from a store, ``train_on`` from any stream. Every SAE of the group sees
the same batches in the same order. Interrupt it at any moment and run it again: it goes on from
the last resume point, with bit-equal SAEs on the CPU.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from visae.activations.filling import TokenBatch, joined
from visae.activations.loaders import ShuffledTokens
from visae.activations.mixing_buffer import LoaderState
from visae.activations.normalisation import Normalisation
from visae.activations.stored import StoredTokens
from visae.activations.stream import TokenStream
from visae.errors import ConfigError
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

__all__ = ["train", "train_on"]


class _Job(NamedTuple):
    """One SAE to be made: its settings, its folder, and every setting that shapes it."""

    run: RunConfig
    site: str
    folder: Path
    recipe: dict[str, Any]

    def of(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the SAE reads of some tokens, and for a transcoder what it is to give."""
        return tokens[self.site], tokens.get(self.run.target_site or "")


class _Group(NamedTuple):
    """The SAEs in training and what they share."""

    jobs: list[_Job]
    trainees: list[Trainee]
    stream: TokenStream
    config: TrainConfig

    @property
    def members(self) -> list[tuple[_Job, Trainee]]:
        """Each job with its trainee."""
        return list(zip(self.jobs, self.trainees, strict=True))

    @property
    def sites(self) -> list[str]:
        """Every site that some SAE reads or gives."""
        named = [site for job in self.jobs for site in (job.site, job.run.target_site)]
        return list(dict.fromkeys(site for site in named if site is not None))


def train(
    store: StoredTokens,
    site: str,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    progress: ProgressCallback = silent,
) -> list[SAE]:
    """Train the SAEs of ``runs`` on a store; each is written to ``out / run.name``.

    ``site`` is what runs without a site of their own read. What it raises: see ``train_on``.
    """
    _check_names(runs)
    runs = [dataclasses.replace(run, site=run.site or site) for run in runs]
    stream = ShuffledTokens(
        store,
        *_sites(runs),
        tokens=config.tokens,
        where=config.where,
        batch_size=config.batch_size,
        buffer_bytes=config.buffer_bytes,
        seed=config.data_seed,
    )
    return train_on(stream, runs, out, config=config, progress=progress)


def train_on(
    stream: TokenStream,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    progress: ProgressCallback = silent,
) -> list[SAE]:
    """Train the SAEs of ``runs`` on a stream; each is written to ``out / run.name``.

    SAEs that are finished already are not trained again. Runs without a site of their own read
    the stream's first.

    Raises:
        ConfigError: when two runs share a name, an SAE cannot have the shape asked for, or the
            stream is not the one that ``config`` describes.
        StoreError: when there are too few tokens, or NaN, or the folder is being written to.
        CheckpointError: when a folder holds a run with other settings (naming them).
    """
    _check_names(runs)
    _check_stream(stream, config)
    jobs = [_job(stream, run, Path(out), config) for run in runs]
    with contextlib.ExitStack() as locks:
        for job in jobs:
            locks.enter_context(exclusive(job.folder))
            remove_leftovers(job.folder)
        open_jobs = [job for job in jobs if not _is_finished(job)]
        if open_jobs:
            group = _prepare(stream, open_jobs, config)
            step = _start_or_resume(group)
            _optimise(group, step, progress)
            _save(group)
    return [load_sae(job.folder, kinds=[type(job.run.sparsity)]) for job in jobs]


def _sites(runs: Sequence[RunConfig]) -> list[str]:
    """Every site that some run reads or has as its target."""
    named = [site for run in runs for site in (run.site, run.target_site) if site is not None]
    return list(dict.fromkeys(named))


def _check_names(runs: Sequence[RunConfig]) -> None:
    names = [run.name for run in runs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            "The runs of a group need different names",
            where=", ".join(names) or "no runs",
            fix="Give at least one run, and each its own name",
        )


def _check_stream(stream: TokenStream, config: TrainConfig) -> None:
    if (stream.batch_size, stream.tokens) != (config.batch_size, config.tokens):
        raise ConfigError(
            f"The stream has batches of {stream.batch_size} {stream.tokens} tokens, and the "
            f"settings ask for {config.batch_size} {config.tokens} tokens",
            fix="Make the stream with the same batch_size and tokens",
        )


def _job(stream: TokenStream, run: RunConfig, out: Path, config: TrainConfig) -> _Job:
    site = run.site or stream.sites[0]
    target = run.target_site or site
    for name in (site, target):
        if name not in stream.sites:
            fix = f"Use one of: {', '.join(stream.sites)}"
            raise ConfigError(f"The stream has no site {name}", where=run.name, fix=fix)
    widths = [stream.d_model(name) for name in (site, target)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"A transcoder cannot go from width {widths[0]} to width {widths[1]}",
            where=f"{run.name}: {site} to {target}",
            fix="Choose two sites of the same width",
        )
    return _Job(run, site, out / run.name, _recipe(stream, site, run, config))


def _recipe(stream: TokenStream, site: str, run: RunConfig, config: TrainConfig) -> dict[str, Any]:
    """Every setting that shapes the SAE, for its checkpoint and to recognise a resumed run."""
    loop: dict[str, Any] = to_plain(config)
    own: dict[str, Any] = to_plain(run)
    del loop["log_steps"], loop["checkpoint_seconds"], own["site"]
    return {
        "data": stream.digest,
        "site": site,
        "run": own,
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


def _prepare(stream: TokenStream, jobs: list[_Job], config: TrainConfig) -> _Group:
    trainees = [
        Trainee(SAE(job.run.sae_config(stream.d_model(job.site))), job.run, config) for job in jobs
    ]
    return _Group(jobs, trainees, stream, config)


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
        group.stream.state = point.loader
    return step


def _start(group: _Group) -> None:
    """Begin anew: normalise, and initialise every SAE from the stream's first tokens."""
    normal = {site: group.stream.normalisation(site) for site in group.sites}
    sizes = [max(group.config.batch_size, job.run.n_start_tokens) for job in group.jobs]
    sample = _single_precision(_first_tokens(group.stream, max(sizes)))
    for (job, trainee), size in zip(group.members, sizes, strict=True):
        remove_points(job.folder)
        _normalise(trainee.sae, normal[job.site], normal.get(job.run.target_site or ""))
        trainee.start(*job.of({site: tokens[:size] for site, tokens in sample.items()}))
        cut_metrics(job.folder, -1)


def _normalise(sae: SAE, of_input: Normalisation, of_target: Normalisation | None) -> None:
    sae.mean.copy_(of_input.mean)
    sae.scale.fill_(of_input.scale)
    if of_target is not None:
        sae.target_mean.copy_(of_target.mean)
        sae.target_scale.fill_(of_target.scale)


def _first_tokens(stream: TokenStream, n_tokens: int) -> TokenBatch:
    """The stream's first tokens, fewer if a pass has fewer; the stream is left at its start."""
    batches: list[TokenBatch] = []
    with contextlib.closing(iter(stream)) as endless:
        for batch in endless:
            batches.append(batch)
            of_next_pass = stream.state.n_tokens if stream.state.n_pass else 0
            if stream.state.n_pass or len(batches) * stream.batch_size >= n_tokens:
                break
    stream.state = LoaderState()
    return joined(batches).first(len(batches) * stream.batch_size - of_next_pass)


def _optimise(group: _Group, step: int, progress: ProgressCallback) -> None:
    """The loop: batches in, steps, figures, resume points."""
    config = group.config
    learners = [(job, trainee) for job, trainee in group.members if job.run.learns]
    n_steps = config.n_steps if learners else 0
    clock = _Clock(step)
    with contextlib.closing(iter(group.stream)) as batches:
        while step < n_steps:
            tokens = _single_precision(clock.wait(batches))
            figures = [_step(job, trainee, tokens, step) for job, trainee in learners]
            step += 1
            if step % config.log_steps == 0 or step == n_steps:
                pace = clock.lap(step, config.batch_size)
                for (job, trainee), shown in zip(learners, figures, strict=True):
                    _log(job, trainee, config, step, shown, pace)
                _tell(progress, config, step, figures[0])
            if clock.is_due(config.checkpoint_seconds) and step < n_steps:
                _write_points(group, step)


def _step(job: _Job, trainee: Trainee, tokens: Mapping[str, Tensor], step: int) -> StepFigures:
    x, target = job.of(tokens)
    return trainee.step(x, step, target)


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
        point = ResumePoint(step=step, loader=group.stream.state, recipe=job.recipe)
        write_point(job.folder, point, trainee.state())


def _save(group: _Group) -> None:
    """Write every checkpoint, then drop its resume points."""
    reference = _single_precision(group.stream.reference())
    for job, trainee in group.members:
        last = read_metrics(job.folder)[-1] if job.run.learns else {}
        save_sae(
            trainee.sae,
            job.folder,
            provenance=_provenance(group, job),
            reference=reference[job.site],
            metrics={k: v for k, v in last.items() if k in ("nmse", "l0", "dead", "loss")},
        )
        remove_points(job.folder)


def _provenance(group: _Group, job: _Job) -> Provenance:
    stream, config = group.stream, group.config
    return Provenance(
        model=stream.model,
        site=job.site,
        target_site=job.run.target_site,
        layout=stream.layout(job.site),
        preprocessing=stream.preprocessing,
        images=stream.images,
        tokens=stream.tokens,
        store_digest=stream.digest,
        n_tokens=config.n_steps * config.batch_size if job.run.learns else 0,
        seed=job.run.seed,
        control=job.run.control,
        recipe=job.recipe,
    )


def _single_precision(batch: TokenBatch) -> dict[str, Float[Tensor, "token _"]]:
    return {site: tokens.float() for site, tokens in batch.activations.items()}


class _Clock:
    """Seconds spent waiting for the loader, rates between log lines, and when to save."""

    def __init__(self, step: int) -> None:
        now = time.monotonic()
        self._lap, self._saved, self._waited = now, now, 0.0
        self._lap_step = step

    def wait(self, batches: Iterator[TokenBatch]) -> TokenBatch:
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
