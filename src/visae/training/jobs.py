"""The SAEs of a group: what each is made from, where it is written, and what they share."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.filling import TokenBatch
from visae.activations.stream import TokenStream
from visae.distributed import Ranks
from visae.errors import ConfigError
from visae.models.loading import choose_device
from visae.saes.checkpoint import read_sae_record
from visae.saes.sae import SAE
from visae.storage.records import to_plain
from visae.training.config import RunConfig, TrainConfig
from visae.training.resume import remove_points, require_recipe
from visae.training.sharing import Share
from visae.training.trainee import Trainee

__all__ = [
    "Group",
    "Job",
    "is_finished",
    "jobs_of",
    "require_different_names",
    "require_equal_shares",
    "require_matching",
    "require_work_for_all",
    "sites_of",
]


class Job(NamedTuple):
    """One SAE to be made: its settings, its folder, and every setting that shapes it."""

    run: RunConfig
    """What it is to be."""
    site: str
    """What it reads."""
    folder: Path
    """Where it is written."""
    recipe: dict[str, Any]
    """Every setting that shapes it, for its checkpoint and to recognise a resumed run."""

    @property
    def wanted_site(self) -> str:
        """The site whose activations it is to give."""
        return self.run.target_site or self.site

    def of(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the SAE reads of some tokens, and for a transcoder what it is to give."""
        return tokens[self.site], tokens.get(self.run.target_site or "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The SAEs in training and what they share."""

    members: list[tuple[Job, Trainee]]
    """Each job with its trainee."""
    stream: TokenStream
    """Where the batches come from."""
    config: TrainConfig
    """The loop's settings."""
    device: torch.device
    """Where the SAEs lie."""
    share: Share
    """This process's share of every batch."""

    @classmethod
    def of(cls, stream: TokenStream, jobs: list[Job], config: TrainConfig, share: Share) -> "Group":
        """The group of some jobs, on their device, with weights of zero."""
        device = choose_device(config.device)
        members = []
        for job in jobs:
            sae = SAE(job.run.sae_config(stream.d_model(job.site))).to(device)
            members.append((job, Trainee(sae, job.run, config, share)))
        return cls(members=members, stream=stream, config=config, device=device, share=share)

    @property
    def learners(self) -> list[tuple[Job, Trainee]]:
        """The members that are trained; the others are controls that keep their start."""
        return [(job, trainee) for job, trainee in self.members if job.run.learns]

    @property
    def sites(self) -> list[str]:
        """Every site that some SAE reads or gives."""
        named = [site for job, _ in self.members for site in (job.site, job.wanted_site)]
        return list(dict.fromkeys(named))

    def prepare(self, batch: TokenBatch) -> dict[str, Float[Tensor, "token _"]]:
        """A batch on the group's device in float32, converted once for all its SAEs."""
        return {
            site: batch.activations[site].to(self.device, non_blocking=True).float()
            for site in self.sites
        }


def jobs_of(
    stream: TokenStream, runs: Sequence[RunConfig], out: Path, config: TrainConfig
) -> list[Job]:
    """The jobs of some runs.

    Raises:
        ConfigError: when the stream lacks a site, a transcoder's two sites differ in width, or an
            SAE cannot have the shape asked for.
    """
    return [_job(stream, run, out, config) for run in runs]


def sites_of(runs: Sequence[RunConfig]) -> list[str]:
    """Every site that some run reads or has as its target."""
    named = [site for run in runs for site in (run.site, run.target_site) if site is not None]
    return list(dict.fromkeys(named))


def require_different_names(runs: Sequence[RunConfig]) -> None:
    """Refuse runs that would be written over each other, or none.

    Raises:
        ConfigError: naming them.
    """
    names = [run.name for run in runs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            "The runs of a group need different names",
            where=", ".join(names) or "no runs",
            fix="Give at least one run, and each its own name",
        )


def require_matching(stream: TokenStream, config: TrainConfig) -> None:
    """Refuse a stream that is not the one that the settings describe.

    Raises:
        ConfigError: saying what each has.
    """
    if (stream.batch_size, stream.tokens) != (config.batch_size, config.tokens):
        raise ConfigError(
            f"The stream has batches of {stream.batch_size} {stream.tokens} tokens, and the "
            f"settings ask for {config.batch_size} {config.tokens} tokens",
            fix="Make the stream with the same batch_size and tokens",
        )


def require_work_for_all(jobs: Sequence[Job], ranks: Ranks) -> None:
    """Refuse processes that would have nothing to do when they share SAEs out.

    Raises:
        ConfigError: when there are more of them than SAEs.
    """
    if ranks.world_size > len(jobs):
        raise ConfigError(
            f"{ranks.world_size} processes cannot share {len(jobs)} SAEs out",
            where=", ".join(job.run.name for job in jobs),
            fix="Start at most as many processes as SAEs, or share the tokens of batches out",
        )


def require_equal_shares(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse batches of which not every process gets the same number of tokens.

    Raises:
        ConfigError: when the batch size is no multiple of the number of processes.
    """
    if config.batch_size % ranks.world_size:
        raise ConfigError(
            f"{ranks.world_size} processes cannot share batches of {config.batch_size} tokens out",
            where="batch_size",
            fix="Give a multiple of the number of processes",
        )


def is_finished(job: Job) -> bool:
    """Whether the SAE is there, whole; a kill may have left its resume points behind.

    Raises:
        CheckpointError: when it is one of another recipe.
    """
    if not (job.folder / "sae.json").is_file():
        return False
    require_recipe(job.folder, read_sae_record(job.folder).provenance.recipe, job.recipe)
    remove_points(job.folder)
    return True


def _job(stream: TokenStream, run: RunConfig, out: Path, config: TrainConfig) -> Job:
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
    run.sae_config(widths[0])  # refuses a shape that cannot be, before anything is written
    return Job(run, site, out / run.name, _recipe(stream, site, run, config))


def _recipe(stream: TokenStream, site: str, run: RunConfig, config: TrainConfig) -> dict[str, Any]:
    own: dict[str, Any] = to_plain(run)
    del own["site"]
    return {
        "data": stream.digest,
        "site": site,
        "run": own,
        "peak_learning_rate": run.peak_learning_rate(config.n_steps),
        "loop": config.shape,
    }
