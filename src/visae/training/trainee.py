"""One SAE in training: its engine, its dead features, one step, and its state on disk."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import mse_loss

from visae.distributed import Ranks
from visae.saes.archetypal import Archetypes
from visae.saes.initialise import Rows, initialise
from visae.saes.losses import BatchLoss
from visae.saes.prefixes import random_prefixes
from visae.saes.sae import SAE
from visae.training.average import WeightAverage
from visae.training.config import Control, RunConfig, TrainConfig
from visae.training.engines import StepInput, choose_engine
from visae.training.sharing import Share

__all__ = ["StepFigures", "Trainee"]

_LONGEST_MEMORY = 1000.0  # batches; an exponential mean of decay 0.999
_DENSE_SHARE = 0.1  # of the tokens


class StepFigures(NamedTuple):
    """What one step has shown, as numbers."""

    loss: float
    """The optimised loss."""
    nmse: float
    """Σ‖x−x̂‖² / Σ‖x−x̄‖² of the batch, by the whole dictionary."""
    l0: float
    """Active features per token."""
    auxk: float
    """Loss of the dead features."""
    dead: int
    """Features that have not fired for long."""
    dense_share: float
    """Share of the features that fire on more than a tenth of the batch's tokens."""


class Trainee:
    """An SAE, its Adam state, its threshold's running mean and when each feature last fired.

    Of several processes with a share of every batch each, all have the same.

    Raises:
        ConfigError: when the engine asked for cannot train this SAE.
    """

    def __init__(
        self, sae: SAE, run: RunConfig, config: TrainConfig, share: Share | None = None
    ) -> None:
        self.sae, self.run, self._config = sae, run, config
        self._share = share or Share(Ranks())
        self._archetypes = _archetypes(sae, run)
        self._engine = choose_engine(sae, run, config, self._archetypes)
        self._peak_rate = run.peak_learning_rate(config.n_steps)
        self._average = (
            None if config.average_decay is None else WeightAverage(sae, config.average_decay)
        )
        self.tokens_since_fired = torch.zeros(
            sae.n_features, dtype=torch.int64, device=sae.W_enc.device
        )
        self._n_thresholds = 0

    def start(
        self,
        sample: Float[Tensor, "token d_model"],
        target: Float[Tensor, "token d_model"] | None = None,
    ) -> None:
        """Initialise the weights, and the threshold, from raw activations.

        ``target`` are those of the same tokens at a transcoder's other site.
        """
        rows: dict[Control, Rows] = {
            "none": "mixed",
            "untrained": "random",
            "frozen-decoder": "random",
            "frozen-encoder": "random",
            "random-activations": "data",
        }
        initialise(
            self.sae,
            sample,
            rows=rows[self.run.control],
            seed=self.run.seed,
            target=target,
            archetypes=self._archetypes,
        )
        with torch.no_grad():
            first = self.sae.normalise(sample[: self._config.batch_size])
            codes = self.sae.select_batch(self.sae.pre_activations(first))
            self._observe_threshold(codes.values)

    @property
    def engine(self) -> str:
        """What moves its weights; ``none`` where nothing does."""
        return self._engine.name if self.run.learns else "none"

    @property
    def result(self) -> SAE:
        """The SAE to keep: of the running mean of the weights where there is one."""
        return self.sae if self._average is None else self._average.averaged(self.sae)

    @property
    def dead(self) -> Bool[Tensor, " feature"]:
        """Features that have not fired for long enough to count as dead."""
        return self.tokens_since_fired > self._config.dead_after

    def rate(self, number: int) -> float:
        """The learning rate of the step of some number (from 0)."""
        return self._peak_rate * self._config.rate_schedule.factor(number, self._config.n_steps)

    def step(
        self,
        x: Float[Tensor, "token d_model"],
        number: int,
        target: Float[Tensor, "token d_model"] | None = None,
    ) -> BatchLoss:
        """Make the optimisation step of some number (from 0) on a batch of raw activations.

        ``target`` are those of the same tokens at a transcoder's other site. What is drawn at
        random depends on seed and number alone.

        Raises:
            StoreError: when the loss is not finite; the weights are those before the step.
        """
        loss = self._engine.step(self._input(x, number, target))
        self._observe_threshold(loss.codes.values)
        self._observe_firing(self._n_fired(loss), x.shape[0] * self._share.ranks.world_size)
        if self._average is not None:
            self._average.observe(self.sae)
        return loss

    def _input(self, x: Tensor, number: int, target: Tensor | None) -> StepInput:
        config, n_prefixes = self._config, self.run.random_prefixes
        generator = _generator(self.run.seed, number)
        return StepInput(
            x=x,
            target=target,
            dead=self.dead,
            sparsity=config.k_schedule.at(self.sae.config, number, config.n_steps),
            prefixes=random_prefixes(self.sae.n_features, n_prefixes, generator)
            if n_prefixes
            else (),
            penalty_share=config.penalty_schedule.factor(number, config.n_steps),
            rate=self.rate(number),
            generator=generator,
            share=self._share,
        )

    def figures(self, loss: BatchLoss, wanted: Float[Tensor, "token d_model"]) -> StepFigures:
        """What a step's loss comes to; ``wanted`` is what the whole batch was to give."""
        n_tokens, fired = wanted.shape[0], self._n_fired(loss)
        return StepFigures(
            loss=float(loss.total),
            nmse=float(loss.reconstruction / self._spread(wanted)),
            l0=int(fired.sum()) / n_tokens,
            auxk=float(loss.auxk),
            dead=int(self.dead.sum()),
            dense_share=float((fired > _DENSE_SHARE * n_tokens).double().mean()),
        )

    def _spread(self, wanted: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
        """Mean square of the wanted activations around their mean, in normalised units."""
        scale = self.sae.target_scale if self.sae.config.transcoder else self.sae.scale
        return mse_loss(wanted, wanted.mean(dim=0).expand_as(wanted)) / scale.square()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors."""
        state = _prefixed("sae.", self.sae.state_dict())
        state |= _prefixed("adam.", self._engine.state())
        if self._archetypes is not None:
            state |= _prefixed("archetypes.", self._archetypes.state_dict())
        if self._average is not None:
            state |= _prefixed("average.", self._average.state())
        state["tokens_since_fired"] = self.tokens_since_fired
        state["n_thresholds"] = torch.tensor(self._n_thresholds)
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` gave, with the same engine or another."""
        self.sae.load_state_dict(_below("sae.", state), strict=True)
        self._engine.restore(_below("adam.", state))
        if self._archetypes is not None:
            self._archetypes.load_state_dict(_below("archetypes.", state), strict=True)
        if self._average is not None:
            self._average.restore(_below("average.", state))
        self.tokens_since_fired = state["tokens_since_fired"].to(self.sae.W_enc.device)
        self._n_thresholds = int(state["n_thresholds"])

    @torch.no_grad()
    def _observe_threshold(self, values: Float[Tensor, " entry"]) -> None:
        """θ: exponential mean of the batches' smallest positive values.

        It starts from the first value measured and remembers a tenth of the run so far, at most
        1 000 batches, so that it follows a young SAE; a batch without a positive value changes
        nothing.
        """
        if not self.sae.config.sparsity.uses_threshold:
            return
        least = self._share.smallest(values)
        if torch.isinf(least):
            return
        self._n_thresholds += 1
        memory = min(_LONGEST_MEMORY, max(1.0, self._n_thresholds / 10))
        self.sae.threshold.lerp_(least, 1.0 / memory)

    def _n_fired(self, loss: BatchLoss) -> Int64[Tensor, " feature"]:
        """On how many tokens of the whole batch each feature fired."""
        counts = torch.bincount(loss.codes.features, minlength=self.sae.n_features)
        return self._share.total(counts)

    def _observe_firing(self, n_fired: Int64[Tensor, " feature"], n_tokens: int) -> None:
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[n_fired > 0] = 0


def _archetypes(sae: SAE, run: RunConfig) -> Archetypes | None:
    """What the decoder's rows are made of, if not free."""
    if run.archetypes is None:
        return None
    made = Archetypes(run.archetypes, n_features=sae.n_features, d_model=sae.d_model)
    return made.to(sae.W_enc.device)


def _generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one step; torch looks at 32 bits of a seed only, so both are mixed."""
    mixed = np.random.SeedSequence([seed % 2**63, number]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under longer names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
