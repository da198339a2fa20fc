"""Options of ``train`` about its loop: schedules, resume points, what computes, what listens."""

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from visae.training.config import TrainConfig

__all__ = ["LoopOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How training goes; what is trained, and on which tokens, is said elsewhere."""

    warmup_steps: int | None = None
    """Steps over which the learning rate rises; without it, 1 000 or 5 % of the run."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the learning rate falls to zero."""
    penalty_warmup_share: float = 0.05
    """Share of the run over which the sparsity penalty rises."""
    k_start: float = 1.0
    """Start with so many times k, which falls to k over the first tenth of the run."""
    average_decay: float | None = None
    """Keep the running mean of the weights, of this decay (0.999 is usual), not the last ones."""
    checkpoint_seconds: float = 120.0
    """Seconds between the points from which an interrupted run resumes."""
    checkpoint_tokens: int | None = None
    """Tokens between such points, besides."""
    engine: Literal["auto", "reference", "torch", "numba", "triton"] = "auto"
    """reference: dense autograd; the others are back ends of the sparse engine."""
    device: str = "auto"
    """Where the SAEs are trained and a live model runs: cpu, cuda, cuda:1 …"""
    shared: Literal["saes", "tokens"] = "saes"
    """What several processes share out: the SAEs, or the tokens of every batch."""
    track: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Send the figures there, besides metrics.jsonl."""

    def added_to(self, config: "TrainConfig") -> "TrainConfig":
        """The settings of a run with these."""
        from visae.training.schedules import KSchedule, PenaltySchedule, RateSchedule

        return dataclasses.replace(
            config,
            rate_schedule=RateSchedule(
                warmup_steps=self.warmup_steps, decay_share=self.decay_share
            ),
            penalty_schedule=PenaltySchedule(warmup_share=self.penalty_warmup_share),
            k_schedule=KSchedule(start=self.k_start),
            average_decay=self.average_decay,
            checkpoint_seconds=self.checkpoint_seconds,
            checkpoint_tokens=self.checkpoint_tokens,
            engine=self.engine,
            device=self.device,
            shared=self.shared,
            track=None if self.track == "none" else self.track,
        )
