"""One SAE in training: its optimiser, its dead features, one step, and its state on disk."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from visae.errors import StoreError
from visae.saes.archetypal import Archetypes
from visae.saes.initialise import Rows, initialise
from visae.saes.learned import LearnedSparsity
from visae.saes.losses import BatchLoss, batch_loss
from visae.saes.orthogonality import orthogonality_loss
from visae.saes.prefixes import random_prefixes
from visae.saes.sae import SAE
from visae.training.config import Control, RunConfig, TrainConfig

__all__ = ["StepFigures", "Trainee"]

_LONGEST_MEMORY = 1000.0  # batches; an exponential mean of decay 0.999


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


class Trainee:
    """An SAE, its Adam state, its threshold's running mean and when each feature last fired."""

    def __init__(self, sae: SAE, run: RunConfig, config: TrainConfig) -> None:
        self.sae, self.run, self._config = sae, run, config
        self._archetypes = _archetypes(sae, run)
        self._parameters = _trainable(sae, self._archetypes, run.control)
        self._peak_rate = run.peak_learning_rate(config.n_steps)
        self._optimiser = torch.optim.Adam(
            self._parameters, lr=self._peak_rate, eps=6.25e-10, fused=True
        )
        self.tokens_since_fired = torch.zeros(sae.n_features, dtype=torch.int64)
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
    def dead(self) -> Bool[Tensor, " feature"]:
        """Features that have not fired for long enough to count as dead."""
        return self.tokens_since_fired > self._config.dead_after

    def step(
        self,
        x: Float[Tensor, "token d_model"],
        number: int,
        target: Float[Tensor, "token d_model"] | None = None,
    ) -> StepFigures:
        """The optimisation step of some number (from 0) on a batch of raw activations.

        ``target`` are those of the same tokens at a transcoder's other site.

        Raises:
            StoreError: when the loss is not finite; the weights are those before the step.
        """
        loss = self._loss(x, number, target)
        if not torch.isfinite(loss.total):
            raise StoreError(
                f"The loss of {self.run.name} is {float(loss.total.detach())}",
                fix="Look for NaN in the store with visae doctor, or lower the learning rate",
            )
        self._optimiser.zero_grad()
        self.sae.zero_grad()
        torch.autograd.backward(loss.total)
        self._project_and_clip()
        self._set_rate(self._peak_rate * self._config.rate_factor(number))
        self._optimiser.step()
        self._renormalise()
        self._hold_learned()
        self._observe_threshold(loss.codes.values)
        self._observe_firing(loss.codes.features, x.shape[0])
        return StepFigures(
            loss=float(loss.total.detach()),
            nmse=float(loss.reconstruction / self._spread(x if target is None else target)),
            l0=loss.codes.values.numel() / x.shape[0],
            auxk=float(loss.auxk),
        )

    def _loss(self, x: Tensor, number: int, target: Tensor | None) -> BatchLoss:
        """The loss of one step; what it draws at random depends on seed and step alone."""
        generator = _generator(self.run.seed, number)
        n_prefixes = self.run.random_prefixes
        loss = batch_loss(
            self.sae,
            x,
            self.dead,
            auxk_alpha=self._config.auxk_alpha,
            penalty_share=self._config.penalty_share(number),
            target=target,
            prefixes=random_prefixes(self.sae.n_features, n_prefixes, generator)
            if n_prefixes
            else (),
        )
        if not self.run.orthogonality:
            return loss
        alike = orthogonality_loss(self.sae.W_dec, generator)
        return loss._replace(total=loss.total + self.run.orthogonality * alike)

    def _spread(self, wanted: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
        """Mean square of the wanted activations around their mean, in normalised units."""
        scale = self.sae.target_scale if self.sae.config.transcoder else self.sae.scale
        return mse_loss(wanted, wanted.mean(dim=0).expand_as(wanted)) / scale.square()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for index, parameter in enumerate(self._parameters):
            for name, value in self._optimiser.state.get(parameter, {}).items():
                state[f"adam.{index}.{name}"] = torch.as_tensor(value)
        if self._archetypes is not None:
            found = self._archetypes.state_dict()
            state |= {f"archetypes.{name}": tensor for name, tensor in found.items()}
        state["tokens_since_fired"] = self.tokens_since_fired
        state["n_thresholds"] = torch.tensor(self._n_thresholds)
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` gave."""
        self.sae.load_state_dict(_below("sae.", state), strict=True)
        if self._archetypes is not None:
            self._archetypes.load_state_dict(_below("archetypes.", state), strict=True)
        for index, parameter in enumerate(self._parameters):
            if found := _below(f"adam.{index}.", state):
                self._optimiser.state[parameter] = found
        self.tokens_since_fired = state["tokens_since_fired"]
        self._n_thresholds = int(state["n_thresholds"])

    @torch.no_grad()
    def _project_and_clip(self) -> None:
        """Drop the part of each decoder row's gradient along the row; clip the global norm."""
        rows, grad = self.sae.W_dec, self.sae.W_dec.grad
        if grad is not None:
            grad.sub_((grad * rows).sum(1, keepdim=True) * rows)
            if self._archetypes is not None:
                with torch.enable_grad():
                    torch.autograd.backward(self._archetypes.rows(), grad)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)

    def _set_rate(self, rate: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def _renormalise(self) -> None:
        if self._archetypes is not None:
            self._archetypes.hold()
            self.sae.W_dec.copy_(self._archetypes.rows())
        elif self.sae.W_dec.requires_grad:
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def _hold_learned(self) -> None:
        """Keep what the sparsity kind learns within its bounds."""
        sparsity = self.sae.config.sparsity
        if isinstance(sparsity, LearnedSparsity):
            for name, vector in sparsity.vectors.items():
                self.sae.learned[name].clamp_(min=vector.least)

    @torch.no_grad()
    def _observe_threshold(self, values: Float[Tensor, " entry"]) -> None:
        """θ: exponential mean of the batches' smallest positive values.

        It starts from the first value measured and remembers a tenth of the run so far, at most
        1 000 batches, so that it follows a young SAE; a batch without a positive value changes
        nothing.
        """
        if not self.sae.config.sparsity.uses_threshold or values.numel() == 0:
            return
        self._n_thresholds += 1
        memory = min(_LONGEST_MEMORY, max(1.0, self._n_thresholds / 10))
        self.sae.threshold.lerp_(values.min(), 1.0 / memory)

    def _observe_firing(self, features: Tensor, n_tokens: int) -> None:
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.index_fill_(0, features, 0)


def _archetypes(sae: SAE, run: RunConfig) -> Archetypes | None:
    """What the decoder's rows are made of, if not free."""
    if run.archetypes is None:
        return None
    return Archetypes(run.archetypes, n_features=sae.n_features, d_model=sae.d_model)


def _trainable(sae: SAE, archetypes: Archetypes | None, control: Control) -> list[nn.Parameter]:
    """The parameters that Adam moves; a frozen half is excluded from training."""
    kept = {
        "frozen-decoder": (sae.W_dec, sae.b_dec),
        "frozen-encoder": (sae.W_enc, sae.b_enc),
    }
    for parameter in kept.get(control, ()):
        parameter.requires_grad_(False)
    learning = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    if archetypes is None:
        return learning
    free = [parameter for parameter in learning if parameter is not sae.W_dec]
    return [*free, *archetypes.parameters()]


def _generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one step; torch looks at 32 bits of a seed only, so both are mixed."""
    mixed = np.random.SeedSequence([seed % 2**63, number]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
