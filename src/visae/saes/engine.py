"""One optimisation step through sparse codes: loss, gradients, Adam, unit rows.

Gives what ``batch_loss`` with autograd and ``torch.optim.Adam`` give, for the kinds that keep few
features a token, at the cost of the encode and little more: no dense matrix of features is ever
kept, nor any graph. Which back end does the work is ``saes/kernels/choice.py``'s to say.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visae.saes.codes import SparseCodes
from visae.saes.kernels.auxk import dead_features
from visae.saes.kernels.choice import keep_of
from visae.saes.kernels.interface import AdamState, Batch, Kernels, RowGradients, Weights
from visae.saes.learned import AnySparsity
from visae.saes.losses import BatchLoss
from visae.saes.sae import SAE

__all__ = ["EngineStep", "SparseEngine"]

_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class EngineStep(NamedTuple):
    """The loss of a batch and its gradients, before anything has moved."""

    loss: BatchLoss
    """What the loss is made of, without graph."""
    gradients: RowGradients
    """Gradients of all parameters, until the next step."""


class SparseEngine:
    """Steps of one SAE and its Adam state; changes the SAE's parameters in place.

    Args:
        sae: A TopK or BatchTopK SAE, with or without prefixes, of free float32 parameters.
        kernels: The back end.

    Raises:
        ConfigError: when the SAE is of another kind.
    """

    def __init__(self, sae: SAE, kernels: Kernels) -> None:
        self._sae, self._kernels = sae, kernels
        self._keep = keep_of(sae.config.sparsity)
        self._weights = Weights(*(getattr(sae, name).detach() for name in _PARAMETERS))
        means = Weights(*map(torch.zeros_like, self._weights))
        self._adam = AdamState(means, Weights(*map(torch.zeros_like, self._weights)))

    @torch.no_grad()
    def gradients(
        self,
        x: Float[Tensor, "token d_model"],
        dead: Bool[Tensor, " feature"],
        *,
        auxk_alpha: float,
        target: Float[Tensor, "token d_model"] | None = None,
        prefixes: tuple[int, ...] = (),
        sparsity: AnySparsity | None = None,
        settle: Callable[[SparseCodes], SparseCodes] | None = None,
    ) -> EngineStep:
        """Loss and gradients of a batch of raw activations; arguments as for ``batch_loss``.

        ``settle`` may drop entries of the codes before anything is made of them.
        """
        batch = self._batch(x, target, prefixes)
        keep = self._keep if sparsity is None else keep_of(sparsity)
        codes = self._kernels.codes(batch.centred, self._weights, keep)
        codes = codes if settle is None else settle(codes)
        decoded = self._kernels.decode(batch, codes, self._weights)
        nested, auxk, extra = decoded.losses.mean(), torch.zeros_like(decoded.losses[0]), None
        if auxk_alpha and dead.any():
            auxk, extra = dead_features(
                self._kernels,
                self._weights,
                batch.centred,
                residual=decoded.rows[:, -1] * (-decoded.rows.numel() / 2),
                features=torch.nonzero(dead).flatten(),
                alpha=auxk_alpha,
            )
        gradients = self._kernels.row_gradients(
            batch, codes, decoded, weights=self._weights, extra=extra
        )
        return EngineStep(BatchLoss(nested + auxk, decoded.losses[-1], auxk, codes), gradients)

    @torch.no_grad()
    def update(self, gradients: RowGradients, *, rate: float, clip_norm: float) -> None:
        """Move every parameter by one Adam step, and make the decoder's rows unit."""
        self._kernels.update(self._weights, gradients, self._adam, rate=rate, clip_norm=clip_norm)

    def state(self) -> dict[str, Tensor]:
        """Adam's state under the names that ``torch.optim.Adam`` gives it, parameter by parameter.

        Parameters are numbered W_enc, b_enc, W_dec, b_dec; nothing before the first update.
        """
        if not self._adam.n_steps:
            return {}
        tensors: dict[str, Any] = {}
        for index, (mean, square) in enumerate(
            zip(self._adam.mean, self._adam.square, strict=True)
        ):
            tensors[f"{index}.step"] = torch.tensor(float(self._adam.n_steps))
            tensors[f"{index}.exp_avg"], tensors[f"{index}.exp_avg_sq"] = mean, square
        return tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` gave, here or in the plain optimiser."""
        if not state:
            return
        self._adam.n_steps = int(state["0.step"])
        for index, (mean, square) in enumerate(
            zip(self._adam.mean, self._adam.square, strict=True)
        ):
            mean.copy_(state[f"{index}.exp_avg"])
            square.copy_(state[f"{index}.exp_avg_sq"])

    def _batch(self, x: Tensor, target: Tensor | None, prefixes: tuple[int, ...]) -> Batch:
        config = self._sae.config
        x_normal = self._sae.normalise(x)
        return Batch(
            centred=self._sae.centre(x_normal),
            wanted=x_normal if target is None else self._sae.normalise_target(target),
            bounds=prefixes or config.prefixes or (config.n_features,),
            subtracts_bias=not config.transcoder,
        )
