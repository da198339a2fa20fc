"""Train the SAEs of a sweep from one pass over the data: the verb ``train`` with ``--sweep``.

``training.sweep_config`` says which SAEs, ``training.grouping`` which of them side by side, the
loop trains each group, and ``training.sweep_results`` is the table in the end. Run it again to go
on: what is finished is not trained again.
"""

from collections.abc import Sequence
from pathlib import Path

from visae.activations.mixing_buffer import LoaderState
from visae.activations.stream import TokenStream
from visae.distributed import Ranks
from visae.models.loading import choose_device
from visae.progress import ProgressCallback, silent
from visae.training.choosing import ChoiceRule
from visae.training.config import RunConfig, TrainConfig
from visae.training.grouping import free_memory, split_by_memory
from visae.training.jobs import (
    is_finished,
    jobs_of,
    require_different_names,
    require_work_for_all,
)
from visae.training.loop import train_on
from visae.training.resume import latest_common_step
from visae.training.sweep_results import SweepResult, sweep_result

__all__ = ["train_sweep"]

_LOADER_BYTES = 2**30


def train_sweep(
    stream: TokenStream,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    rule: ChoiceRule | None = None,
    memory_bytes: int | None = None,
    progress: ProgressCallback = silent,
    ranks: Ranks | None = None,
) -> SweepResult:
    """Train SAEs, each written to ``out / run.name``, and the table of their figures to ``out``.

    All that fit into memory are trained side by side on the same batches; the others after them
    on the same batches again, so that dividing them changes no SAE. SAEs that were interrupted at
    different steps are not joined.

    Args:
        stream: Tokens at all the sites of the runs.
        runs: The SAEs; those without a site read the stream's first.
        out: Folder of the sweep.
        config: The loop that they share.
        rule: Which SAE is chosen for every site.
        memory_bytes: Memory for the SAEs; without it, 85 % of what is free on their device, less
            the loader's buffer where that is main memory.
        progress: Told of the steps of each group.
        ranks: Of several, each calls this with the same arguments, as ``train_on``.

    Raises:
        ConfigError: as ``train_on`` does, when an SAE alone does not fit into memory, and when a
            group has fewer SAEs than there are ranks.
        StoreError: as ``train_on`` does.
        CheckpointError: when a folder holds a run with other settings (naming them).
    """
    require_different_names(runs)
    out, ranks = Path(out), ranks or Ranks()

    def plan() -> list[list[RunConfig]]:
        return _groups(stream, runs, out, config=config, memory_bytes=memory_bytes, ranks=ranks)

    for group in ranks.first(plan):
        stream.state = LoaderState()
        train_on(stream, group, out, config=config, progress=progress, ranks=ranks)
    result = sweep_result(runs, out, ChoiceRule() if rule is None else rule)
    if ranks.is_first:
        result.write(out)
    return result


def _groups(
    stream: TokenStream,
    runs: Sequence[RunConfig],
    out: Path,
    *,
    config: TrainConfig,
    memory_bytes: int | None,
    ranks: Ranks,
) -> list[list[RunConfig]]:
    """The SAEs still to be trained, in groups; all are looked at before any is trained."""
    jobs = {job.run.name: job for job in jobs_of(stream, runs, out, config)}
    unfinished = [job.run for job in jobs.values() if not is_finished(job)]
    groups = split_by_memory(
        unfinished,
        lambda run: stream.d_model(jobs[run.name].site),
        config=config,
        n_bytes=_allowance(config, ranks) if memory_bytes is None else memory_bytes,
        key=lambda run: latest_common_step([out / run.name]),
    )
    for group in groups if config.shared == "saes" else []:
        require_work_for_all([jobs[run.name] for run in group], ranks)
    return groups


def _allowance(config: TrainConfig, ranks: Ranks) -> int:
    """Bytes for the SAEs of a group, by what is free now where the first rank runs.

    Ranks that share the SAEs out hold a part of them each, others hold all.
    """
    device = choose_device(ranks.device(config.device))
    free = free_memory(device)
    if device.type == "cuda":
        own = free
    else:
        buffer = _LOADER_BYTES if config.buffer_bytes is None else config.buffer_bytes
        own = max(1, free // ranks.n_local - buffer)
    return own * (ranks.world_size if config.shared == "saes" else 1)
