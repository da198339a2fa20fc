"""What moves an SAE's weights by one step: dense autograd, or the sparse engine.

Both give the same weights to rounding, and keep Adam's state under the same names, so that a run
which one has begun is resumed by the other. Between ``Trainee`` and ``saes``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visae.errors import StoreError
from visae.saes.archetypal import Archetypes
from visae.saes.codes import SparseCodes
from visae.saes.engine import SparseEngine
from visae.saes.kernels.choice import choose_kernels
from visae.saes.kernels.interface import Kernels, RowGradients
from visae.saes.learned import AnySparsity, LearnedSparsity
from visae.saes.losses import BatchLoss, batch_loss
from visae.saes.orthogonality import orthogonality_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, TopK
from visae.training.config import Control, RunConfig, TrainConfig
from visae.training.sharing import Share

__all__ = ["DenseEngine", "Engine", "KernelEngine", "StepInput", "choose_engine"]


class StepInput(NamedTuple):
    """What one optimisation step is made from."""

    x: Float[Tensor, "token d_model"]
    """Raw activations, of this process's share of the batch."""
    target: Float[Tensor, "token d_model"] | None
    """Those of the same tokens at a transcoder's other site."""
    dead: Bool[Tensor, " feature"]
    """Features for AuxK to revive."""
    sparsity: AnySparsity
    """Which pre-activations survive in this step."""
    prefixes: tuple[int, ...]
    """This step's nested prefixes, in place of the SAE's own."""
    penalty_share: float
    """Share of the sparsity penalty in force."""
    rate: float
    """Learning rate."""
    generator: torch.Generator
    """Random numbers of this step."""
    share: Share
    """What is known of the rest of the batch."""

    @property
    def selection(self) -> AnySparsity:
        """The sparsity of this share before it is settled with the others."""
        return self.share.wider(self.sparsity, self.dead.shape[0])

    @property
    def settle(self) -> Callable[[SparseCodes], SparseCodes]:
        """What the whole batch keeps of a share's codes."""
        return functools.partial(self.share.settle, sparsity=self.sparsity)

    @property
    def settled(self) -> AnySparsity:
        """A sparsity that keeps at once what the whole batch keeps of a share."""
        if self.share.is_whole or not isinstance(self.sparsity, BatchTopK):
            return self.sparsity
        return _Settled(self)


@final
class _Settled:
    """BatchTopK over the whole batch, applied to a share of it."""

    kind = "batch-topk"
    uses_threshold = True
    compares_features = False

    def __init__(self, given: StepInput) -> None:
        self._given = given

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        given = self._given
        wider = given.share.wider(given.sparsity, pre.shape[1])
        return given.settle(cast(BatchTopK, wider).select(pre))

    def penalty(
        self, values: Float[Tensor, " entry"], norms: Float[Tensor, " entry"], n_tokens: int
    ) -> Float[Tensor, ""]:
        return values.new_zeros(())


@runtime_checkable
class Engine(Protocol):
    """Steps of one SAE, whose parameters it changes in place, and its Adam state."""

    @property
    def name(self) -> str:
        """``reference``, or a back end and the precision of its encode."""

    def step(self, given: StepInput) -> BatchLoss:
        """The loss of a batch; every parameter has moved once it is returned.

        Raises:
            StoreError: when the loss is not finite; nothing has moved.
        """

    def state(self) -> dict[str, Tensor]:
        """Adam's state as ``<parameter>.<name>``; nothing before the first step."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` gave, of this engine or another."""


def choose_engine(
    sae: SAE, run: RunConfig, config: TrainConfig, archetypes: Archetypes | None
) -> Engine:
    """The engine for one SAE; the log says which and why.

    Raises:
        ConfigError: when the one asked for cannot train this SAE, or cannot run here.
    """
    if not run.learns:
        return DenseEngine(sae, run, config, archetypes)
    kernels = choose_kernels(
        config.engine, device=sae.W_enc.device, needs_reference=_needs_reference(sae, run)
    )
    if kernels is None:
        return DenseEngine(sae, run, config, archetypes)
    return KernelEngine(sae, run, config, kernels)


def _needs_reference(sae: SAE, run: RunConfig) -> str:
    """Why only dense autograd can train an SAE; empty if the sparse engine can."""
    reasons = {
        f"sparsity {sae.config.sparsity.kind} keeps no fixed number of features": not isinstance(
            sae.config.sparsity, TopK | BatchTopK
        ),
        f"the control {run.control} keeps half of the weights": run.control != "none",
        "its decoder is made of archetypes": run.archetypes is not None,
        "its features are to be orthogonal": run.orthogonality > 0,
        f"its weights are {sae.W_enc.dtype}": sae.W_enc.dtype != torch.float32,
    }
    return ", ".join(f"{run.name}: {reason}" for reason, holds in reasons.items() if holds)


@final
class KernelEngine:
    """The sparse engine, for TopK and BatchTopK SAEs whose weights are free."""

    def __init__(self, sae: SAE, run: RunConfig, config: TrainConfig, kernels: Kernels) -> None:
        self._engine = SparseEngine(sae, kernels)
        self._run, self._config = run, config
        self._name = f"{kernels.name}, encode in {kernels.encode}"

    @property
    def name(self) -> str:
        """The back end and the precision of its encode."""
        return self._name

    def step(self, given: StepInput) -> BatchLoss:
        """The loss of a batch, by sparse codes."""
        found = self._engine.gradients(
            given.x,
            given.dead,
            auxk_alpha=self._config.auxk_alpha,
            target=given.target,
            prefixes=given.prefixes,
            sparsity=given.selection,
            settle=given.settle,
        )
        loss = _averaged(found.loss, given.share)
        _require_finite(loss, given.x, self._run.name)
        gradients = _averaged_rows(found.gradients, given.share)
        self._engine.update(gradients, rate=given.rate, clip_norm=self._config.clip_norm)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Adam's state."""
        return self._engine.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a state."""
        self._engine.restore(state)


@final
class DenseEngine:
    """Plain autograd and ``torch.optim.Adam``, for every kind of SAE: the reference."""

    def __init__(
        self, sae: SAE, run: RunConfig, config: TrainConfig, archetypes: Archetypes | None
    ) -> None:
        self._sae, self._run, self._config, self._archetypes = sae, run, config, archetypes
        self._parameters = _trainable(sae, archetypes, run.control)
        self._optimiser = torch.optim.Adam(self._parameters, eps=6.25e-10, fused=True)

    @property
    def name(self) -> str:
        """``reference``."""
        return "reference"

    def step(self, given: StepInput) -> BatchLoss:
        """The loss of a batch, by autograd."""
        own = self._loss(given)
        loss = _averaged(own._replace(total=own.total.detach().clone()), given.share)
        _require_finite(loss, given.x, self._run.name)
        self._optimiser.zero_grad()
        self._sae.zero_grad()
        torch.autograd.backward(own.total)
        given.share.average(*(p.grad for p in self._sae.parameters() if p.grad is not None))
        self._project_and_clip()
        for group in self._optimiser.param_groups:
            group["lr"] = given.rate
        self._optimiser.step()
        self._renormalise()
        self._hold_learned()
        return loss

    def _loss(self, given: StepInput) -> BatchLoss:
        loss = batch_loss(
            self._sae,
            given.x,
            given.dead,
            auxk_alpha=self._config.auxk_alpha,
            penalty_share=given.penalty_share,
            target=given.target,
            prefixes=given.prefixes,
            sparsity=given.settled,
        )
        if not self._run.orthogonality:
            return loss
        alike = orthogonality_loss(self._sae.W_dec, given.generator)
        return loss._replace(total=loss.total + self._run.orthogonality * alike)

    def state(self) -> dict[str, Tensor]:
        """Adam's state."""
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, parameter in enumerate(self._parameters)
            for name, value in self._optimiser.state.get(parameter, {}).items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a state."""
        for index, parameter in enumerate(self._parameters):
            own = {k: v for k, v in state.items() if k.startswith(f"{index}.")}
            if own:
                self._optimiser.state[parameter] = {
                    name.partition(".")[2]: value.to(parameter.device)
                    for name, value in own.items()
                }

    @torch.no_grad()
    def _project_and_clip(self) -> None:
        """Drop the part of each decoder row's gradient along the row; clip the global norm."""
        rows, grad = self._sae.W_dec, self._sae.W_dec.grad
        if grad is not None:
            grad.sub_((grad * rows).sum(1, keepdim=True) * rows)
            if self._archetypes is not None:
                with torch.enable_grad():
                    torch.autograd.backward(self._archetypes.rows(), grad)
        nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)

    @torch.no_grad()
    def _renormalise(self) -> None:
        rows = self._sae.W_dec
        if self._archetypes is not None:
            self._archetypes.hold()
            rows.copy_(self._archetypes.rows())
        elif rows.requires_grad:
            rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def _hold_learned(self) -> None:
        """Keep what the sparsity kind learns within its bounds."""
        sparsity = self._sae.config.sparsity
        if isinstance(sparsity, LearnedSparsity):
            for name, vector in sparsity.vectors.items():
                self._sae.learned[name].clamp_(min=vector.least)


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


def _averaged(loss: BatchLoss, share: Share) -> BatchLoss:
    """The figures of the whole batch; its codes stay those of the share."""
    share.average(*loss[:3])
    return loss


def _averaged_rows(found: RowGradients, share: Share) -> RowGradients:
    """The gradients of the whole batch, in the place of the share's."""
    if share.is_whole:
        return found
    for gradient in found.weights[:3]:
        gradient[~found.touched] = 0
    share.average(*found.weights)
    norm = torch.stack([gradient.norm() for gradient in found.weights]).norm()
    return RowGradients(found.weights, share.either(found.touched), norm)


def _require_finite(loss: BatchLoss, x: Tensor, name: str) -> None:
    """Refuse to move the weights by a loss that is no number, and say whose fault it is."""
    if torch.isfinite(loss.total):
        return
    what = f"The loss of {name} is {float(loss.total.detach())}"
    if torch.isfinite(x).all():
        raise StoreError(
            f"{what}, though all activations are finite: its weights have run away",
            fix="Lower the learning rate; the last resume point is from before",
        )
    raise StoreError(
        f"{what}, for this batch holds NaN or infinite activations",
        fix="Find them in the store with visae doctor; the last resume point is from before",
    )
