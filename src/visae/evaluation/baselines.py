"""Dictionaries that have learned nothing, of the same size and L0 as an SAE.

``untrained``           decoder rows in random directions
``random-activations``  decoder rows are random activations, less their mean, made unit

Both encode with W_enc = c · W_dec and no biases, where c makes x̂' the best multiple of itself. The
second is the strongest null known (METHODS §7).

Main name: ``baseline``.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.evaluation.config import Baseline
from visae.evaluation.tokens import EvaluatedTokens
from visae.saes.config import SAEConfig
from visae.saes.initialise import random_rows
from visae.saes.kernels.sparse import sparse_decode
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, TopK

__all__ = ["baseline"]

_MOST_PRE_ACTIVATIONS = 2**25  # pre-activations ranked at once: 128 MiB


@torch.no_grad()
def baseline(
    kind: Baseline, sae: SAE, tokens: EvaluatedTokens, *, l0: float, n_tokens: int, seed: int
) -> SAE:
    """A dictionary with as many features as ``sae`` and, on these tokens, its mean L0.

    TopK SAEs get a TopK baseline of the same k. All others get a threshold, the same for every
    feature, that as many pre-activations exceed as ``l0`` says; it is set on a random sample of up
    to ``n_tokens`` tokens, so the baseline's L0 is met to about 1 %. (A control trained by ``visae
    train`` instead keeps the threshold of its first batch.) μ and s are those of the tokens.
    """
    control = SAE(_config(sae, l0)).to(sae.mean.device)
    statistics = tokens.store.statistics(tokens.site, tokens.policy)
    control.mean.copy_(statistics.mean)
    control.scale.fill_(statistics.scale)
    rows = _rows(kind, control, tokens, seed).to(sae.mean.device)
    control.W_dec.copy_(rows)
    control.W_enc.copy_(rows)
    n_sampled = max(1, min(n_tokens, _MOST_PRE_ACTIVATIONS // sae.n_features))
    sample = tokens.sample(n_sampled, seed=seed + 1).to(sae.mean.device)
    _calibrate(control, sample, l0)
    return control.requires_grad_(False).eval()


def _config(sae: SAE, l0: float) -> SAEConfig:
    """The same shape; thresholds do not use k, which only has to be possible."""
    own = sae.config.sparsity
    k = min(sae.n_features, max(1, round(l0)))
    sparsity = own if isinstance(own, TopK) else BatchTopK(k=k)
    return SAEConfig(d_model=sae.d_model, n_features=sae.n_features, sparsity=sparsity)


def _rows(
    kind: Baseline, control: SAE, tokens: EvaluatedTokens, seed: int
) -> Float[Tensor, "feature d_model"]:
    if kind == "untrained":
        generator = torch.Generator().manual_seed(seed)
        return random_rows(control.n_features, control.d_model, generator)
    data = tokens.sample(control.n_features, seed=seed)
    missing = control.n_features - len(data)  # a store with fewer tokens than features
    if missing > 0:
        data = torch.cat([data, data[torch.arange(missing) % len(data)]])
    return nn.functional.normalize(control.normalise(data.to(control.mean.device)), dim=1)


def _calibrate(control: SAE, sample: Float[Tensor, "token d_model"], l0: float) -> None:
    """Set the threshold that gives the L0, then scale encoder and threshold by c."""
    x_normal = control.normalise(sample)
    pre = control.pre_activations(x_normal)
    if control.config.sparsity.uses_threshold:
        n_kept = min(pre.numel() - 1, round(l0 * len(sample)))
        flat = pre.flatten().cpu().numpy()
        rank = flat.size - n_kept - 1
        control.threshold.fill_(max(0.0, float(np.partition(flat, rank)[rank])))
    codes = control.select(pre)
    rebuilt = sparse_decode(codes.values, control.W_dec, codes)
    energy = float(rebuilt.square().sum())
    multiple = float((rebuilt * x_normal).sum()) / energy if energy > 0 else 1.0
    control.W_enc.mul_(multiple)
    control.threshold.mul_(multiple)
