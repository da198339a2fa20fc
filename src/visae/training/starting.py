"""Where a group's training begins: at its last common resume point, or with fresh weights."""

import contextlib

from visae.activations.filling import TokenBatch, joined
from visae.activations.mixing_buffer import LoaderState
from visae.activations.normalisation import Normalisation
from visae.activations.stream import TokenStream
from visae.saes.sae import SAE
from visae.training.jobs import Group
from visae.training.metrics import cut_metrics
from visae.training.resume import (
    ResumePoint,
    check_points,
    latest_common_step,
    read_point,
    remove_points,
    write_point,
)

__all__ = ["start_or_resume", "write_points"]


def start_or_resume(group: Group) -> int:
    """Bring the group to its last common resume point, or to its start; the steps done.

    Raises:
        CheckpointError: when a folder holds an interrupted run with other settings.
        StoreError: when the first tokens hold NaN or infinite values.
    """
    step = group.share.ranks.first(lambda: _common_step(group))
    if step is None:
        _start(group)
        return 0
    for job, trainee in group.members:
        point, state = read_point(job.folder, step)
        trainee.restore(state)
        if group.share.ranks.is_first:
            cut_metrics(job.folder, step)
        group.stream.state = point.loader
    return step


def write_points(group: Group, step: int) -> None:
    """Write the state of every SAE after some step, from which the group can go on."""
    for job, trainee in group.members:
        point = ResumePoint(step=step, loader=group.stream.state, recipe=job.recipe)
        write_point(job.folder, point, trainee.state())


def _common_step(group: Group) -> int | None:
    for job, _ in group.members:
        check_points(job.folder, recipe=job.recipe)
    return latest_common_step([job.folder for job, _ in group.members])


def _start(group: Group) -> None:
    """Begin anew: normalise, and initialise every SAE from the stream's first tokens."""
    normal = {site: group.stream.normalisation(site) for site in group.sites}
    sizes = [max(group.config.batch_size, job.run.n_start_tokens) for job, _ in group.members]
    sample = group.prepare(_first_tokens(group.stream, max(sizes)))
    for (job, trainee), size in zip(group.members, sizes, strict=True):
        if group.share.ranks.is_first:
            remove_points(job.folder)
            cut_metrics(job.folder, -1)
        _normalise(trainee.sae, normal[job.site], normal.get(job.run.target_site or ""))
        trainee.start(*job.of({site: tokens[:size] for site, tokens in sample.items()}))


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
