"""A running mean of an SAE's weights, to keep instead of the last ones.

    w̄ ← w̄ + (w − w̄) / memory        memory = min(1 / (1 − decay), a tenth of the steps so far)

The mean smooths what the last steps happened to do; the short memory at first lets it follow a
young SAE. Source: 1412.6980 §7.2, METHODS §4.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visae.saes.sae import SAE

__all__ = ["WeightAverage"]


class WeightAverage:
    """The exponential mean of all parameters over the steps; costs one pass over them a step."""

    def __init__(self, sae: SAE, decay: float) -> None:
        self._longest, self._n_steps = 1 / (1 - decay), 0
        self._means = {name: p.detach().clone() for name, p in sae.named_parameters()}

    @torch.no_grad()
    def observe(self, sae: SAE) -> None:
        """Take in the weights after a step."""
        self._n_steps += 1
        memory = min(self._longest, max(1.0, self._n_steps / 10))
        for name, parameter in sae.named_parameters():
            self._means[name].lerp_(parameter, 1 / memory)

    @torch.no_grad()
    def averaged(self, sae: SAE) -> SAE:
        """Another SAE of the mean weights, decoder rows made unit; the same one before any step."""
        if not self._n_steps:
            return sae
        result = SAE(sae.config).to(sae.W_enc)
        result.load_state_dict({**sae.state_dict(), **self._means})
        result.W_dec.copy_(normalize(result.W_dec, dim=1))
        return result

    def state(self) -> dict[str, Tensor]:
        """Everything that ``restore`` needs."""
        return {**self._means, "n_steps": torch.tensor(self._n_steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` gave."""
        self._n_steps = int(state["n_steps"])
        for name, mean in self._means.items():
            mean.copy_(state[name])
