"""Train one or many SAEs over one stream of activations: the verb ``train``.

``train`` takes its tokens from a store, ``train_on`` from any stream. Every SAE of the group sees
the same batches in the same order. Interrupt it at any moment and run it again: it goes on from
the last resume point, with bit-equal SAEs on the CPU. Several processes share the SAEs out, and
each SAE is then the one that a single process makes; or they share the tokens of every batch.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from visae.activations.loaders import ShuffledTokens
from visae.activations.stored import StoredTokens
from visae.activations.stream import TokenStream
from visae.distributed import Ranks
from visae.progress import ProgressCallback, silent
from visae.saes.checkpoint import Provenance, load_sae, save_sae
from visae.saes.sae import SAE
from visae.storage.atomic import remove_leftovers
from visae.storage.locks import exclusive
from visae.training.config import RunConfig, TrainConfig
from visae.training.jobs import (
    Group,
    Job,
    is_finished,
    jobs_of,
    require_different_names,
    require_equal_shares,
    require_matching,
    require_work_for_all,
    sites_of,
)
from visae.training.journal import Journal
from visae.training.metrics import read_metrics
from visae.training.resume import remove_points
from visae.training.sharing import Share
from visae.training.starting import start_or_resume, write_points
from visae.training.tracking import require_installed

__all__ = ["train", "train_on"]

_FINAL_FIGURES = ("nmse", "l0", "dead", "loss")


def train(
    store: StoredTokens,
    site: str,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    progress: ProgressCallback = silent,
    ranks: Ranks | None = None,
) -> list[SAE]:
    """Train the SAEs of ``runs`` on a store; each is written to ``out / run.name``.

    ``site`` is what runs without a site of their own read. What it raises: see ``train_on``.
    """
    require_different_names(runs)
    runs = [dataclasses.replace(run, site=run.site or site) for run in runs]
    stream = ShuffledTokens(
        store,
        *sites_of(runs),
        tokens=config.tokens,
        where=config.where,
        batch_size=config.batch_size,
        buffer_bytes=config.buffer_bytes,
        seed=config.data_seed,
    )
    return train_on(stream, runs, out, config=config, progress=progress, ranks=ranks)


def train_on(
    stream: TokenStream,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    progress: ProgressCallback = silent,
    ranks: Ranks | None = None,
) -> list[SAE]:
    """Train the SAEs of ``runs`` on a stream; each is written to ``out / run.name``.

    SAEs that are finished already are not trained again. Runs without a site of their own read
    the stream's first. Of several ``ranks``, each calls this with the same arguments and reads the
    whole stream; ``config.shared`` says what they share out.

    Raises:
        ConfigError: when two runs share a name, an SAE cannot have the shape asked for, the engine
            cannot train it, the tracker is not installed, the stream is not the one that
            ``config`` describes, or there are more ranks than SAEs.
        StoreError: when there are too few tokens, or NaN, or the folder is being written to.
        CheckpointError: when a folder holds a run with other settings (naming them).
    """
    require_different_names(runs)
    require_matching(stream, config)
    require_installed(config.track)
    ranks = ranks or Ranks()
    jobs = jobs_of(stream, runs, Path(out), config)
    config = dataclasses.replace(config, device=ranks.device(config.device))
    told = progress if ranks.is_first else silent
    if config.shared == "tokens":  # whoever fails ends the others, who wait for it in every step
        require_equal_shares(config, ranks)
        _make(stream, jobs, config, progress=told, share=Share(ranks))
        ranks.gather(None)
    else:
        require_work_for_all(jobs, ranks)
        mine, whole = jobs[ranks.rank :: ranks.world_size], Share(Ranks(store=ranks.store))
        ranks.together(lambda: _make(stream, mine, config, progress=told, share=whole))
    return [load_sae(job.folder, kinds=[type(job.run.sparsity)]) for job in jobs]


def _make(
    stream: TokenStream,
    jobs: Sequence[Job],
    config: TrainConfig,
    *,
    progress: ProgressCallback,
    share: Share,
) -> None:
    """Make those of some SAEs that are not there yet."""
    ranks = share.ranks
    with _claimed(jobs if ranks.is_first else []):
        done = ranks.first(lambda: [is_finished(job) for job in jobs])
        if open_jobs := [job for job, is_done in zip(jobs, done, strict=True) if not is_done]:
            group = Group.of(stream, open_jobs, config, share)
            step = start_or_resume(group)
            with Journal(group, step, progress) as journal:
                _optimise(group, step, journal)
            if ranks.is_first:
                _save(group)


@contextlib.contextmanager
def _claimed(jobs: Sequence[Job]) -> Iterator[None]:
    """The folders of some jobs, for this process alone and without what a kill left in them."""
    with contextlib.ExitStack() as locks:
        for job in jobs:
            locks.enter_context(exclusive(job.folder))
            remove_leftovers(job.folder)
        yield


def _optimise(group: Group, step: int, journal: Journal) -> None:
    """The loop: batches in, steps, figures, resume points; the place to stop if others failed."""
    n_steps = group.config.n_steps if group.learners else 0
    with contextlib.closing(iter(group.stream)) as batches:
        while step < n_steps:
            tokens = group.prepare(journal.wait(batches))
            own, losses = group.share.of(tokens), []
            for job, trainee in group.learners:
                x, target = job.of(own)
                losses.append(trainee.step(x, step, target))
            step += 1
            journal.write(step, tokens, losses)
            if journal.is_due(step) and group.share.ranks.is_first:
                write_points(group, step)
                group.share.ranks.count("resume points", 1)


def _save(group: Group) -> None:
    """Write every checkpoint, then drop its resume points."""
    reference = group.prepare(group.stream.reference())
    for job, trainee in group.members:
        last = read_metrics(job.folder)[-1] if job.run.learns else {}
        save_sae(
            trainee.result,
            job.folder,
            provenance=_provenance(group, job, trainee.engine),
            reference=reference[job.site],
            metrics={name: float(last[name]) for name in _FINAL_FIGURES if name in last},
        )
        remove_points(job.folder)


def _provenance(group: Group, job: Job, engine: str) -> Provenance:
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
        engine=engine,
        recipe=job.recipe,
    )
