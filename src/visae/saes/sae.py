"""The sparse autoencoder: raw activations in, features, raw activations out.

    x' = (x − μ) / s        p = W_enc (x' − b_dec) + b_enc        f = sparsity(p) ≥ 0
    x̂  = s · (W_decᵀ f + b_dec) + μ

μ and s are part of the SAE, so no caller can forget the normalisation. Both weights hold one row
a feature; decoder rows have unit norm. Source: METHODS §1.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.errors import CheckpointError
from visae.saes.codes import SparseCodes, active_entries
from visae.saes.config import SAEConfig
from visae.saes.kernels.sparse import sparse_decode

__all__ = ["SAE"]

_CHUNK_ELEMENTS = 2**25


class SAE(nn.Module):
    """A sparse autoencoder; ``encode`` and ``decode`` speak raw activations."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.n_features, config.d_model
        self.W_enc = nn.Parameter(torch.zeros(shape))
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.W_dec = nn.Parameter(torch.zeros(shape))
        self.b_dec = nn.Parameter(torch.zeros(config.d_model))
        self.mean: Tensor
        self.scale: Tensor
        self.threshold: Tensor
        self.register_buffer("mean", torch.zeros(config.d_model))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((), -1.0))

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.config.n_features

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.config.d_model

    def normalise(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Normalised activations x' = (x − μ)/s, in float32."""
        return (x.float() - self.mean) / self.scale

    def restore(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Raw activations x = s·x' + μ."""
        return x * self.scale + self.mean

    def pre_activations(
        self, x_normal: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token feature"]:
        """Pre-activations p = W_enc (x' − b_dec) + b_enc of normalised activations."""
        return nn.functional.linear(x_normal - self.b_dec, self.W_enc, self.b_enc)

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """The codes of pre-activations at inference.

        Raises:
            CheckpointError: when the SAE needs a threshold and was never trained.
        """
        if not self.config.sparsity.uses_threshold:
            return self.config.sparsity.select(pre)
        if self.threshold < 0:
            raise CheckpointError(
                "This SAE has no threshold yet",
                where=f"sparsity {self.config.sparsity.kind}",
                fix="Train it for at least one step",
            )
        tokens, features = active_entries(pre > self.threshold)
        values = pre[tokens, features]
        return SparseCodes.from_entries(tokens, features, values, tuple(pre.shape))

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "token d_model"]) -> SparseCodes:
        """Sparse codes of raw activations; memory grows with active features only."""
        chunks = self._chunks(x)
        return SparseCodes.join(
            [self.select(self.pre_activations(self.normalise(chunk))) for chunk in chunks]
        )

    def encode(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """Feature activations of raw activations, zeros included; never negative."""
        return self.encode_sparse(x).dense()

    @torch.no_grad()
    def decode(self, f: Float[Tensor, "token feature"]) -> Float[Tensor, "token d_model"]:
        """Raw activations from feature activations."""
        return self.restore(f @ self.W_dec + self.b_dec)

    @torch.no_grad()
    def decode_sparse(self, codes: SparseCodes) -> Float[Tensor, "token d_model"]:
        """Raw activations from sparse codes."""
        return self.restore(sparse_decode(codes.values, self.W_dec, codes) + self.b_dec)

    def forward(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Reconstruction of raw activations."""
        return self.decode_sparse(self.encode_sparse(x))

    @torch.no_grad()
    def feature_activations(
        self, x: Float[Tensor, "token d_model"], features: list[int]
    ) -> Float[Tensor, "token chosen"]:
        """Activations of a few features: those columns of ``encode``, to float32 rounding.

        Cheap (no other feature is computed) unless the sparsity compares features with each other.

        Raises:
            CheckpointError: when the SAE needs a threshold and was never trained.
        """
        if self.config.sparsity.compares_features:
            return self.encode(x)[:, features]
        centred = self.normalise(x) - self.b_dec
        pre = nn.functional.linear(centred, self.W_enc[features], self.b_enc[features])
        return self.select(pre).dense()

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        step = max(1, _CHUNK_ELEMENTS // self.n_features)
        for start in range(0, max(1, x.shape[0]), step):
            yield x[start : start + step]
